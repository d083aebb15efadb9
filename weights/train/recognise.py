"""Networks that look at images: the feature network that guides, and the judges that measure.

The feature network, `panorama.sampling.perceptual.LPIPS` with few channels, takes the place of
VGG16 in the tiny family. The judges have another architecture and other seeds.
They never guide; they measure prompt agreement and coherence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panorama.sampling.perceptual import LPIPS, normalize
from weights.train import dataset, rooms, scenes
from weights.train.device import batch_size, device, on_device
from weights.train.fit import Batch, Network, Plan, Work, fit
from weights.train.views import channels_first, to_range
from weights.train.windows import crop, draw_number, draw_numbers, mirror

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
JUDGE_CHANNELS = (24, 40, 64, 96, 128)
FEATURES_PLAN = Plan("features", steps=1000, learning_rate=2e-3, average=0.99, warmup=100)
JUDGE_PLAN = Plan("judge", steps=1500, learning_rate=2e-3, average=0.99, warmup=100)
SPHERE_JUDGE_PLAN = Plan("judge-360", steps=1500, learning_rate=2e-3, average=0.99, warmup=100)
BATCH = 10


class Heads(nn.Module):
    """Scores for every attribute, from features averaged over the image."""

    def __init__(self, channels: int, attributes: Attributes) -> None:
        super().__init__()
        self.attributes = attributes
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


class Blocks(nn.ModuleList):
    """Blocks one after another, from images on."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__(Block(*pair) for pair in pairwise((3, *channels)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features after every block from images (N, 3, H, W) in [-1, 1]."""
        return list(accumulate(self, lambda x, block: block(x), initial=images))[1:]


class Judge(nn.Module):
    """A small residual network that reads a scene's attributes off a window or a sphere."""

    def __init__(self, attributes: Attributes = ATTRIBUTES) -> None:
        super().__init__()
        self.blocks = Blocks(JUDGE_CHANNELS)
        self.heads = Heads(JUDGE_CHANNELS[-1], attributes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Score images (N, 3, H, W) in [-1, 1]."""
        return self.heads(self.blocks(images)[-1])

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """Return perceptual distances (N,) as LPIPS does, with every channel weighing the same."""
        features = (map(normalize, self.blocks(x)) for x in (images, others))
        pairs = zip(*features, strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).mean(0)


WINDOW = 256  # pixels
WIDE = 2 * scenes.HEIGHT // 8  # columns of a sphere that views may begin at
Place = tuple[Tensor, Tensor]
"""The indices (N,) of images of a kind, and the first columns (N,) of views of them."""


@dataclass(frozen=True)
class View:
    """The rows and the size of a view of a sphere. Its first column is drawn."""

    top: int  # the first row
    size: tuple[int, int]  # height and width before it is made smaller
    factor: int  # pixels of either side that are averaged

    def cut(self, maps: Sequence[Tensor], places: Sequence[Place], coarser: int = 1) -> Tensor:
        """Cut views out of maps (M, C, H, W) of several kinds, of a coarser size than spheres."""
        top, height, width = (length // coarser for length in (self.top, *self.size))
        return torch.cat(
            [
                crop(some, index, torch.full_like(left, top), left // coarser, (height, width))
                for some, (index, left) in zip(maps, places, strict=True)
            ]
        )

    def show(self, spheres: Sequence[Tensor], places: Sequence[Place]) -> Tensor:
        """Return views (N, 3, h, w) in [-1, 1] of spheres of several kinds, in [0, 255]."""
        return F.avg_pool2d(to_range(self.cut(spheres, places)), self.factor)


WINDOW_VIEW = View(scenes.STRIP.start, (WINDOW, WINDOW), factor=1)
SPHERE_VIEW = View(0, (scenes.HEIGHT, 2 * scenes.HEIGHT), factor=2)


def draw_places(sets: Sequence[dataset.Images], generator: torch.Generator) -> list[Place]:
    """Draw places in images of several kinds, as many of each, with a generator of the device."""
    count = batch_size(BATCH) // len(sets)
    return [
        (draw_numbers(len(s.rgb), count, generator), 8 * draw_numbers(WIDE, count, generator))
        for s in sets
    ]


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and shade images (N, 3, H, W) in [-1, 1] at random.

    Networks trained on them can also read images that an autoencoder decoded.
    """
    factor = (1, 2, 4)[draw_number(3, generator)]
    images = F.interpolate(F.avg_pool2d(images, factor), scale_factor=factor, mode="bilinear")
    shape = (2, len(images), 3, 1, 1)
    gain, offset = torch.randn(shape, generator=generator).to(images)
    return (images * (1 + 0.06 * gain) + 0.03 * offset).clamp(-1, 1)


def labels(found: Sequence[Mapping[str, object]], attributes: Attributes) -> dict[str, Tensor]:
    """Return the index (N,) of the value of each attribute."""
    return {
        name: torch.tensor([values.index(facts.get(name)) for facts in found]).to(device())
        for name, values in attributes.items()
    }


def train(
    work: Work,
    model: Network,
    plan: Plan,
    kinds: Sequence[str] = ("outdoors",),
    view: View = WINDOW_VIEW,
) -> Network:
    """Train a network to read attributes of views of images, mirrored half of the time.

    It maps views (N, 3, h, w) in [-1, 1] to scores (N, values) for each attribute.
    """
    attributes = model.heads.attributes
    sets = [dataset.load(work.folder, kind, "train") for kind in kinds]
    spheres = [channels_first(images.rgb) for images in sets]
    answers = [torch.stack([*labels(images.attributes, attributes).values()], 1) for images in sets]

    def draw(generator: torch.Generator) -> Batch:
        places = draw_places(sets, on_device(generator))
        images = disturb(view.show(spheres, places), generator)
        asked = [known[index] for known, (index, _) in zip(answers, places, strict=True)]
        return mirror(images, on_device(generator)), *torch.cat(asked).unbind(1)

    def loss(images: Tensor, *asked: Tensor) -> Tensor:
        scores = model(images)
        losses = [
            F.cross_entropy(scores[name].float(), answer)
            for name, answer in zip(attributes, asked, strict=True)
        ]
        return torch.stack(losses).sum()

    return fit(model, draw, loss, plan, work)


def train_features(work: Work) -> LPIPS:
    """Train the feature network and drop its heads."""
    torch.manual_seed(1)
    return train(work, Guide(), FEATURES_PLAN).lpips


def train_judge(work: Work) -> Judge:
    """Train the judge of the first model."""
    torch.manual_seed(2)
    return train(work, Judge(), JUDGE_PLAN)


def train_sphere_judge(work: Work) -> Judge:
    """Train the judge of the second model."""
    torch.manual_seed(7)
    kinds = ("outdoors", "rooms")
    return train(work, Judge(SPHERE_ATTRIBUTES), SPHERE_JUDGE_PLAN, kinds, SPHERE_VIEW)


@torch.no_grad()
def read(judge: Judge, images: Tensor) -> list[dict[str, object]]:
    """Return the attributes that a judge reads in images (N, 3, H, W) in [-1, 1]."""
    places = {name: scores.argmax(1).tolist() for name, scores in judge(images).items()}
    attributes = judge.heads.attributes.items()
    return [{k: values[places[k][i]] for k, values in attributes} for i in range(len(images))]
