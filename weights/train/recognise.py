"""Networks that look at pictures: the feature network that guides, and the judges that measure.

The feature network (`panorama.perceptual.LPIPS` with few channels) takes the place of VGG16 in
the embedded family. The judge has another architecture, other crops and another seed; it never
guides, and measures prompt agreement and coherence.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panorama.perceptual import LPIPS, unit
from weights.train import dataset, scenes
from weights.train.autoencoder import to_tensor
from weights.train.fit import Plan, fit

ATTRIBUTES: Mapping[str, tuple[object, ...]] = {
    "time": tuple(scenes.SKIES),
    "land": tuple(scenes.LANDS),
    "trees": (False, True),
    "clouds": (False, True),
}
FEATURE_CHANNELS = ((8,), (16, 16), (32, 32), (64, 64), (96, 96))
FEATURES_PLAN = Plan("features", steps=800, learning_rate=2e-3, average=0.99, warmup=100)
JUDGE_PLAN = Plan("judge", steps=1000, learning_rate=2e-3, average=0.99, warmup=100)
BATCH = 10


class Heads(nn.Module):
    """Scores for every attribute, from features averaged over the picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.scores = nn.ModuleDict({k: nn.Linear(channels, len(v)) for k, v in ATTRIBUTES.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """(N, C, h, w) to (N, values) for each attribute."""
        mean = self.norm(features.mean((2, 3)))
        return {name: head(mean) for name, head in self.scores.items()}


class Guide(nn.Module):
    """The feature network with the heads that it is trained through."""

    def __init__(self) -> None:
        super().__init__()
        self.lpips = LPIPS(channels=FEATURE_CHANNELS, shift=(0, 0, 0), scale=(0.5, 0.5, 0.5))
        self.heads = Heads(FEATURE_CHANNELS[-1][-1])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) in [-1, 1] to scores."""
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
        """(N, C, H, W) to (N, C', H / 2, W / 2)."""
        x = self.down(x)
        return x + self.second(F.gelu(self.first(F.gelu(self.norm(x)))))


class Judge(nn.Module):
    """A small residual network that reads a scene's attributes off a window."""

    def __init__(self, channels: Sequence[int] = (24, 40, 64, 96, 128)) -> None:
        super().__init__()
        pairs = zip((3, *channels[:-1]), channels, strict=True)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in pairs)
        self.heads = Heads(channels[-1])

    def embed(self, images: Tensor) -> list[Tensor]:
        """Features after every block, of unit length over channels."""
        features = []
        x = images
        for block in self.blocks:
            x = block(x)
            features.append(unit(x))
        return features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) in [-1, 1] to scores."""
        x = images
        for block in self.blocks:
            x = block(x)
        return self.heads(x)

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """A perceptual distance (N,) in the manner of LPIPS, every channel weighing the same."""
        pairs = zip(self.embed(images), self.embed(others), strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).mean(0)


def windows(
    pictures: dataset.Pictures, count: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Random square windows of strips, (count, 3, 256, 256) in [-1, 1], and what they show.

    They are blurred, shaded and mirrored at random, so that what is learned holds for pictures
    that come out of an autoencoder too.
    """

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    images, labels = [], []
    for _ in range(count):
        index, left = draw(len(pictures.rgb)), draw(pictures.rgb.shape[2])
        columns = (left + np.arange(pictures.rgb.shape[1])) % pictures.rgb.shape[2]
        images.append(pictures.rgb[index][:, columns])
        labels.append(pictures.attributes[index])
    batch = to_tensor(np.stack(images))
    factor = (1, 2, 4)[draw(3)]
    batch = F.interpolate(F.avg_pool2d(batch, factor), scale_factor=factor, mode="bilinear")
    gain = 1 + 0.06 * torch.randn(count, 3, 1, 1, generator=generator)
    batch = (batch * gain + 0.03 * torch.randn(count, 3, 1, 1, generator=generator)).clamp(-1, 1)
    batch = batch.flip(-1) if draw(2) else batch
    answers = {
        name: torch.tensor([values.index(label[name]) for label in labels])
        for name, values in ATTRIBUTES.items()
    }
    return batch, answers


def train(work: Path, model: nn.Module, plan: Plan) -> nn.Module:
    """Trains a network to read the attributes of windows."""
    pictures = dataset.load(work, "strips", "train")

    def loss(generator: torch.Generator) -> Tensor:
        images, answers = windows(pictures, BATCH, generator)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(images)
        losses = [F.cross_entropy(scores[name].float(), answers[name]) for name in ATTRIBUTES]
        return torch.stack(losses).sum()

    return fit(model, loss, plan, work)


def train_features(work: Path) -> LPIPS:
    """Trains the feature network and drops its heads."""
    torch.manual_seed(1)
    guide = train(work, Guide(), FEATURES_PLAN)
    assert isinstance(guide, Guide)
    return guide.lpips


def train_judge(work: Path) -> nn.Module:
    """Trains the judge of the first family."""
    torch.manual_seed(2)
    return train(work, Judge(), JUDGE_PLAN)


@torch.no_grad()
def accuracy(judge: nn.Module, pictures: dataset.Pictures) -> dict[str, float]:
    """Share of windows, four from each held-out strip, whose attributes are read right."""
    right: dict[str, list[float]] = {name: [] for name in (*ATTRIBUTES, "time and land")}
    for picture, label in zip(pictures.rgb, pictures.attributes, strict=True):
        height = picture.shape[0]
        cut = [picture[:, left : left + height] for left in range(0, picture.shape[1], height)]
        scores = judge(to_tensor(np.stack(cut)))
        hits = {
            name: scores[name].argmax(1) == values.index(label[name])
            for name, values in ATTRIBUTES.items()
        }
        hits["time and land"] = hits["time"] & hits["land"]
        for name, hit in hits.items():
            right[name].append(float(hit.float().mean()))
    return {name: float(np.mean(values)) for name, values in right.items()}
