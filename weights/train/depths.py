"""Make depth images, and read depth off images to check that they follow one."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from weights.train import dataset
from weights.train.device import device, on_device
from weights.train.fit import Batch, Plan, Work, fit
from weights.train.recognise import (
    JUDGE_CHANNELS,
    SPHERE_VIEW,
    WINDOW_VIEW,
    Blocks,
    disturb,
    draw_places,
)
from weights.train.views import channels_first
from weights.train.windows import draw_number

PLAN = Plan("depth-360", steps=2000, learning_rate=2e-3, average=0.99, warmup=100)
FINEST = 3  # blocks, after which features are fine enough to read depth from
CELL = 2**FINEST  # pixels
SHAPES = 0.2
"""The weight of shapes in the error of depth. Without it, networks learn little more than the mean
of each row: near ground below, far sky above.
"""


def depth_image(distance: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return the depth image (H, W) of distances (H, W): sqrt(nearest / distance).

    The nearest point is 1, and the sky, at inf, is 0. The square root keeps distant things apart:
    above ground at 6 m, ridges at 200 m and 400 m are 0.17 and 0.12.
    """
    metres = np.asarray(distance, np.float32)
    return np.sqrt(metres.min() / metres)


class DepthReader(nn.Module):
    """A small network that reads depth off images; it has no part in making them."""

    def __init__(self, channels: Sequence[int] = JUDGE_CHANNELS) -> None:
        super().__init__()
        self.blocks = Blocks(channels)
        self.head = build_head(sum(channels[FINEST - 1 :]))

    def forward(self, images: Tensor) -> Tensor:
        """Read depth (N, H / 8, W / 8) in [0, 1] off images (N, 3, H, W) in [-1, 1]."""
        return self.head(at_finest(self.blocks(images)[FINEST - 1 :])).sigmoid()[:, 0]


def build_head(channels: int) -> nn.Sequential:
    """Build the layers from features to a score of depth."""
    return nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, 1, 1))


def at_finest(features: Sequence[Tensor]) -> Tensor:
    """Concatenate features (N, C, h, w) of several sizes at the size of the first."""
    size = features[0].shape[-2:]
    return torch.cat([F.interpolate(f, size, mode="bilinear") for f in features], 1)


def train(work: Work) -> DepthReader:
    """Train the reader on renders, rolled and mirrored at random."""
    torch.manual_seed(8)
    model = DepthReader()
    sets = [dataset.load(work.folder, kind, "train") for kind in ("outdoors", "rooms")]
    spheres = [channels_first(images.rgb) for images in sets]
    depths = [depth_images(images.distance) for images in sets]

    def draw(generator: torch.Generator) -> Batch:
        view = (WINDOW_VIEW, SPHERE_VIEW)[draw_number(2, generator)]
        places = draw_places(sets, on_device(generator))
        images = disturb(view.show(spheres, places), generator)
        cuts = view.cut(depths, places, dataset.COARSER).float()
        target = F.avg_pool2d(cuts, CELL * view.factor // dataset.COARSER)[:, 0]
        if draw_number(2, generator):
            images, target = images.flip(-1), target.flip(-1)
        return images, target

    def loss(images: Tensor, target: Tensor) -> Tensor:
        return error(model(images).float(), target)

    return fit(model, draw, loss, PLAN, work)


def depth_images(distances: NDArray[np.float16]) -> Tensor:
    """Return the depth images (N, 1, H, W) of distances (N, H, W), on the device."""
    depths = [torch.from_numpy(depth_image(metres)).half() for metres in distances]
    return torch.stack(depths)[:, None].to(device())


def cells(depth: Tensor) -> Tensor:
    """Average depth (N, H, W) over the reader's cells, (N, H / 8, W / 8)."""
    return F.avg_pool2d(depth[:, None], CELL)[:, 0]


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's correlation (N,) of depths (N, h, w), image by image."""
    pair = torch.stack([first, second]).flatten(2)
    pair = F.normalize(pair - pair.mean(-1, keepdim=True), dim=-1)
    return (pair[0] * pair[1]).sum(-1)


def error(seen: Tensor, depth: Tensor) -> Tensor:
    """Return the error of depth (N, h, w), and of its shapes, less each row's mean."""
    return F.l1_loss(seen, depth) + SHAPES * (1 - shape_correlation(seen, depth).mean())


def shape_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's correlation (N,) of depths (N, h, w), less each row's mean."""
    return correlation(subtract_row_means(first), subtract_row_means(second))


def subtract_row_means(depth: Tensor) -> Tensor:
    """Subtract the mean of each row, which follows from the elevation, from depth (N, h, w)."""
    return depth - depth.mean(-1, keepdim=True)
