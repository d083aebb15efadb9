"""Draw windows of spheres, images or latents, at random places on the device that trains."""

import torch
from torch import Tensor


def draw_numbers(high: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw numbers (N,) in [0, high) on the generator's device."""
    return torch.randint(high, (count,), generator=generator, device=generator.device)


def draw_number(high: int, generator: torch.Generator) -> int:
    """Draw a number in [0, high) with a generator of the CPU."""
    return int(torch.randint(high, (), generator=generator))


def crop(maps: Tensor, index: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut windows (N, C, h, w) of a size out of maps (M, C, H, W) that close left to right.

    Index, top and left, (N,), are each window's map, first row and first column. Windows may lie
    across the wrap.
    """
    height, width = (torch.arange(side, device=maps.device) for side in size)
    rows = (top[:, None] + height)[:, :, None]  # (N, h, 1)
    columns = ((left[:, None] + width) % maps.shape[-1])[:, None]  # (N, 1, w)
    return maps[index[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror images (N, C, H, W), each with a probability of a half."""
    flipped = draw_numbers(2, len(images), generator).bool()
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)
