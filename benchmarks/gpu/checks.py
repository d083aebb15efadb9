"""Checks of the tiny family's images on a GPU, and of memory that runs out."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.bench import PROMPT
from benchmarks.lab import Figures, Lab
from benchmarks.operations import STRIDE
from panorama import weights
from panorama.base_model import BaseModel, load_base_model
from panorama.images.vae import decode_canvas
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.presets import EXACT, FAST, Preset

ROOT = Path(__file__).parents[2]
SHARES = (0.8, 0.6, 0.4, 0.3, 0.2)
"""Of the memory that an image allocates beside the networks: what it is left with, in turn."""


def ring(
    lab: Lab, preset: Preset, steps: int | None = None, threshold: int | None = None
) -> Settings:
    """Return the settings of a ring of the tiny family."""
    threshold = preset.sync_threshold if threshold is None else threshold
    return Settings(
        prompt=PROMPT,
        height=256,
        width=512 if lab.dry else 1024,
        closed="x",
        guidance_scale=weights.describe("tiny")["syncdiffusion"]["guidance_scale"],
        num_inference_steps=lab.steps(steps or preset.num_inference_steps),
        scheduler=preset.scheduler,
        layout=preset.layout(STRIDE),
        sync=preset.sync(lab.steps(threshold)),
    )


def make(base: BaseModel, settings: Settings, batch_size: int = 8, **options: Any) -> Tensor:
    """Make the image of seed 0, on the CPU, with options of the pipeline."""
    pipeline = Pipeline(base, batch_size=batch_size, **options)
    return pipeline(settings, torch.Generator().manual_seed(0)).cpu()


def levels(one: Tensor, other: Tensor) -> str:
    """Return the mean and the largest difference of two images in [0, 1], in grey levels."""
    apart = (one - other).abs() * 255
    return f"{float(apart.mean()):.3g}, at most {float(apart.max()):.3g}"


def embedded_family(lab: Lab) -> Figures:
    """Compare images of the tiny family: devices, precisions, batches."""
    single = lab.load_tiny(torch.float32)
    rings = {"fast": ring(lab, FAST), "exact, 10 steps": ring(lab, EXACT, 10, 2)}
    expected: dict[str, Tensor] = {}
    for name, settings in rings.items():
        with full_precision():
            expected[name] = make(single, settings)
            yield f"{name}, twice: grey levels", levels(make(single, settings), expected[name])
        on_cpu = make(lab.load_tiny(torch.float32, "cpu"), settings)
        yield f"{name}, CPU: grey levels", levels(on_cpu, expected[name])
        yield f"{name}, TF32: grey levels", levels(make(single, settings), expected[name])
        with full_precision():
            replayed = make(single, settings, cuda_graphs=True)
        yield f"{name}, CUDA graphs: grey levels", levels(replayed, expected[name])
    # A CPU convolves slowly in float16.
    for dtype in (torch.bfloat16,) if lab.dry else (torch.float16, torch.bfloat16):
        base = lab.load_tiny(dtype)
        for name, settings in rings.items():
            apart = levels(make(base, settings), expected[name])
            yield f"{name}, {str(dtype).removeprefix('torch.')}: grey levels", apart
    for size in (4,) if lab.dry else (1, 4):
        with full_precision():
            image = make(single, rings["fast"], size)
        yield f"fast, batches of {size}: grey levels", levels(image, expected["fast"])
    yield "fast, turned by a quarter: grey levels", equivariance(single, rings["fast"])


def full_precision() -> Any:
    """Return a context without TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def equivariance(base: BaseModel, settings: Settings) -> str:
    """Compare decoding a ring with decoding it turned by a quarter."""
    pipeline = Pipeline(base)
    noise = pipeline.noise(settings, torch.Generator().manual_seed(0))
    quarter = noise.shape[-1] // 4
    image = pipeline.decode(settings, noise)
    turned = pipeline.decode(settings, noise.roll(quarter, -1))
    return levels(turned, image.roll(quarter * base.factor, -1))


def out_of_memory(lab: Lab) -> Figures:
    """Let an image run out of memory again and again: what is tried, and what it comes to."""
    base = lab.load_tiny(torch.float32)
    settings = ring(lab, EXACT, 4, 2)
    expected = make(base, settings)
    gc.collect()
    held = lab.allocated()
    if lab.cuda:
        torch.cuda.reset_peak_memory_stats()
    make(base, settings)
    peak = torch.cuda.max_memory_allocated() if lab.cuda else held
    yield "MB beside the networks, without a limit", (peak - held) / 1e6
    for share in SHARES[: lab.steps(len(SHARES))]:
        with limited(lab, int(share * (peak - held))), messages() as found:
            try:
                result = "grey levels: " + levels(make(base, settings), expected)
            except torch.OutOfMemoryError:
                result = "torch.OutOfMemoryError"
        yield f"with {share:.0%} of it", "; ".join([*found, result])


@contextmanager
def limited(lab: Lab, room: int) -> Iterator[None]:
    """Let this process have so many more bytes of the GPU's memory while the block runs.

    The limit counts what the allocator has reserved, which is more than what networks allocate.
    """
    if lab.cuda:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(lab.device).total_memory
        reserved = torch.cuda.memory_reserved(lab.device)
        torch.cuda.set_per_process_memory_fraction((reserved + room) / total)
    try:
        yield
    finally:
        if lab.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()


@contextmanager
def messages() -> Iterator[list[str]]:
    """Collect what the package logs while the block runs."""
    found: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("panorama")
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def failed_step(lab: Lab) -> Figures:
    """Raise an exception in the midst of a gradient: it leaves no memory and no patch."""
    base, settings = lab.load_tiny(torch.float32), ring(lab, EXACT, 4, 2)
    make(base, settings)
    gc.collect()
    before, state = lab.allocated(), attributes(base)
    with patch.object(base.perceptual, "distance", side_effect=RuntimeError("on purpose")):
        try:
            make(base, settings)
        except RuntimeError as error:
            yield "raised", str(error)
    gc.collect()
    yield "bytes left", lab.allocated() - before
    changed = sum(one != other for one, other in zip(state, attributes(base), strict=True))
    yield "modules changed", changed


def attributes(base: BaseModel) -> list[Any]:
    """Return what a run could change in each module: the names of its attributes, its switches."""
    return [
        (
            sorted(vars(module)),
            getattr(module, "gradient_checkpointing", False),
            [parameter.requires_grad for parameter in module.parameters(recurse=False)],
        )
        for network in base.networks()
        for module in network.modules()
    ]


def many_images(lab: Lab) -> Figures:
    """Make many images in a row: allocated memory stays flat."""
    base, settings = lab.load_tiny(torch.float32 if lab.dry else lab.dtype), ring(lab, EXACT, 2, 1)
    count = 2 if lab.dry else 50
    found = []
    started = perf_counter()
    for _ in range(count):
        make(base, settings)
        found.append(lab.allocated())
    yield "images", count
    yield "seconds an image of 2 steps", (perf_counter() - started) / count
    yield "bytes allocated after the last beside the first", found[-1] - found[0]


def decoding(lab: Lab) -> Figures:
    """Measure decoding of canvases."""
    base, window = lab.sd2, lab.sd2.window
    for windows in (4, 16):
        latents = torch.randn(1, 4, window, windows * window, device=lab.device)
        decode_canvas(base.vae, latents)
        cost = lab.measure(base, partial(decode_canvas, base.vae, latents))
        side = window * base.factor
        yield f"{windows * side} x {side}: seconds", cost.seconds
        yield f"{windows * side} x {side}: GB", cost.gigabytes


def loading(lab: Lab) -> Figures:
    """Measure loading Stable Diffusion 2 from files that are in the page cache."""
    with TemporaryDirectory() as folder:
        parts = save(lab.sd2, Path(folder))
        for name in ("first", "second"):
            started = perf_counter()
            load_base_model(parts, lab.dtype).to(lab.device)
            lab.synchronize()
            yield f"{name} time: seconds", perf_counter() - started
        yield "GB of files", sum(f.stat().st_size for f in Path(folder).rglob("*.*")) / 1e9


def save(base: BaseModel, folder: Path) -> dict[str, Path]:
    """Write a base model; return its components."""
    networks = {"unet": base.unet, "vae": base.vae, "text_encoder": base.text_encoders[0].model}
    for name, part in {**networks, "scheduler": base.scheduler}.items():
        part.save_pretrained(folder / name)
    base.perceptual.save_pretrained(folder / "perceptual")
    parts = {path.name: path for path in folder.iterdir()}
    return parts | {"tokenizer": ROOT / "weights" / "tiny" / "sd2" / "tokenizer"}
