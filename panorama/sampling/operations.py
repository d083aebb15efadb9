"""The operations of denoising a canvas, counted before it is denoised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from panorama.sampling.canvas import View
from panorama.sampling.gradient import frozen
from panorama.sampling.sampler import sync_steps
from panorama.sampling.synchronize import SyncSettings

TOKENS = 77  # of a prompt with the start and end tokens, padded


@dataclass(frozen=True)
class Work:
    """The windows that pass through networks while a canvas is denoised."""

    windows: int  # whose noise is predicted
    gradients: int  # moved by the gradient: through UNet, decoder and LPIPS, and back
    anchors: int  # decoded and embedded without a gradient


def count_work(
    views_per_step: Sequence[Sequence[View]], sync: SyncSettings | None = None, parts: int = 1
) -> Work:
    """Count the windows of `sample` with the views of each step; see `Synchronizer`."""
    synced = zip(views_per_step, sync_steps(sync, parts, views_per_step), strict=True)
    moved = [len(views) - parts for views, step in synced if step and step.gradient]
    return Work(sum(map(len, views_per_step)), sum(moved), parts * len(moved))


@dataclass(frozen=True)
class Prices:
    """The cost of networks, in guided evaluations of the UNet for one window."""

    preview: float  # of decoding a window and embedding its image
    attention: float  # share of an evaluation that grows with the square of a view's area

    def cost(self, work: Work, area: float = 1, *, guided: bool = True) -> float:
        """Return the cost of denoising through views of an area in windows.

        Going back through a network to its input costs as much as going through it.
        """
        evaluation = area * (1 + self.attention * (area - 1)) * (1 if guided else 0.5)
        through = evaluation * work.windows + self.preview * work.anchors
        return through + 2 * (evaluation + self.preview) * work.gradients


def count_prices(unet: Any, vae: Any, perceptual: Any = None) -> Prices:
    """Count the operations of the networks, on copies without weights (torch's meta device)."""
    with torch.device("meta"):
        unet, vae, perceptual = (
            network and type(network).from_config(network.config)
            for network in (unet, vae, perceptual)
        )
        window = torch.empty(1, unet.config.in_channels, *[unet.config.sample_size] * 2)
        two = window.repeat(1, 1, 1, 2)
        evaluation, wide = (count_operations(unet, partial(guided, unet), x) for x in (window, two))
        image = vae.decode(window).sample
        preview = count_operations(vae, lambda x: vae.decode(x).sample, window)
        if perceptual:
            preview += count_operations(perceptual, lambda x: perceptual.embed(x)[0], image)
    return Prices(preview / evaluation, max(wide / evaluation - 2, 0) / 2)


def guided(unet: Any, x: Tensor) -> Tensor:
    """Run both halves of a guided evaluation of a UNet for windows (N, C, h, w)."""
    config, count = unet.config, 2 * len(x)
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.empty(count, pooled), "time_ids": torch.empty(count, 6)}
    noise: Tensor = unet(
        x.repeat(2, 1, 1, 1),
        torch.tensor(0),
        encoder_hidden_states=torch.empty(count, TOKENS, config.cross_attention_dim),
        added_cond_kwargs=added,
    ).sample
    return noise


def count_operations(
    network: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, *, gradient: bool = False
) -> int:
    """Count the operations of run(x), with `gradient` those of its backward pass too.

    A multiply-add counts as two operations.
    """
    with (
        FlopCounterMode(display=False) as counter,
        frozen(network),
        torch.set_grad_enabled(gradient),
    ):
        if gradient:
            run(x.requires_grad_()).sum().backward()  # type: ignore[no-untyped-call]
        else:
            run(x)
    return int(counter.get_total_flops())
