"""Seconds and memory of a panorama, beside the published loop and diffusers' pipelines."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from diffusers import (
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.lab import Cost, Figures, Lab, Run, strip, time_inside
from benchmarks.operations import PUBLISHED_LOOP
from benchmarks.stock import panorama_call, published_loop
from panorama.base_model import BaseModel
from panorama.conditioning.lora import Change, Lora
from panorama.images.vae import decode
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.operations import count_operations, guided
from panorama.sampling.presets import EXACT, FAST, WHOLE
from panorama.sampling.sampler import BATCH_SIZE
from panorama.sampling.views import Feathered

STEPS = 50  # of the published loop
BRIEF = 10  # steps of 50 where none is a sync step
RANK = 32  # of a LoRA


def against_published(lab: Lab) -> Figures:
    """Compare both presets with the published loop, from noise to the image."""
    base = lab.build_sd2(torch.float32)
    sync_step, plain_step, decoding = yield from published_steps(lab, base)
    theirs = {
        threshold: threshold * sync_step + (STEPS - threshold) * plain_step + decoding
        for threshold in (EXACT.sync_threshold, STEPS)
    }
    del base
    for threshold, seconds in theirs.items():
        yield f"published loop, sync_threshold {threshold}: seconds, extrapolated", seconds
    published = theirs[EXACT.sync_threshold]
    for name, preset in {"fast": FAST, "exact": EXACT}.items():
        strip(lab, lab.sd2, preset, steps=2, threshold=1).image()
        cost = lab.measure(lab.sd2, strip(lab, lab.sd2, preset).image)
        yield f"{name}: seconds", cost.seconds
        yield f"{name}: GB", cost.gigabytes
        yield f"{name}: times as fast as the published loop", published / cost.seconds
    part = lab.steps(4)
    cost = lab.measure(lab.sd2, strip(lab, lab.sd2, EXACT, steps=part, threshold=part).denoise, 1)
    seconds = cost.of(part, STEPS)
    yield f"exact, sync_threshold {STEPS}: seconds, extrapolated", seconds
    yield f"exact, sync_threshold {STEPS}: times as fast", theirs[STEPS] / seconds


def published_steps(
    lab: Lab, base: BaseModel
) -> Generator[tuple[str, float], None, tuple[float, float, float]]:
    """Measure the published loop: yield figures, return seconds of both steps and of decoding."""

    def loop(run: Run) -> Tensor:
        with torch.autocast(lab.device.type, dtype=lab.dtype):
            return published_loop(run)

    def measured(steps: int, threshold: int) -> Cost:
        run = strip(lab, base, PUBLISHED_LOOP, steps=steps, threshold=threshold)
        return lab.measure(base, partial(loop, run))

    @torch.no_grad()
    def decoded(latents: Tensor) -> Tensor:
        with torch.autocast(lab.device.type, dtype=lab.dtype):
            return decode(base.vae, latents)

    decoded(loop(strip(lab, base, PUBLISHED_LOOP, steps=1, threshold=1)))
    synced = measured(2, 2)
    yield "published loop: seconds of a sync step", synced.of(2, 1)
    yield "published loop: GB", synced.gigabytes
    plain = measured(4, 0)
    yield "published loop: seconds of another step", plain.of(4, 1)
    decoding = lab.measure(base, partial(decoded, plain.result))
    yield "published loop: seconds of decoding", decoding.seconds
    return synced.of(2, 1), plain.of(4, 1), decoding.seconds


def against_diffusers(lab: Lab) -> Figures:
    """Compare denoising without synchronising with diffusers' pipeline, on the same windows."""
    run = strip(lab, lab.sd2, PUBLISHED_LOOP, steps=BRIEF, weight=0)
    part = run.settings.num_inference_steps
    calls = {
        "no sync": run.denoise,
        "diffusers": panorama_call(run, run.pipeline.windows_at_once),
        "diffusers, one window at a time": panorama_call(run, 1),  # its default
    }
    calls["no sync, moving windows"] = strip(lab, lab.sd2, EXACT, steps=BRIEF, weight=0).denoise
    seconds, rounds = {}, lab.compare(lab.sd2, calls)
    for name in calls:
        cost = rounds.cost(name)
        seconds[name] = cost.of(part, STEPS)
        yield f"{name}: seconds, extrapolated", seconds[name]
        yield f"{name}: GB", cost.gigabytes
    yield "no sync: times as fast as diffusers", seconds["diffusers"] / seconds["no sync"]


def memory(lab: Lab) -> Figures:
    """Measure the peak memory of images in the batches of a small GPU, with their networks."""
    small = {"batch_size": BATCH_SIZE}
    for name, preset, options in (
        ("exact, checkpointing", EXACT, small | {"checkpointing": True}),
        ("exact", EXACT, small),
        ("fast", FAST, small),
    ):
        run = strip(lab, lab.sd2, preset, steps=2, threshold=1, **options)
        yield f"{name}: GB", lab.measure(lab.sd2, run.image, repeats=1).gigabytes


def share_of_peak(lab: Lab) -> Figures:
    """Compare the UNet's operations a second in fast with the card's largest matrix product."""
    run = strip(lab, lab.sd2, FAST)
    run.denoise()
    seconds, inside = time_inside(lab, run.pipeline.base, run.denoise)
    canvas, steps = run.pipeline.canvas(run.settings), run.settings.num_inference_steps
    windows = sum(map(len, run.settings.layout(canvas, lab.sd2.window, steps)))
    done = windows * guided_operations(lab.sd2) / 1e12
    rate = done / inside["UNet"]
    yield "UNet in fast: operations, 10^12", done
    yield "UNet in fast: seconds", inside["UNet"]
    yield "UNet in fast: operations a second, 10^12", rate
    largest = matrix_product(lab)
    yield "matrix product: operations a second, 10^12", largest
    yield "UNet in fast: share of the matrix product", rate / largest
    yield "all of fast's denoising: share of the matrix product", done / seconds / largest
    if nominal := nominal_rate(lab):
        yield "card's data sheet: operations a second, 10^12", nominal
        yield "UNet in fast: share of the data sheet", rate / nominal
        yield "all of fast's denoising: share of the data sheet", done / seconds / nominal


NOMINAL: Mapping[str, float] = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121}
"""Dense operations a second in half precision by data sheets, in units of 10^12."""


def nominal_rate(lab: Lab) -> float | None:
    """Return the rate of the card's data sheet, if it is known."""
    name = torch.cuda.get_device_name() if lab.cuda else ""
    return next((rate for card, rate in NOMINAL.items() if card in name), None)


def matrix_product(lab: Lab) -> float:
    """Return the operations a second, in units of 10^12, of a product of large random matrices."""
    side, repeats = (64, 1) if lab.dry else (8192, 10)
    one, other = torch.randn(2, side, side, device=lab.device, dtype=lab.dtype)
    for _ in range(repeats):
        one @ other
    lab.synchronize()
    started = perf_counter()
    for _ in range(repeats):
        one @ other
    lab.synchronize()
    return repeats * 2 * side**3 / (perf_counter() - started) / 1e12


def guided_operations(base: BaseModel) -> int:
    """Count the operations of the UNet for one window with guidance, on tensors without values."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(base.unet.config)
        x = torch.empty(1, unet.config.in_channels, base.window, base.window)
        return count_operations(unet, partial(guided, unet), x)


def outside(lab: Lab) -> Figures:
    """Measure the share of denoising outside the networks, and where it waits for the GPU."""
    for name, run in {
        "fast": strip(lab, lab.sd2, FAST),
        "exact, a sync step in ten": strip(lab, lab.sd2, EXACT, steps=10, threshold=1),
    }.items():
        run.denoise()
        seconds, inside = time_inside(lab, run.pipeline.base, run.denoise)
        yield f"{name}: seconds", seconds
        for part, within in inside.items():
            yield f"{name}: seconds in {part}", within
        yield f"{name}: share outside the networks", 1 - sum(inside.values()) / seconds
        places = waits(lab, run)
        yield f"{name}: waits for the GPU", places.total()
        for place, count in places.most_common(3):
            yield f"{name}: waits at {place}", count


def waits(lab: Lab, run: Run) -> Counter[str]:
    """Count where the processor waits for the GPU in denoising; nowhere on CPUs."""
    if not lab.cuda:
        return Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run.denoise()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchroniz" in str(w.message)]
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found)


def top_ten(lab: Lab) -> Figures:
    """List the operations that take the most time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if lab.cuda else [])]
    field = "self_device_time_total" if lab.cuda else "self_cpu_time_total"
    for name, run in {
        "fast": strip(lab, lab.sd2, FAST, steps=4),
        "exact, a sync step in four": strip(lab, lab.sd2, EXACT, steps=4, threshold=1),
    }.items():
        run.denoise()
        with profile(activities=activities) as profiler:
            run.denoise()
            lab.synchronize()
        events = [e for e in profiler.key_averages() if e.device_type.name == "CPU"]
        total = sum(getattr(event, field) for event in events) or 1
        for event in sorted(events, key=lambda e: -getattr(e, field))[:10]:
            share = getattr(event, field) / total
            yield f"{name}: {event.key}, {event.count} calls: share", share


def whole_canvas(lab: Lab) -> Figures:
    """Compare sdxl-360 with the stock pipelines, whose convolutions do not wrap."""
    base = lab.sdxl
    settings = replace(sphere_settings(lab), num_inference_steps=lab.steps(30))
    size = settings.height, settings.width
    depth = torch.rand(size, generator=torch.Generator().manual_seed(0))
    kinds = {
        "text": (settings, StableDiffusionXLPipeline),
        "depth": (replace(settings, depth=depth), StableDiffusionXLControlNetPipeline),
    }
    for name, (chosen, kind) in kinds.items():
        run, graphs = (Run(Pipeline(base, cuda_graphs=g), chosen) for g in (False, True))
        calls = {
            "ours": run.denoise,
            "ours, CUDA graphs": graphs.denoise,
            "stock": stock_call(kind, run),
        }
        seconds, rounds = {}, lab.compare(base, calls)
        for side in calls:
            cost = rounds.cost(side)
            seconds[side] = cost.seconds
            yield f"{name}, {side}: seconds of {chosen.num_inference_steps} steps", cost.seconds
            if side != "ours, CUDA graphs":  # whose memory PyTorch does not count as allocated
                yield f"{name}, {side}: GB", cost.gigabytes
        for side in ("ours", "ours, CUDA graphs"):
            suffix = side.removeprefix("ours")
            share = seconds[side] / seconds["stock"]
            yield f"{name}{suffix}: time, share of the stock pipeline's", share


def with_lora(lab: Lab) -> Figures:
    """Compare sdxl-360 with a LoRA on all of the UNet's attention with the same without it."""
    base = lab.sdxl
    settings = sphere_settings(lab)
    torch.manual_seed(0)
    with lab.device:
        changes = {
            name: Change(
                torch.randn(RANK, layer.in_features, dtype=lab.dtype),
                torch.randn(layer.out_features, RANK, dtype=lab.dtype) / 100,
                strength=1.0,
            )
            for name, layer in base.unet.named_modules()
            if re.search(r"\.attn\d\.to_", name) and isinstance(layer, nn.Linear)
        }
    lora = Lora({"unet": changes}, sha256="")
    seconds = {}
    for name, chosen in {"without": settings, "with": replace(settings, lora=lora)}.items():
        run = Run(Pipeline(base), chosen)
        run.denoise()
        cost = lab.measure(base, run.denoise)
        seconds[name] = cost.seconds
        yield f"{name}: seconds of {settings.num_inference_steps} steps", cost.seconds
        yield f"{name}: GB", cost.gigabytes
    yield "with: seconds more for an image", seconds["with"] - seconds["without"]


def enlarging(lab: Lab) -> Figures:
    """Measure every doubling of a 360 image of 1024 x 512, from the image before it."""
    base, whole = lab.sdxl, sphere_settings(lab)
    for factor in (2, 4):
        settings = replace(
            whole,
            height=factor * whole.height,
            width=factor * whole.width,
            num_inference_steps=lab.steps(30),
            strength=0.35 if not lab.dry else 1.0,
            layout=Feathered(),
        )
        run = Run(Pipeline(base), settings)
        size = settings.height // 2, settings.width // 2
        smaller = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        call = partial(run.pipeline.refine, settings, run.conditioning, smaller)
        cost = lab.measure(base, call, repeats=1)
        yield f"to {settings.width} x {settings.height}: seconds", cost.seconds
        yield f"to {settings.width} x {settings.height}: GB", cost.gigabytes


def sphere_settings(lab: Lab) -> Settings:
    """Return the settings of a 360 image, 1024 x 512 but in a dry run."""
    height, width = (128, 256) if lab.dry else (512, 1024)
    return Settings(
        prompt="",
        height=height,
        width=width,
        closed="x",
        num_inference_steps=lab.steps(BRIEF),
        layout=WHOLE.layout(0),
    )


def stock_call(kind: Any, run: Run) -> Callable[[], Tensor]:
    """Return a call that makes the latents of a run by a stock pipeline of SDXL."""
    base, settings, inputs = run.pipeline.base, run.settings, {}
    parts = {"unet": base.unet, "vae": base.vae, "scheduler": base.scheduler}
    if settings.depth is not None:
        parts["controlnet"] = base.controlnet
        inputs = {
            "image": settings.depth.expand(1, 3, -1, -1),
            "controlnet_conditioning_scale": settings.controlnet_conditioning_scale,
        }
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    stock = kind(**parts, **dict.fromkeys(encoders), add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    states, pooled = run.conditioning.states[:, 0], run.conditioning.pooled
    assert pooled is not None
    for name, value in {"prompt_embeds": states, "pooled_prompt_embeds": pooled[:, 0]}.items():
        inputs[f"negative_{name}"], inputs[name] = value.chunk(2)

    def call() -> Tensor:
        latents: Tensor = stock(
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            latents=run.noise.to(base.unet.dtype),
            output_type="latent",
            **inputs,
        ).images
        return latents

    return call


def windowed_xl(lab: Lab) -> Figures:
    """Measure syncdiffusion-xl, 2048 x 1024 with windows of 1024."""
    strip(lab, lab.sdxl, FAST, steps=1, windows=2).image()
    cost = lab.measure(lab.sdxl, strip(lab, lab.sdxl, FAST, windows=2).image, repeats=2)
    yield "fast: seconds", cost.seconds
    yield "fast: GB", cost.gigabytes
