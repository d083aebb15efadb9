"""The noise that a picture starts from."""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


def initial_noise(
    unet: Any, size: tuple[int, int], generator: torch.Generator | None, latents: Tensor | None
) -> Tensor:
    """The initial noise, float32 on the UNet's device, drawn or given.

    Drawn in float32, since in half precision the same generator gives other noise.

    Args:
        unet: what is going to denoise it.
        size: height and width, latent cells.
        generator: on the CPU it gives the same noise on every device.
        latents: the noise itself, (1, C, *size), unit variance; None to draw it.

    Returns:
        (1, C, *size), C the UNet's input channels.

    Raises:
        ValueError: latents of another shape.
    """
    shape = (1, unet.config.in_channels, *size)
    if latents is None:
        noise: Tensor = randn_tensor(shape, generator, unet.device, torch.float32)
        return noise
    if latents.shape != shape:
        raise ValueError(
            f"latents has shape {tuple(latents.shape)}: must be that of the picture; "
            f"{shape} would do"
        )
    return latents.to(unet.device, torch.float32)
