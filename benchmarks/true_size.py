"""One sync step of an anchor and another window at Stable Diffusion 2 base's true size."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from benchmarks.activations import Activations, weights_of
from benchmarks.lab import FakeLab, Lab, Run
from benchmarks.plain_loop import StableDiffusion
from benchmarks.stock import published_loop
from panorama.pipeline import Settings
from panorama.sampling.gradient import frozen
from panorama.sampling.presets import EXACT, FAST, Preset
from panorama.sampling.views import Fixed

CPU = torch.device("cpu")


def ways(lab: Lab) -> Mapping[str, Callable[[], Tensor]]:
    """Return the ways to take the step on the networks of a lab."""
    return {
        "published loop": partial(published_loop, step(lab, EXACT)),
        "exact": step(lab, EXACT).denoise,
        "exact, checkpointing": step(lab, EXACT, checkpointing=True).denoise,
        "fast": step(lab, FAST).denoise,
    }


def step(lab: Lab, preset: Preset, **options: bool) -> Run:
    """Return a run of one step: two windows side by side, the gradient of a preset."""
    side = lab.sd2.window * lab.sd2.factor
    settings = Settings(
        prompt="",
        height=side,
        width=2 * side,
        num_inference_steps=1,
        layout=Fixed(lab.sd2.window),
        sync=preset.sync(1),
    )
    return lab.run(lab.sd2, settings, **options)


def activations(dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Return the most bytes of tensors alive at once beside the weights, by the way of the step.

    The step runs on torch's fake tensors. With true ones on a CPU the published loop was within
    1 % of this.
    """
    lab = FakeLab(CPU, dry=False, dtype=dtype)
    return {name: lab.most(lab.sd2, take) for name, take in ways(lab).items()}


def kept_by_unet(dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Return the bytes that the UNet keeps for the gradient of one window.

    Returns:
        By the way it is run: with weights that need no gradient, as published, then inside of
        `frozen`, without and with checkpointing.
    """
    lab = FakeLab(CPU, dry=False, dtype=dtype)
    base, run = lab.sd2, step(lab, EXACT)
    predict = StableDiffusion(base, run.conditioning).predict_noise
    contexts = {
        "published": nullcontext(),
        "frozen": frozen(base.unet),
        "checkpointing": frozen(base.unet, checkpointing=True),
    }
    kept = {}
    for name, context in contexts.items():
        x = run.noise[..., : base.window].clone().requires_grad_()
        with context, Activations(weights_of(base)) as found:
            noise_pred = predict(x, torch.tensor(1))
        kept[name] = found.bytes
        del noise_pred
    return kept
