"""What a panorama costs, against the published loop: operations, time, memory, as ratios.

operations: counted at the published configurations. time: of a panorama's denoising on the embedded
family, the middle one of a few rounds; of 50 steps, and of their sync steps, a fifth is taken and
counts five times. diffusers: its pipeline on the same windows; beside exact, two of 50 steps in
more rounds. scale: canvases of 4, 16 and 64 windows' width. true-size: one sync step of two windows
on the published configurations, random weights.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from diffusers import StableDiffusionPanoramaPipeline as Diffusers
from torch import Tensor

from panorama.decode import decode, decode_canvas
from panorama.gradient import frozen
from panorama.models import Models, build_scheduler, load
from panorama.request import SPEEDS, Speed
from panorama.sampler import VIEW_BATCH_SIZE, sample
from panorama.syncdiffusion import SyncDiffusionPipeline
from panorama.synchronize import DirectSynchronizer, Synchronizer, SyncSchedule
from panorama.views import View
from script.operations import Networks, Setting, calls_of
from script.true_size import TrueSize, activations
from tests.measure import Activations, weights_of
from tests.plain_loop import plain_loop
from weights.train.fit import has_bfloat16

T = TypeVar("T")
Table = dict[str, Any]

WIDTH = 1024  # pixels, on the embedded family
PART = 5  # of 50 steps with 5 sync steps a fifth is timed
BRIEF = 25  # of 50 steps without synchronising, where short rounds are wanted
PROMPT = "sunset over snowy mountains"
SCALES = (4, 16, 64)  # windows' widths
SLICE = 4  # windows' widths that are decoded at once


def measure_operations(_: argparse.Namespace) -> Table:
    """Counts of the published loop and of both speeds, in units of 10^12, and of their calls."""
    networks = Networks()
    rows: Table = {}
    for threshold in (5, 50):
        setting = Setting(sync_threshold=threshold)
        for name, speed in {"published loop": None, **SPEEDS}.items():
            calls = calls_of(setting, speed)
            row = f"{name}, sync_threshold {threshold}"
            rows[row] = ours = networks.operations(calls)
            if speed:
                plain = rows[f"published loop, sync_threshold {threshold}"]
                rows[f"{row}: saved"] = 1 - ours / plain
                rows[f"{row}: times fewer"] = plain / ours
            for (network, side, with_gradient), number in calls.items():
                gradient = ", with gradient" if with_gradient else ""
                rows[f"{row}: {network} {side} x {side}{gradient}"] = number
    return rows


class Clocked:
    """A pipeline's networks, with the seconds spent in them."""

    def __init__(self, pipe: SyncDiffusionPipeline, guidance_scale: float) -> None:
        self.seconds = 0.0
        guided = pipe._guided(*pipe.encode_prompt(PROMPT), guidance_scale)
        self.predict_noise = self.clocked(guided)
        self.decode = self.clocked(lambda x: decode(pipe.vae, x))
        self.embed = self.clocked(pipe.perceptual.embed)
        self.distance = self.clocked(pipe.perceptual.distance)

    def clocked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, its time added to `seconds`."""

        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - started

        return run


@dataclass(frozen=True)
class Run:
    """One way to make the latents of a canvas, and what is needed to do so again."""

    pipe: SyncDiffusionPipeline
    networks: Clocked
    noise: Tensor
    views: tuple[tuple[View, ...], ...]
    scheduler: Any
    schedule: SyncSchedule
    speed: Speed | None  # None for the published loop
    part: int  # it takes one of so many parts of the steps, and counts as often

    def __call__(self) -> Tensor:
        """The denoised latents."""
        networks, scheduler = self.networks, copy.deepcopy(self.scheduler)
        if self.speed is None:
            return plain_loop(self.noise, self.views, networks, scheduler, self.schedule)
        kind = DirectSynchronizer if self.speed.sync_on_x0 else Synchronizer
        parts = (networks.predict_noise, networks.decode, networks, scheduler.alphas_cumprod)
        with frozen(self.pipe.unet, self.pipe.vae, self.pipe.perceptual):
            return sample(
                self.noise,
                self.views,
                networks.predict_noise,
                scheduler,
                synchronizer=kind(*parts, self.speed.sync_pooling),
                schedule=self.schedule,
            )


def build_run(models: Models, speed: Speed | None, sync: bool, part: int = PART) -> Run:
    """The denoising of a panorama on the embedded family, or a part of it.

    Fast is taken whole: its last step costs more than the others.
    """
    pipe = models.pipelines["syncdiffusion"]
    for network in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.perceptual):
        network.requires_grad_(False)  # as published
    chosen = speed or SPEEDS["exact"]
    scheduler = build_scheduler(chosen.scheduler or "ddim", pipe.scheduler)
    part = 1 if chosen.disjoint else part
    steps = chosen.num_inference_steps // part
    scheduler.set_timesteps(steps)
    side = pipe.window * pipe.vae_scale_factor
    return Run(
        pipe,
        Clocked(pipe, models.settings("syncdiffusion").guidance_scale),
        pipe._latents(side, WIDTH, torch.Generator().manual_seed(0), None),
        pipe._views(side, WIDTH, 16, "", steps if chosen.disjoint else None),
        scheduler,
        SyncSchedule(20.0 if sync else 0.0, threshold=5 // part),
        speed,
        part,
    )


def load_tiny() -> Models:
    """The embedded family's first mode."""
    return load("tiny", modes=["syncdiffusion"], device="cpu")


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """How many seconds a call takes, and its result."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


class Rounds:
    """Calls that take turns, in another order each round, and what they took.

    A machine's speed changes from minute to minute, so calls are set beside one another round by
    round, and the middle one of the rounds counts.

    Attributes:
        seconds: of each call, by round.
        results: of each call, the last.
    """

    def __init__(self, calls: Mapping[str, Callable[[], Any]], repeats: int) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}
        self.results: dict[str, Any] = {}
        names = list(calls)
        for turn in range(repeats):
            for name in names if turn % 2 else reversed(names):
                seconds, self.results[name] = timed(calls[name])
                self.seconds[name].append(seconds)

    def median(self, name: str) -> float:
        """Seconds that a call takes."""
        return median(self.seconds[name])

    def ratio(self, one: str, other: str) -> float:
        """How many times as long one takes as the other."""
        pairs = zip(self.seconds[one], self.seconds[other], strict=True)
        return median(mine / theirs for mine, theirs in pairs)


def compare(
    calls: Mapping[str, Callable[[], Any]], parts: Mapping[str, int], repeats: int
) -> Table:
    """Seconds of each call, how many times as fast as the first the others are, and how far off.

    Args:
        calls: they make latents.
        parts: how many times as long the whole takes as each call.
        repeats: the rounds.
    """
    rounds, (theirs, *names) = Rounds(calls, repeats), calls
    rows: Table = {f"{name}: seconds": parts[name] * rounds.median(name) for name in calls}
    for name in names:
        times = rounds.ratio(theirs, name) * parts[theirs] / parts[name]
        rows[f"{name}: times as fast"] = times
    if "exact" in names:
        expected, latents = rounds.results[theirs], rounds.results["exact"]
        difference = (latents - expected).abs().max() / expected.std()
        rows["exact: largest difference, standard deviations"] = float(difference)
    return rows


def measure_time(options: argparse.Namespace) -> Table:
    """Seconds on the embedded family, the difference, and the share outside its networks."""
    models = load_tiny()
    speeds = {"published loop": None, **SPEEDS}
    runs = {name: build_run(models, speed, sync=True) for name, speed in speeds.items()}
    rows = compare(runs, {name: run.part for name, run in runs.items()}, options.repeats)
    rows["exact: share outside its networks"] = overhead(runs["exact"])
    return rows


def overhead(run: Run) -> float:
    """The share of a run that is spent neither in networks nor in their gradients."""
    gradient = torch.autograd.grad
    torch.autograd.grad = run.networks.clocked(gradient)
    run.networks.seconds = 0.0
    try:
        whole, _ = timed(run)
    finally:
        torch.autograd.grad = gradient
    return 1 - run.networks.seconds / whole


def measure_diffusers(options: argparse.Namespace) -> Table:
    """Seconds without synchronising, against diffusers' pipeline on the same windows.

    Exact spends its time where diffusers does. To tell them apart takes many short rounds.
    """
    models = load_tiny()
    rows: Table = {}
    for name, part, repeats in (("fast", PART, 1), ("exact", BRIEF, 8)):
        exact = build_run(models, SPEEDS["exact"], sync=False, part=part)
        run = build_run(models, SPEEDS[name], sync=False, part=part)
        theirs = f"diffusers, beside {name}"
        calls = {theirs: diffusers_call(exact, models), name: run}
        rows |= compare(calls, {theirs: exact.part, name: run.part}, repeats * options.repeats)
    return rows


def diffusers_call(run: Run, models: Models) -> Callable[[], Tensor]:
    """What makes the latents of a run by diffusers' pipeline."""
    pipe, (views,) = run.pipe, run.views
    stock = Diffusers(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=pipe.unet,
        scheduler=copy.deepcopy(run.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(PROMPT)  # as `build_run` has them
    places = [(v.top, v.top + v.size, v.left, v.left + v.size) for v in views]
    stock.get_views = lambda *_, **__: places

    def call() -> Tensor:
        latents: Tensor = stock(
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            height=pipe.window * pipe.vae_scale_factor,
            width=WIDTH,
            num_inference_steps=len(run.scheduler.timesteps),
            guidance_scale=models.settings("syncdiffusion").guidance_scale,
            view_batch_size=VIEW_BATCH_SIZE,
            latents=run.noise.clone(),
            output_type="latent",
        ).images
        return latents

    return call


def measure_scale(options: argparse.Namespace) -> Table:
    """Memory beyond the canvas and its picture, and time per window, as the canvas grows.

    The memory is that of a sync step. The time is that of as many windows on each canvas, side by
    side and without guidance, in batches of one size.
    """
    pipe = load_tiny().pipelines["syncdiffusion"]
    weights, most_cells = weights_of(pipe), SLICE * pipe.window**2
    rows: Table = {}
    for windows in SCALES:
        with Activations(weights) as denoising:
            latents = strip(pipe, windows, 1, sync_threshold=1)
        with Activations(weights) as decoding:
            picture = decode_canvas(pipe.vae, latents, max_cells=most_cells)
        rows[f"{windows} windows wide: megabytes of denoising"] = beyond(denoising, latents)
        rows[f"{windows} windows wide: megabytes of decoding"] = beyond(decoding, picture)
    for name in ("megabytes of denoising", "megabytes of decoding"):
        values = [rows[f"{windows} windows wide: {name}"] for windows in SCALES]
        rows[f"{name}: largest over smallest"] = max(values) / min(values)
    alike = {"guidance_scale": 1.0, "stride": pipe.window, "view_batch_size": min(SCALES)}
    calls = {str(n): partial(strip, pipe, n, max(SCALES) // n, **alike) for n in SCALES}
    rounds = Rounds(calls, 2 * options.repeats)
    for name in calls:
        rows[f"{name} windows wide: seconds a window"] = rounds.median(name) / max(SCALES)
    ratios = [rounds.ratio(name, str(min(SCALES))) for name in calls]
    rows["seconds a window: largest over smallest"] = max(ratios) / min(ratios)
    latents = strip(pipe, SCALES[1], 10)
    whole = decode_canvas(pipe.vae, latents)
    sliced = decode_canvas(pipe.vae, latents, max_cells=most_cells)
    apart = (whole - sliced).abs() * 127.5
    rows["sliced decode: largest difference, grey levels"] = float(apart.max())
    rows["sliced decode: mean difference, grey levels"] = float(apart.mean())
    return rows


def strip(pipe: SyncDiffusionPipeline, windows: int, steps: int, **options: Any) -> Tensor:
    """The latents of a canvas so many windows wide, without synchronising if not asked for it."""
    side = pipe.window * pipe.vae_scale_factor
    generator = torch.Generator().manual_seed(0)
    chosen = {"guidance_scale": 3.0, "sync_threshold": 0, **options}
    latents: Tensor = pipe(
        PROMPT,
        side,
        windows * side,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        **chosen,
    ).images
    return latents


def beyond(activations: Activations, result: Tensor) -> float:
    """The most megabytes that were alive at once beside a result."""
    return (activations.most - result.nbytes) / 1e6


def measure_true_size(_: argparse.Namespace) -> Table:
    """Seconds and activations of one sync step of two windows at the published sizes.

    The step is taken in bfloat16 where the processor multiplies in it, else in single precision.
    """
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    rows: Table = {"bits of a number": 8 * dtype.itemsize}
    for precision, kind in {"single": torch.float32, "half": torch.bfloat16}.items():
        for name, most in activations(kind).items():
            rows[f"{name}: gigabytes of activations, {precision} precision"] = most / 1e9
    torch.manual_seed(0)
    networks = TrueSize(dtype)
    networks.decode(torch.randn(1, 4, 8, 8))  # the first call sets up the libraries
    ways = networks.ways()
    for name in ("published loop", "exact", "fast"):
        rows[f"{name}: seconds"], _ = timed(ways[name])
    for row, value in list(rows.items()):
        name, _, what = row.partition(": ")
        if what and name != "published loop":
            rows[f"{row}, times less"] = rows[f"published loop: {what}"] / value
    return rows


SECTIONS: Mapping[str, Callable[[argparse.Namespace], Table]] = {
    "operations": measure_operations,
    "time": measure_time,
    "diffusers": measure_diffusers,
    "scale": measure_scale,
    "true-size": measure_true_size,
}


@dataclass(frozen=True)
class Goal:
    """What a value has to be."""

    least: float = -inf
    most: float = inf

    def __str__(self) -> str:
        return f"at least {self.least:g}" if self.least > -inf else f"at most {self.most:g}"

    def met(self, value: float) -> bool:
        """Whether a value is as it has to be."""
        return self.least <= value <= self.most


GOALS: Mapping[tuple[str, str], Goal] = {
    ("operations", "exact, sync_threshold 5: saved"): Goal(least=0.035),
    ("operations", "exact, sync_threshold 50: saved"): Goal(least=0.08),
    ("operations", "fast, sync_threshold 5: times fewer"): Goal(least=8),
    ("time", "exact: times as fast"): Goal(least=1.3),
    ("time", "fast: times as fast"): Goal(least=6),
    ("time", "exact: share outside its networks"): Goal(most=0.03),
    ("diffusers", "exact: times as fast"): Goal(least=1),
    ("diffusers", "fast: times as fast"): Goal(least=3),
    ("scale", "megabytes of denoising: largest over smallest"): Goal(most=1.05),
    ("scale", "megabytes of decoding: largest over smallest"): Goal(most=1.05),
    ("scale", "seconds a window: largest over smallest"): Goal(most=1.1),
    ("true-size", "exact: seconds, times less"): Goal(least=1),
    ("true-size", "fast: seconds, times less"): Goal(least=3),
    ("true-size", "exact: gigabytes of activations, single precision, times less"): Goal(least=2),
    (
        "true-size",
        "exact, checkpointing: gigabytes of activations, single precision, times less",
    ): Goal(least=4),
}


def main() -> int:
    """Prints each section's table and what was missed; writes what there is after each section.

    Returns:
        The exit code: 1 if a goal was missed.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none")
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
