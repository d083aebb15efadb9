"""Perspective faces of an equirectangular image, straight up and straight down."""

from dataclasses import dataclass
from math import pi, radians, tan

import torch
from torch import Tensor
from torch.nn import functional as F

WRAP = 2  # columns from the opposite edge, which bicubic sampling reaches


@dataclass(frozen=True)
class Face:
    """A square perspective view of a sphere, around its zenith or its nadir.

    The middle column of the image is at the lower edge of the zenith, and at the upper edge of the
    nadir.
    """

    up: bool  # the zenith
    side: int  # pixels
    field: float = 100.0  # of view, degrees

    @property
    def reach(self) -> float:
        """Half the side at a distance of 1 from the eye."""
        return tan(radians(self.field) / 2)

    def show(self, image: Tensor) -> Tensor:
        """Project an equirectangular image (1, C, H, W) onto the face, (1, C, side, side)."""
        along = self.reach * (
            (torch.arange(self.side, dtype=torch.float64) + 0.5) / self.side * 2 - 1
        )
        down, right = torch.meshgrid(along, along, indexing="ij")
        away = right.hypot(down)  # from the pole, in tangents
        ahead = down if self.up else -down
        columns = torch.atan2(right, ahead) / (2 * pi) + 0.5  # (side, side) in [0, 1]
        rows = away.atan() / pi
        return sample(image, rows if self.up else 1 - rows, columns)

    def blend(self, image: Tensor, change: Tensor) -> Tensor:
        """Add a change of the face to an equirectangular image.

        The change fades out over the outer quarters of the face. Beyond it the image stays as it
        is, bit by bit.

        Args:
            image: (1, C, H, W).
            change: (1, C, side, side).
        """
        height, width = image.shape[-2:]
        angles = pi * (torch.arange(height, dtype=torch.float64) + 0.5) / height  # from the zenith
        angles = angles if self.up else pi - angles
        azimuths = 2 * pi * ((torch.arange(width, dtype=torch.float64) + 0.5) / width - 0.5)
        away = torch.where(angles < pi / 2, angles.tan(), torch.inf)[:, None] / self.reach  # (H, 1)
        right, ahead = away * azimuths.sin(), away * azimuths.cos()  # (H, W) in [-1, 1] on the face
        down = ahead if self.up else -ahead
        inside = (1 - torch.maximum(right.abs(), down.abs())).nan_to_num(-1)
        weight = (2 * inside).clamp(0, 1)  # (H, W)
        grid = torch.stack([right, down], -1).nan_to_num(2, 2, -2)[None].to(image.device)
        moved = F.grid_sample(
            change.double(), grid, "bicubic", padding_mode="border", align_corners=False
        )
        changed = image + (weight.to(image.device) * moved).to(image)
        return torch.where((weight > 0).to(image.device), changed, image)


def sample(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sample an image (1, C, H, W) that closes left to right, at places (h, w) in [0, 1]."""
    width = image.shape[-1]
    padded = F.pad(image.double(), (WRAP, WRAP, 0, 0), mode="circular")
    across = (columns * width + WRAP) / (width + 2 * WRAP)
    grid = (2 * torch.stack([across, rows], -1) - 1)[None].to(image.device)
    found = F.grid_sample(padded, grid, "bicubic", padding_mode="border", align_corners=False)
    return found.to(image)
