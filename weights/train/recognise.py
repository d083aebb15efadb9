"""Networks that look at images: the feature network that guides, and the judges that measure.

The feature network, `panorama.sampling.perceptual.LPIPS` with few channels, takes the place of
VGG16 in the embedded family. The judges have another architecture, other crops and other seeds.
They never guide; they measure prompt agreement and coherence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from panorama.sampling.perceptual import LPIPS, normalize
from weights.train import dataset, rooms, scenes
from weights.train.autoencoder import to_tensor
from weights.train.fit import Plan, fit, mixed_precision

Attributes = Mapping[str, tuple[object, ...]]
"""The values that each attribute can have; None where images of some kind lack it."""

ATTRIBUTES: Attributes = {
    "time": tuple(scenes.SKIES),
    "land": tuple(scenes.LANDS),
    "trees": (False, True),
    "clouds": (False, True),
}
SPHERE_ATTRIBUTES: Attributes = {
    "kind": (*rooms.KINDS, None),
    "color": (*rooms.COLORS, None),
    "time": (*scenes.SKIES, None),
    "land": (*scenes.LANDS, None),
}
FEATURE_CHANNELS = ((8,), (16, 16), (32, 32), (64, 64), (96, 96))
FEATURES_PLAN = Plan("features", steps=800, learning_rate=2e-3, average=0.99, warmup=100)
JUDGE_PLAN = Plan("judge", steps=1000, learning_rate=2e-3, average=0.99, warmup=100)
SPHERE_JUDGE_PLAN = Plan("judge-360", steps=1500, learning_rate=2e-3, average=0.99, warmup=100)
BATCH = 10


class Heads(nn.Module):
    """Scores for every attribute, from features averaged over the image."""

    def __init__(self, channels: int, attributes: Attributes) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.scores = nn.ModuleDict({k: nn.Linear(channels, len(v)) for k, v in attributes.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Score the values of each attribute, (N, values), from features (N, C, h, w)."""
        mean = self.norm(features.mean((2, 3)))
        return {name: head(mean) for name, head in self.scores.items()}


class Guide(nn.Module):
    """The feature network with the heads that it is trained through."""

    def __init__(self) -> None:
        super().__init__()
        self.lpips = LPIPS(channels=FEATURE_CHANNELS, shift=(0, 0, 0), scale=(0.5, 0.5, 0.5))
        self.heads = Heads(FEATURE_CHANNELS[-1][-1], ATTRIBUTES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Score images (N, 3, H, W) in [-1, 1]."""
        x = images / 0.5
        for stage in self.lpips.stages:
            x = stage(x)
        return self.heads(x)


class Block(nn.Module):
    """A residual block at half the resolution of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, outputs)
        self.first = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Turn (N, C, H, W) into (N, C', H / 2, W / 2)."""
        x = self.down(x)
        return x + self.second(F.gelu(self.first(F.gelu(self.norm(x)))))


class Judge(nn.Module):
    """A small residual network that reads a scene's attributes off a window or a sphere."""

    def __init__(
        self,
        attributes: Attributes = ATTRIBUTES,
        channels: Sequence[int] = (24, 40, 64, 96, 128),
    ) -> None:
        super().__init__()
        pairs = zip((3, *channels[:-1]), channels, strict=True)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in pairs)
        self.heads = Heads(channels[-1], attributes)

    def embed(self, images: Tensor) -> list[Tensor]:
        """Return the features after every block, of unit length over channels."""
        features = []
        x = images
        for block in self.blocks:
            x = block(x)
            features.append(normalize(x))
        return features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Score images (N, 3, H, W) in [-1, 1]."""
        x = images
        for block in self.blocks:
            x = block(x)
        return self.heads(x)

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """Return perceptual distances (N,) as LPIPS does, with every channel weighing the same."""
        pairs = zip(self.embed(images), self.embed(others), strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).mean(0)


@dataclass(frozen=True)
class Window:
    """Some columns of an image, also across the wrap."""

    images: dataset.Images
    index: int
    columns: NDArray[np.intp]

    @property
    def rgb(self) -> NDArray[np.uint8]:
        """The pixels, (H, w, 3) in [0, 255]."""
        return self.images.rgb[self.index][:, self.columns]

    @property
    def attributes(self) -> Mapping[str, object]:
        """The attributes of the image."""
        return self.images.attributes[self.index]


def draw_windows(
    sets: Sequence[dataset.Images], width: int, count: int, generator: torch.Generator
) -> list[Window]:
    """Draw windows of one width from anywhere in the images of several sets of one size."""
    sizes = [len(images.rgb) for images in sets]
    around = sets[0].rgb.shape[2]
    windows = []
    for _ in range(count):
        index, left = draw(sum(sizes), generator), draw(around, generator)
        chosen, number = dataset.locate(sizes, index)
        columns = (left + np.arange(width)) % around
        windows.append(Window(sets[chosen], number, columns))
    return windows


def draw(high: int, generator: torch.Generator) -> int:
    """Draw a number in [0, high)."""
    return int(torch.randint(high, (1,), generator=generator))


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and shade images (N, 3, H, W) in [-1, 1] at random.

    Networks trained on them read the images of an autoencoder too.
    """
    factor = (1, 2, 4)[draw(3, generator)]
    images = F.interpolate(F.avg_pool2d(images, factor), scale_factor=factor, mode="bilinear")
    shape = (len(images), 3, 1, 1)
    gain = 1 + 0.06 * torch.randn(shape, generator=generator)
    return (images * gain + 0.03 * torch.randn(shape, generator=generator)).clamp(-1, 1)


def labels(windows: Sequence[Window], attributes: Attributes) -> dict[str, Tensor]:
    """Return the index (N,) of each attribute's value."""
    return {
        name: torch.tensor([values.index(window.attributes.get(name)) for window in windows])
        for name, values in attributes.items()
    }


def train(
    work: Path,
    model: nn.Module,
    plan: Plan,
    kinds: tuple[str, ...] = ("strips",),
    width: int = 256,
    attributes: Attributes = ATTRIBUTES,
) -> nn.Module:
    """Train a network to read the attributes of windows, mirrored half of the time.

    Args:
        work: the folder of the images.
        model: maps images (N, 3, 256, width) in [-1, 1] to scores (N, values) for each attribute.
        plan: the plan of the training run.
        kinds: the kinds of the images.
        width: the width of the windows, in pixels.
        attributes: the attributes to read.
    """
    sets = [dataset.load(work, kind, "train") for kind in kinds]

    def loss(generator: torch.Generator) -> Tensor:
        windows = draw_windows(sets, width, BATCH, generator)
        images = disturb(to_tensor(np.stack([w.rgb for w in windows])), generator)
        images = images.flip(-1) if draw(2, generator) else images
        answers = labels(windows, attributes)
        with mixed_precision():
            scores = model(images)
        losses = [F.cross_entropy(scores[name].float(), answers[name]) for name in attributes]
        return torch.stack(losses).sum()

    return fit(model, loss, plan, work)


def train_features(work: Path) -> LPIPS:
    """Train the feature network and drop its heads."""
    torch.manual_seed(1)
    guide = train(work, Guide(), FEATURES_PLAN)
    assert isinstance(guide, Guide)
    return guide.lpips


def train_judge(work: Path) -> nn.Module:
    """Train the judge of the first model."""
    torch.manual_seed(2)
    return train(work, Judge(), JUDGE_PLAN)


def train_sphere_judge(work: Path) -> nn.Module:
    """Train the judge of the second model."""
    torch.manual_seed(7)
    judge = Judge(SPHERE_ATTRIBUTES)
    kinds = ("outdoors", "rooms")
    return train(work, judge, SPHERE_JUDGE_PLAN, kinds, width=512, attributes=SPHERE_ATTRIBUTES)


@torch.no_grad()
def read(judge: nn.Module, images: Tensor, attributes: Attributes) -> list[dict[str, object]]:
    """Return the values of attributes that a judge reads in images (N, 3, H, W) in [-1, 1]."""
    scores = judge(images)
    places = {name: scores[name].argmax(1).tolist() for name in attributes}
    return [
        {name: values[places[name][i]] for name, values in attributes.items()}
        for i in range(len(images))
    ]


def accuracy(
    judge: nn.Module, images: dataset.Images, width: int, attributes: Attributes
) -> dict[str, float]:
    """Return the share of held-out windows, cut side by side from every image, that are read right.

    Args:
        judge: reads the attributes.
        images: held-out images.
        width: the width of the windows, in pixels.
        attributes: the attributes asked for; the first two are also counted together.
    """
    both = list(attributes)[:2]
    right: dict[str, list[bool]] = {name: [] for name in (*attributes, " and ".join(both))}
    for image, label in zip(images.rgb, images.attributes, strict=True):
        cut = [image[:, left : left + width] for left in range(0, image.shape[1], width)]
        for seen in read(judge, to_tensor(np.stack(cut)), attributes):
            for name in attributes:
                right[name].append(seen[name] == label[name])
            right[" and ".join(both)].append(all(seen[name] == label[name] for name in both))
    return {name: float(np.mean(values)) for name, values in right.items()}
