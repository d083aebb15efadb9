"""Changes that may make a panorama faster, each tried alone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.lab import Figures, Lab, strip
from panorama.base_model import BaseModel
from panorama.sampling.graphs import record
from panorama.sampling.operations import TOKENS
from panorama.sampling.presets import EXACT, FAST

WHOLE = 50  # steps of exact


def variant(lab: Lab, base: BaseModel, name: str, **options: Any) -> Figures:
    """Measure fast, steps without synchronising, and steps with a gradient, as whole images.

    Of the last two, a few steps are measured. CUDA graphs are recorded in them, so images of all
    steps would take less time than is reported.
    """
    runs = {
        "fast": (strip(lab, base, FAST, **options), FAST.num_inference_steps),
        "no sync": (strip(lab, base, EXACT, steps=5, weight=0, **options), WHOLE),
        "gradient": (strip(lab, base, EXACT, steps=2, threshold=2, **options), WHOLE),
    }
    for kind, (run, whole) in runs.items():
        replace(run, settings=replace(run.settings, num_inference_steps=1)).denoise()
        cost = lab.measure(base, run.denoise)
        seconds = cost.of(run.settings.num_inference_steps, whole)
        yield f"{name}: {kind}: seconds of {whole} steps", seconds


def batches(lab: Lab) -> Figures:
    """Try sizes of batches."""
    for size in (8,) if lab.dry else (8, 16, 32, 4):
        yield from variant(lab, lab.sd2, f"batches of {size}", batch_size=size)


def graphs(lab: Lab) -> Figures:
    """Compare calls of the UNet with replays of a CUDA graph, which launches kernels at once."""
    for count in (1, 2, 5, 8):
        call, x = unet_call(lab, count)
        yield f"{count} windows: seconds of a call", repeated(lab, partial(call, x))
        if lab.cuda:
            graph = record(call, (x,)).graph
            yield f"{count} windows: seconds of a replay", repeated(lab, graph.replay)


def unet_call(lab: Lab, count: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a call of the UNet for some windows with guidance, and their latents."""
    unet, side = lab.sd2.unet, lab.sd2.window
    normal = partial(torch.randn, device=lab.device, dtype=unet.dtype)
    states = normal(2 * count, TOKENS, unet.config.cross_attention_dim)
    t = torch.tensor(500, device=lab.device)

    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        (output,) = unet(x, t, states, return_dict=False)
        prediction: Tensor = output
        return prediction

    return call, normal(2 * count, 4, side, side)


def repeated(lab: Lab, call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes, one after the other."""
    times = lab.steps(10)

    def calls() -> None:
        for _ in range(times):
            call()

    calls()
    return lab.measure(lab.sd2, calls).of(times, 1)


@contextmanager
def fused_projections(base: BaseModel) -> Iterator[None]:
    """Project to queries, keys and values in one product."""
    base.unet.fuse_qkv_projections()
    try:
        yield
    finally:
        base.unet.unfuse_qkv_projections()


def attention(*backends: SDPBackend) -> AbstractContextManager[None]:
    """Allow some kernels of attention, and the plain one where they do not fit."""
    context: AbstractContextManager[None] = sdpa_kernel([*backends, SDPBackend.MATH])
    return context


LEVERS: Mapping[str, Callable[[BaseModel], AbstractContextManager[Any]]] = {
    "cudnn.benchmark": lambda _: torch.backends.cudnn.flags(
        enabled=True, benchmark=True, allow_tf32=True
    ),
    "fused projections": fused_projections,
    "flash attention": lambda _: attention(SDPBackend.FLASH_ATTENTION),
    "cuDNN's attention": lambda _: attention(SDPBackend.CUDNN_ATTENTION),
    "efficient attention": lambda _: attention(SDPBackend.EFFICIENT_ATTENTION),
    "without TF32": lambda _: torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
}
"""Contexts of runs on a base model."""


def levers(lab: Lab) -> Figures:
    """Try CUDA graphs, bfloat16, and each lever."""
    for name, graphs in {"as it is": False, "CUDA graphs": True}.items():
        yield from variant(lab, lab.sd2, name, cuda_graphs=graphs)
    yield from variant(lab, lab.build_sd2(torch.bfloat16), "bfloat16")
    for name, lever in LEVERS.items():
        with lever(lab.sd2):
            yield from variant(lab, lab.sd2, name)


def compiled(lab: Lab) -> Figures:
    """Compile the UNet's blocks; the first run takes the time of compiling."""
    base = lab.build_sd2(lab.dtype)
    base.unet.compile_repeated_blocks(backend="eager" if lab.dry else "inductor")
    run = strip(lab, base, FAST)
    yield "fast, first: seconds", lab.measure(base, run.denoise, repeats=1).seconds
    yield from variant(lab, base, "compiled")
