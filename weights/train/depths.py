"""Make depth images, and read depth off images to check that they follow one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from weights.train import dataset
from weights.train.autoencoder import to_tensor
from weights.train.fit import Plan, fit, mixed_precision
from weights.train.recognise import Block, disturb, draw, draw_windows

PLAN = Plan("depth-360", steps=2000, learning_rate=2e-3, average=0.99, warmup=100)
BATCH = 10
FINEST = 3  # blocks, after which features are fine enough to read depth from
CELL = 2**FINEST  # pixels


def depth_image(distance: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return an image's depth image: the square root of the nearest distance over each distance.

    The root keeps apart what is far off: 0.17 and 0.12 for ridges at 200 m and 400 m above ground
    at 6 m.

    Args:
        distance: (H, W) metres, inf for the sky.

    Returns:
        (H, W) in [0, 1]: 1 where it is nearest, 0 for the sky.
    """
    metres = np.asarray(distance, np.float32)
    return np.sqrt(metres.min() / metres)


class DepthReader(nn.Module):
    """A small network that reads depth off images; it has no part in making them."""

    def __init__(self, channels: tuple[int, ...] = (24, 40, 64, 96, 128)) -> None:
        super().__init__()
        pairs = zip((3, *channels[:-1]), channels, strict=True)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in pairs)
        self.head = build_head(sum(channels[FINEST - 1 :]))

    def forward(self, images: Tensor) -> Tensor:
        """Read depth (N, H / 8, W / 8) in [0, 1] off images (N, 3, H, W) in [-1, 1]."""
        features = []
        x = images
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return self.head(at_finest(features[FINEST - 1 :])).sigmoid()[:, 0]


def build_head(channels: int) -> nn.Sequential:
    """Build the layers from features to a score of depth."""
    return nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, 1, 1))


def at_finest(features: Sequence[Tensor]) -> Tensor:
    """Concatenate features (N, C, h, w) of several sizes at the size of the first."""
    size = features[0].shape[-2:]
    return torch.cat([F.interpolate(f, size, mode="bilinear") for f in features], 1)


def train(work: Path) -> nn.Module:
    """Train the reader on renders, rolled and mirrored at random."""
    torch.manual_seed(8)
    model = DepthReader()
    sets = [dataset.load(work, kind, "train") for kind in ("outdoors", "rooms")]
    width = sets[0].rgb.shape[2]

    def loss(generator: torch.Generator) -> Tensor:
        windows = draw_windows(sets, width, BATCH, generator)
        images = disturb(to_tensor(np.stack([w.rgb for w in windows])), generator)
        depths = [depth_image(w.images.distance[w.index])[:, w.columns] for w in windows]
        target = cells(torch.from_numpy(np.stack(depths)))
        if draw(2, generator):
            images, target = images.flip(-1), target.flip(-1)
        with mixed_precision():
            depth = model(images)
        return F.l1_loss(depth.float(), target)

    return fit(model, loss, PLAN, work)


def cells(depth: Tensor) -> Tensor:
    """Average depth (N, H, W) over the reader's cells, (N, H / 8, W / 8)."""
    return F.avg_pool2d(depth[:, None], CELL)[:, 0]


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's correlation (N,) of depths (N, h, w), image by image."""
    pair = torch.stack([first, second]).flatten(2)
    pair = F.normalize(pair - pair.mean(-1, keepdim=True), dim=-1)
    return (pair[0] * pair[1]).sum(-1)


def around(depth: Tensor) -> Tensor:
    """Subtract the mean of each row from depth (N, h, w).

    All landscapes have their ground below and their sky above; the rest does not follow from the
    elevation.
    """
    return depth - depth.mean(-1, keepdim=True)
