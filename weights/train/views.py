"""Images in [0, 255]: as tensors, and views of spheres (2:1, closed left to right)."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from panorama.images.sphere import Face
from panorama.images.vae import from_pil, to_pil
from weights.train.device import device

Pixels = NDArray[np.uint8]
Change = Callable[[Pixels], Pixels]
"""A function that changes an image (H, W, 3)."""

SIDE = 256  # pixels of a view straight up or down


def channels_first(images: Pixels) -> Tensor:
    """Return images (N, H, W, 3) as (N, 3, H, W), copied to the GPU if there is one.

    Otherwise they are a view, and those of a memory-mapped file stay on disk.
    """
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(device())


def to_range(images: Tensor) -> Tensor:
    """Convert images in [0, 255] to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_tensor(images: Pixels) -> Tensor:
    """Convert images (N, H, W, 3) in [0, 255] to (N, 3, H, W) in [-1, 1], on the CPU."""
    return to_range(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2))


def halve(images: Pixels) -> Pixels:
    """Average squares of four pixels of images (..., H, W, 3)."""
    *lead, height, width, channels = images.shape
    squares = images.reshape(*lead, height // 2, 2, width // 2, 2, channels)
    return (squares.mean((-4, -2)) + 0.5).astype(np.uint8)


def look(image: Pixels, *, up: bool) -> Pixels:
    """Return the view (SIDE, SIDE, 3) of a sphere straight up or down, as `fix_poles` has it."""
    shown = Face(up, SIDE).show(from_pil(Image.fromarray(image)))
    return np.asarray(to_pil(shown.clamp(0, 1)))
