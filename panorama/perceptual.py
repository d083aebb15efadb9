"""LPIPS: a perceptual distance between images, whose fixed side is computed once."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class LPIPS(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Learned Perceptual Image Patch Similarity (arXiv 1801.03924, equation 1) on a VGG.

    The features of five stages, normalised over channels, are compared cell by cell; a head per
    stage weighs the channels. With the default channels and its published weights this is LPIPS
    v0.1 on VGG16; the embedded family has the same network with fewer channels.

    Args:
        channels: output channels of every convolution, a tuple for each stage; a stage ends in
            the features that are compared, and a 2 x 2 max-pooling leads to the next one.
        shift: of the images' three channels.
        scale: of the images' three channels; the network sees (image - shift) / scale.
        distance_scale: factor of the distance, 1 for LPIPS itself. For another network, chosen so
            that the same sync_weight is as strong as it is for LPIPS.
    """

    config_name = "config.json"
    # Half precision has no epsilon small enough for `unit`.
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

    def embed(self, images: Tensor) -> list[Tensor]:
        """The features that are compared.

        Args:
            images: (N, 3, H, W) in [-1, 1], at least 16 x 16 for five stages.

        Returns:
            For each stage (N, C, h, w), of unit length over C.
        """
        return [unit(x) for x in self.see(images)]

    def see(self, images: Tensor) -> Iterator[Tensor]:
        """What each stage makes of images (N, 3, H, W) in [-1, 1]: (N, C, h, w)."""
        shift, scale = (
            torch.tensor(values, device=images.device).view(1, 3, 1, 1)
            for values in (self.config.shift, self.config.scale)
        )
        x = (images - shift) / scale  # (N, 3, H, W)
        for stage in self.stages:
            x = stage(x)
            yield x

    def distance(self, images: Tensor, features: Sequence[Tensor]) -> Tensor:
        """How different images look from those that were embedded.

        Args:
            images: (N, 3, H, W) in [-1, 1].
            features: what `embed` gave for as many images, or for one that all are compared to.

        Returns:
            (N,) distances, zero for equal images.
        """
        total = torch.zeros(len(images), device=images.device, dtype=images.dtype)
        for x, theirs, head in zip(self.see(images), features, self.heads, strict=True):
            # For its gradient only x is kept, which its stage keeps anyway.
            total = total + checkpoint(
                unlikeness, x, theirs, head, use_reentrant=False, preserve_rng_state=False
            )
        distance: Tensor = self.config.distance_scale * total
        return distance

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """The distance (N,) of images (N, 3, H, W) to others, both in [-1, 1]."""
        return self.distance(images, self.embed(others))


def unlikeness(x: Tensor, theirs: Tensor, head: Tensor) -> Tensor:
    """How different x (N, C, h, w), scaled to unit length, is from theirs: (N,).

    Args:
        x: what a stage made of images.
        theirs: (N, C, h, w) or (1, C, h, w), of unit length.
        head: the weight of each channel (C,).
    """
    mine = unit(x)
    squares = mse_loss(mine, theirs.expand_as(mine), reduction="none")  # (N, C, h, w)
    return (squares * head.view(1, -1, 1, 1)).sum(1).mean((1, 2))


def unit(features: Tensor) -> Tensor:
    """Features (N, C, H, W) scaled to length 1 over C, with the epsilon of the lpips package."""
    # Unlike sqrt(sum(squares)), this norm has a gradient of 0 where all features are 0.
    length: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (length + 1e-10)


def save_lpips(vgg16: Path, heads: Path, path: Path) -> None:
    """Writes LPIPS with the published weights, as its `from_pretrained` reads them.

    Args:
        vgg16: the weights of torchvision's VGG16, a pickle of tensors; no other is opened.
        heads: safetensors with the weights (C,) of the five heads, `lin0` to `lin4`.
        path: of the safetensors that are written.
    """
    weights = torch.load(vgg16, map_location="cpu", weights_only=True)
    features = [weight for name, weight in weights.items() if name.startswith("features.")]
    model = LPIPS()
    names = model.stages.state_dict(prefix="stages.")
    state = dict(zip(names, features, strict=True))
    published = load_file(heads)
    state |= {f"heads.{k}": published[f"lin{k}"] for k in range(len(VGG16))}
    model.load_state_dict(state)
    save_file(model.state_dict(), path, metadata={"format": "pt"})
