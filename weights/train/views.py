"""Images in [0, 255]: as tensors, and views of spheres (2:1, closed left to right)."""

from collections.abc import Callable
from math import pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weights.train.device import device

Pixels = NDArray[np.uint8]
Change = Callable[[Pixels], Pixels]
"""From an image (H, W, 3) to what is made of it."""

SIDE = 256  # pixels of a view straight up or down, 90 degrees across


def channels_first(images: Pixels) -> Tensor:
    """Return images (N, H, W, 3) as (N, 3, H, W): on a GPU, or where they are, on disk too."""
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
    """Return the view (SIDE, SIDE, 3) straight up or down from a sphere (H, W, 3), bilinear."""
    height, width = image.shape[:2]
    places = (2 * (np.arange(SIDE) + 0.5) / SIDE - 1).astype(np.float64)
    x, y = places[None], places[:, None]
    elevation = np.arctan2(1.0, np.hypot(x, y)) * (1 if up else -1)
    azimuth = np.arctan2(x, y if up else -y)
    row = (0.5 - elevation / pi) * height - 0.5
    column = azimuth / (2 * pi) * width - 0.5
    top, left = np.floor(row).astype(int), np.floor(column).astype(int)
    down, right = (row - top)[..., None], (column - left)[..., None]
    rows = [np.clip(top + k, 0, height - 1) for k in range(2)]
    columns = [(left + k) % width for k in range(2)]
    lines = [image[r, columns[0]] * (1 - right) + image[r, columns[1]] * right for r in rows]
    return (lines[0] * (1 - down) + lines[1] * down + 0.5).astype(np.uint8)
