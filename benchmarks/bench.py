"""Compare the cost of a panorama with the published loop's: operations, time, memory.

Each section prints a table.

- operations: counted on the configurations of Stable Diffusion 2 base.
- time: seconds to denoise a panorama with the tiny family, the median of a few rounds. Of 50 steps
  a fifth are run, with a fifth of their sync steps, and the seconds are multiplied by five.
- diffusers: denoising without synchronising against diffusers' panorama pipeline: `fast`, and our
  sampler on the same windows. The latter runs two of 50 steps, in more rounds.
- scale: memory and time of canvases as wide as 4, 16 and 64 windows.
- true-size: one sync step of two windows on networks of the published sizes, with random weights.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.activations import Activations, weights_of
from benchmarks.goals import Goal
from benchmarks.lab import Lab, Run, time_inside
from benchmarks.operations import PUBLISHED_LOOP, STRIDE, Networks, calls_of
from benchmarks.stock import panorama_call, published_loop
from benchmarks.true_size import CPU, activations, kept_by_unet, ways
from panorama.images.vae import decode, decode_canvas
from panorama.modes import Models, load
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.denoiser import Conditioning
from panorama.sampling.presets import FAST, WINDOWED, Preset
from panorama.sampling.sampler import BATCH_SIZE
from panorama.sampling.synchronize import SyncSettings
from panorama.sampling.views import Fixed
from weights.train.device import has_bfloat16

Table = dict[str, Any]

WIDTH = 1024  # pixels, on the tiny family
PART = 5  # of 50 steps with 5 sync steps a fifth is timed
BRIEF = 25  # of 50 steps without synchronising, where short rounds are wanted
PROMPT = "sunset over snowy mountains"
SCALES = (4, 16, 64)  # windows' widths
SAMPLERS: Mapping[str, Preset | None] = {
    "published loop": None,
    "same windows": PUBLISHED_LOOP,
    **WINDOWED,
}
"""The published loop; our sampler on its windows, without shared means; and the presets."""
SLICE = 4  # windows' widths that are decoded at once
LAB = Lab(CPU, dry=False)


def measure_operations(_: argparse.Namespace) -> Table:
    """Count the published loop and both presets, in units of 10^12, and their calls."""
    networks = Networks()
    rows: Table = {}
    for threshold in (5, 50):
        for name, preset in SAMPLERS.items():
            calls = calls_of(preset, threshold)
            row = f"{name}, sync_threshold {threshold}"
            rows[row] = ours = networks.operations(calls)
            if preset:
                plain = rows[f"published loop, sync_threshold {threshold}"]
                rows[f"{row}: saved"] = 1 - ours / plain
                rows[f"{row}: times fewer"] = plain / ours
            for (network, side, with_gradient), number in calls.items():
                gradient = ", with gradient" if with_gradient else ""
                rows[f"{row}: {network} {side} x {side}{gradient}"] = number
    return rows


@dataclass(frozen=True)
class PromptRun(Run):
    """A run that encodes its prompt."""

    @cached_property
    def conditioning(self) -> Conditioning:
        """Embeddings of the prompt."""
        return self.pipeline.encode(self.settings)


def part_of(preset: Preset, part: int = PART) -> int:
    """Return the part of a preset's steps that is run; fast is run whole.

    The last step of fast costs more than the others.
    """
    return part if preset.takes_stride else 1


def canvas_run(models: Models, preset: Preset, *, sync: bool, part: int = PART) -> PromptRun:
    """Return a run of a part of a preset's steps on the tiny family."""
    base, part = models.bases["syncdiffusion"], part_of(preset, part)
    settings = Settings(
        prompt=PROMPT,
        height=base.window * base.factor,
        width=WIDTH,
        guidance_scale=models.settings("syncdiffusion").guidance_scale,
        num_inference_steps=preset.num_inference_steps // part,
        scheduler=preset.scheduler,
        layout=preset.layout(STRIDE),
        sync=preset.sync(preset.sync_threshold // part, weight=20.0 if sync else 0.0),
    )
    return PromptRun(Pipeline(base), settings)


def load_tiny() -> Models:
    """Load the tiny family's first mode; weights need no gradient, as published."""
    models = load("tiny", modes=["syncdiffusion"], device="cpu")
    for network in models.bases["syncdiffusion"].networks():
        network.requires_grad_(False)
    return models


def compare(
    models: Models,
    calls: Mapping[str, Callable[[], Tensor]],
    parts: Mapping[str, int],
    repeats: int,
) -> Table:
    """Compare calls that make latents with the first of them, in speed and, if exact, in result.

    Args:
        models: whose networks the calls run.
        calls: by name.
        parts: how many times as long the whole takes as each call.
        repeats: the rounds.
    """
    (base,), (theirs, *names) = models.bases.values(), calls
    rounds = LAB.compare(base, calls, repeats)
    rows: Table = {f"{name}: seconds": parts[name] * rounds.cost(name).seconds for name in calls}
    for name in names:
        times = rounds.ratio(theirs, name) * parts[theirs] / parts[name]
        rows[f"{name}: times as fast"] = times
    if "same windows" in names:
        expected, latents = (rounds.cost(name).result for name in (theirs, "same windows"))
        difference = (latents - expected).abs().max() / expected.std()
        rows["same windows: largest difference, standard deviations"] = float(difference)
    return rows


def measure_time(options: argparse.Namespace) -> Table:
    """Measure the tiny family: seconds, difference, and the share outside its networks."""
    models = load_tiny()
    presets = {name: preset or PUBLISHED_LOOP for name, preset in SAMPLERS.items()}
    runs = {name: canvas_run(models, preset, sync=True) for name, preset in presets.items()}
    calls = {
        name: run.denoise if SAMPLERS[name] else partial(published_loop, run)
        for name, run in runs.items()
    }
    parts = {name: part_of(preset) for name, preset in presets.items()}
    rows = compare(models, calls, parts, options.repeats)
    seconds, inside = time_inside(LAB, models.bases["syncdiffusion"], calls["exact"])
    rows["exact: share outside its networks"] = 1 - sum(inside.values()) / seconds
    return rows


def measure_diffusers(options: argparse.Namespace) -> Table:
    """Measure seconds without synchronising, against diffusers' pipeline on the same windows.

    On the same windows we spend our time where diffusers does. To tell both apart takes many short
    rounds.
    """
    models = load_tiny()
    rows: Table = {}
    for name, preset, part, repeats in (
        ("fast", FAST, PART, 1),
        ("same windows", PUBLISHED_LOOP, BRIEF, 8),
    ):
        published = canvas_run(models, PUBLISHED_LOOP, sync=False, part=part)
        theirs = f"diffusers, beside {name}"
        calls = {
            theirs: panorama_call(published, BATCH_SIZE),
            name: canvas_run(models, preset, sync=False, part=part).denoise,
        }
        parts = {theirs: part, name: part_of(preset, part)}
        rows |= compare(models, calls, parts, repeats * options.repeats)
    return rows


def measure_scale(options: argparse.Namespace) -> Table:
    """Measure memory beyond the canvas and its image, and time per window, as the canvas grows.

    The memory is that of a sync step. The time is that of as many windows on each canvas, side by
    side and without guidance, in batches of one size.
    """
    base = load_tiny().bases["syncdiffusion"]
    weights, max_cells = weights_of(base), SLICE * base.window**2
    rows: Table = {}
    for windows in SCALES:
        with Activations(weights) as denoising:
            latents = strip(Pipeline(base), windows, 1, sync=SyncSettings(threshold=1))
        with Activations(weights) as decoding:
            image = decode_canvas(base.vae, latents, max_cells=max_cells)
        rows[f"{windows} windows wide: megabytes of denoising"] = beyond(denoising, latents)
        rows[f"{windows} windows wide: megabytes of decoding"] = beyond(decoding, image)
    for name in ("megabytes of denoising", "megabytes of decoding"):
        values = [rows[f"{windows} windows wide: {name}"] for windows in SCALES]
        rows[f"{name}: largest over smallest"] = max(values) / min(values)
    pipeline = Pipeline(base, batch_size=min(SCALES))
    alike = {"guidance_scale": 1.0, "layout": Fixed(base.window)}
    calls = {str(n): partial(strip, pipeline, n, max(SCALES) // n, **alike) for n in SCALES}
    rounds = LAB.compare(base, calls, 2 * options.repeats)
    for name in calls:
        rows[f"{name} windows wide: seconds a window"] = rounds.cost(name).seconds / max(SCALES)
    ratios = [rounds.ratio(name, str(min(SCALES))) for name in calls]
    rows["seconds a window: largest over smallest"] = max(ratios) / min(ratios)
    latents = strip(Pipeline(base), SCALES[1], 10)
    whole = decode_canvas(base.vae, latents)
    sliced = decode_canvas(base.vae, latents, max_cells=max_cells)
    apart = (whole - sliced).abs() * 127.5
    rows["sliced decode: largest difference, grey levels"] = float(apart.max())
    rows["sliced decode: mean difference, grey levels"] = float(apart.mean())
    return rows


def strip(pipeline: Pipeline, windows: int, steps: int, **options: Any) -> Tensor:
    """Return the latents of a canvas so many windows wide, not synchronised by default."""
    side = pipeline.base.window * pipeline.base.factor
    settings = Settings(
        prompt=PROMPT,
        height=side,
        width=windows * side,
        num_inference_steps=steps,
        **{"guidance_scale": 3.0, **options},
    )
    noise = pipeline.noise(settings, torch.Generator().manual_seed(0))
    return pipeline.denoise(settings, pipeline.encode(settings), noise)


def beyond(activations: Activations, result: Tensor) -> float:
    """Return the most megabytes that were alive at once beside a result."""
    return (activations.most - result.nbytes) / 1e6


def measure_true_size(_: argparse.Namespace) -> Table:
    """Measure seconds and activations of one sync step of two windows at the published sizes.

    The step is taken in bfloat16 where the processor multiplies in it, else in single precision.
    """
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    rows: Table = {"bits of a number": 8 * dtype.itemsize}
    for precision, kind in {"single": torch.float32, "half": torch.bfloat16}.items():
        for name, most in activations(kind).items():
            rows[f"{name}: gigabytes of activations, {precision} precision"] = most / 1e9
    lab = Lab(CPU, dry=False, dtype=dtype)
    steps = ways(lab)
    decode(lab.sd2.vae, torch.randn(1, 4, 8, 8))  # sets up the libraries
    for name in ("published loop", "exact", "fast"):
        rows[f"{name}: seconds"] = lab.measure(lab.sd2, steps[name], repeats=1).seconds
    for row, value in list(rows.items()):
        name, _, what = row.partition(": ")
        if what and name != "published loop":
            rows[f"{row}, times less"] = rows[f"published loop: {what}"] / value
    kept = kept_by_unet()
    for name in ("frozen", "checkpointing"):
        rows[f"UNet, {name}: share of the bytes kept"] = kept[name] / kept["published"]
    return rows


SECTIONS: Mapping[str, Callable[[argparse.Namespace], Table]] = {
    "operations": measure_operations,
    "time": measure_time,
    "diffusers": measure_diffusers,
    "scale": measure_scale,
    "true-size": measure_true_size,
}


GOALS: Mapping[tuple[str, str], Goal] = {
    ("operations", "same windows, sync_threshold 5: saved"): Goal(least=0.035),
    ("operations", "same windows, sync_threshold 50: saved"): Goal(least=0.08),
    ("operations", "fast, sync_threshold 5: times fewer"): Goal(least=9.6),
    ("time", "same windows: times as fast"): Goal(least=1.3),
    ("time", "exact: times as fast"): Goal(least=1.3),
    ("time", "fast: times as fast"): Goal(least=8),
    ("time", "exact: share outside its networks"): Goal(most=0.03),
    ("diffusers", "same windows: times as fast"): Goal(least=1),
    ("diffusers", "fast: times as fast"): Goal(least=3),
    ("scale", "megabytes of denoising: largest over smallest"): Goal(most=1.05),
    ("scale", "megabytes of decoding: largest over smallest"): Goal(most=1.05),
    ("scale", "seconds a window: largest over smallest"): Goal(most=1.1),
    ("true-size", "exact: seconds, times less"): Goal(least=1),
    ("true-size", "fast: seconds, times less"): Goal(least=3),
    ("true-size", "exact: gigabytes of activations, single precision, times less"): Goal(least=1.3),
    (
        "true-size",
        "exact, checkpointing: gigabytes of activations, single precision, times less",
    ): Goal(least=3),
    ("true-size", "UNet, checkpointing: share of the bytes kept"): Goal(most=0.15),
}


def main() -> int:
    """Print each section's table and the goals missed; write all tables after each section.

    Returns:
        The exit code: 1 if a goal was missed.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="for the tables")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    tables: dict[str, Table] = {}
    missed = 0
    for name in options.sections or SECTIONS:
        print(f"{name}:")
        tables[name] = SECTIONS[name](options)
        assert {row for section, row in GOALS if section == name} <= set(tables[name])
        for row, value in tables[name].items():
            goal = GOALS.get((name, row), Goal())
            note = "" if goal.met(value) else f"  missed: {goal}"
            missed += bool(note)
            print(f"  {row:70} {value:10.5g}{note}", flush=True)
        options.json.write_text(json.dumps(tables, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
