"""LPIPS: a perceptual distance between images that computes its fixed side once."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
HEADS = Path(__file__).with_name("lpips_vgg_heads.safetensors")
"""The published weights (C,) of the five heads, `lin0` to `lin4`."""


class LPIPS(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Learned Perceptual Image Patch Similarity (arXiv 1801.03924, equation 1) on a VGG.

    The features of five stages, normalised over channels, are compared cell by cell; a head per
    stage weighs the channels. With the default channels and its published weights this is LPIPS
    v0.1 on VGG16; the tiny family has the same network with fewer channels.

    Args:
        channels: output channels of every convolution, a tuple for each stage; a stage ends in
            the features that are compared, and a 2 x 2 max-pooling leads to the next one.
        shift: of the images' three channels.
        scale: of the images' three channels; the network sees (image - shift) / scale.
        distance_scale: factor of the distance, 1 for LPIPS itself. For another network, chosen so
            that the same sync_weight is as strong as it is for LPIPS.
    """

    config_name = "config.json"
    # Half precision has no epsilon small enough for `normalize`.
    _keep_in_fp32_modules = ["stages", "heads"]  # noqa: RUF012  diffusers wants a list

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        channels: Sequence[Sequence[int]] = VGG16,
        shift: Sequence[float] = (-0.030, -0.088, -0.188),
        scale: Sequence[float] = (0.458, 0.448, 0.450),
        distance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        previous = 3
        for index, widths in enumerate(channels):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if index else []
            for width in widths:
                layers += [nn.Conv2d(previous, width, 3, padding=1), nn.ReLU(inplace=True)]
                previous = width
            self.stages.append(nn.Sequential(*layers))
        self.heads = nn.ParameterList(nn.Parameter(torch.ones(w[-1]) / w[-1]) for w in channels)

    @classmethod
    def from_vgg16(cls, path: Path) -> "LPIPS":
        """Make LPIPS v0.1 of torchvision's VGG16, a pickle that holds nothing but tensors."""
        weights = torch.load(path, map_location="cpu", weights_only=True)
        features = [weight for name, weight in weights.items() if name.startswith("features.")]
        model: LPIPS = cls()
        heads = load_file(HEADS)
        state = dict(zip(model.stages.state_dict(prefix="stages."), features, strict=True))
        state |= {f"heads.{k}": heads[f"lin{k}"] for k in range(len(VGG16))}
        model.load_state_dict(state)
        model.eval()
        return model

    def embed(self, images: Tensor) -> list[Tensor]:
        """Return the features that are compared.

        Args:
            images: (N, 3, H, W) in [-1, 1], at least 16 x 16 for five stages.

        Returns:
            For each stage (N, C, h, w), of unit length over C.
        """
        return [normalize(x) for x in self.stage_features(images)]

    def stage_features(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the output (N, C, h, w) of each stage for images (N, 3, H, W) in [-1, 1]."""
        shift, scale = (
            torch.tensor(values).view(1, 3, 1, 1).to(images.device, non_blocking=True)
            for values in (self.config.shift, self.config.scale)
        )
        x = (images - shift) / scale  # (N, 3, H, W)
        for stage in self.stages:
            x = stage(x)
            yield x

    def distance(self, images: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Return the perceptual distances of images from embedded ones.

        Args:
            images: (N, 3, H, W) in [-1, 1].
            features: from `embed`, of as many images, or of one that all are compared with.

        Returns:
            (N,) distances, zero for equal images.
        """
        total = torch.zeros(len(images), device=images.device, dtype=images.dtype)
        for x, theirs, head in zip(self.stage_features(images), features, self.heads, strict=True):
            # Keeps only x for the gradient, which its stage keeps anyway.
            total = total + checkpoint(
                stage_distance, x, theirs, head, use_reentrant=False, preserve_rng_state=False
            )
        distance: Tensor = self.config.distance_scale * total
        return distance

    def mean_distance(self, images: Iterable[Tensor]) -> float:
        """Return the mean distance of all pairs of images, without a gradient.

        Every image passes through the network once, since a distance is a weighted sum of squares:
        over all pairs of n vectors, the mean of |a - b|^2 is twice their variance. One image at a
        time is in memory.

        Args:
            images: at least two of one size, each (1, 3, H, W) in [-1, 1].
        """
        totals: Sequence[Any] = [0] * len(self.heads)
        squares = []
        with torch.no_grad():
            for image in images:
                features = self.embed(image)  # (1, C, h, w) for each stage
                squares.append(self._weigh(features))
                totals = [total + x for total, x in zip(totals, features, strict=True)]
            count = len(squares)
            variance = (sum(squares) - self._weigh(totals) / count) / (count - 1)
        return float(self.config.distance_scale * 2 * max(variance, 0.0))

    def _weigh(self, features: Sequence[Tensor]) -> float:
        """Return the squares of features (1, C, h, w) of every stage as a distance adds them."""
        stages = zip(features, self.heads, strict=True)
        return sum(float((x.square() * head.view(1, -1, 1, 1)).sum(1).mean()) for x, head in stages)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the distances (N,) of images (N, 3, H, W) from others, both in [-1, 1]."""
        return self.distance(images, self.embed(others))


def stage_distance(x: Tensor, theirs: Tensor, head: Tensor) -> Tensor:
    """Return the distances (N,) between the features of a stage.

    Args:
        x: output of the stage, (N, C, h, w).
        theirs: normalised features, (N, C, h, w) or (1, C, h, w).
        head: weight of each channel, (C,).
    """
    mine = normalize(x)
    squares = mse_loss(mine, theirs.expand_as(mine), reduction="none")  # (N, C, h, w)
    return (squares * head.view(1, -1, 1, 1)).sum(1).mean((1, 2))


def normalize(features: Tensor) -> Tensor:
    """Scale features (N, C, H, W) to length 1 over C, with the epsilon of the lpips package."""
    # Unlike sqrt(sum(squares)), this norm has a gradient of 0 where all features are 0.
    length: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (length + 1e-10)
