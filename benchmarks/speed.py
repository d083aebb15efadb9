"""The cost and the effect of each lever of speed, as a Markdown table.

For each way, rings of five windows' width are made on the embedded family, from prompts that name
a land and leave the palette open, which windows have to agree on. Coherence, agreement and the seam
are measured on each; the distance of distributions is Frechet's (arXiv 1706.08500), between windows
from all around the rings and single windows of the family, in the features of the judge's last
block. Operations are those of Stable Diffusion 2 base, in every mode.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import TypedDict, TypeVar

import torch
from torch import Tensor

from benchmarks.coherence import WINDOWS, coherence, seam_ratio
from benchmarks.operations import Networks, Setting, operations
from panorama.images.vae import decode
from panorama.modes import Models, load
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.presets import EXACT, FAST, Preset
from panorama.sampling.synchronize import SyncSettings
from weights.train.export import load_judge
from weights.train.measure import Wish
from weights.train.recognise import ATTRIBUTES, Judge, read
from weights.train.scenes import LAND_WORDS

T = TypeVar("T")

ON_X0 = replace(EXACT, through_unet=False)
WAYS: Mapping[str, tuple[Preset, float]] = {
    "no synchronising": (EXACT, 0.0),
    "exact": (EXACT, 20.0),
    "disjoint windows": (replace(EXACT, layout=FAST.layout), 20.0),
    "20 steps of DPM-Solver++ 2M": (replace(EXACT, num_inference_steps=20, scheduler="dpm++"), 20),
    "20 steps of UniPC": (replace(EXACT, num_inference_steps=20, scheduler="unipc"), 20.0),
    "gradient of x0": (ON_X0, 20.0),
    "gradient of x0, half resolution": (replace(ON_X0, pooling=2), 20.0),
    "fast": (FAST, 20.0),
    "fast, no synchronising": (FAST, 0.0),
}
"""The ways that are compared: the levers, and the sync_weight."""
MODES = ("syncdiffusion", "syncdiffusion-xl")
STRIDE = 16  # latent cells, where windows slide
CUTS = 32  # windows around each ring, for the distance of distributions
SINGLES = 21  # for each ring
WISHES: Sequence[Wish] = tuple((words[0], {"land": land}) for land, words in LAND_WORDS.items())
"""The prompts, taken in turn, and the attributes that they ask for."""


class Found(TypedDict):
    """The measurements of one ring."""

    seconds: float
    distance: float  # between its windows, by the judge
    seam: float
    right: list[bool]  # of each window that overlaps no other
    features: Tensor  # (CUTS, C)


def features(judge: Judge, windows: Tensor) -> Tensor:
    """Return the means (N, C) of the last block's features of windows (N, 3, H, W) in [-1, 1]."""
    x = windows
    with torch.no_grad():
        for block in judge.blocks:
            x = block(x)
    return x.mean((2, 3))


def frechet(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of the normal distributions of features (N, C) and (M, C)."""
    first, second = first.double(), second.double()
    means = (first.mean(0) - second.mean(0)).square().sum()
    one, two = (torch.cov(x.T) for x in (first, second))
    product = torch.linalg.eigvals(one @ two).real.clamp(min=0).sqrt().sum()
    return float(means + one.trace() + two.trace() - 2 * product)


def strangeness(found: Tensor, singles: Tensor) -> float:
    """Return the Frechet distance of features from those of single windows, over their variance."""
    return frechet(found, singles) / float(torch.cov(singles.T.double()).trace())


def settings_for(models: Models, prompt: str, windows: int, way: str) -> Settings:
    """Return the settings of a flat canvas so many windows wide, for the mode that was loaded."""
    ((mode, base),) = models.bases.items()
    preset, weight = WAYS[way]
    side = base.window * base.factor
    return Settings(
        prompt=f"{''.join(base.tokens)} {prompt}".strip(),
        height=side,
        width=windows * side,
        guidance_scale=models.settings(mode).guidance_scale,
        num_inference_steps=preset.num_inference_steps,
        scheduler=preset.scheduler,
        layout=preset.layout(STRIDE),
        sync=SyncSettings(weight, through_unet=preset.through_unet, pooling=preset.pooling),
    )


def make(models: Models, prompt: str, seed: int, way: str) -> Tensor:
    """Make a ring (1, 3, H, W) in [0, 1]."""
    (base,) = models.bases.values()
    settings = replace(settings_for(models, prompt, WINDOWS, way), closed="x")
    return Pipeline(base)(settings, torch.Generator().manual_seed(seed))


def examine(models: Models, judge: Judge, wish: Wish, seed: int, way: str) -> Found:
    """Make a ring and measure it."""
    prompt, asked = wish
    started = time.perf_counter()
    image = make(models, prompt, seed, way)
    seconds = time.perf_counter() - started
    side = image.shape[-2]
    apart = torch.cat(image.split(side, -1)) * 2 - 1
    seen = read(judge, apart, ATTRIBUTES)
    turns = range(0, image.shape[-1], image.shape[-1] // CUTS)
    cut = torch.cat([image.roll(-turn, -1)[..., :side] for turn in turns]) * 2 - 1
    return Found(
        seconds=seconds,
        distance=coherence(judge, image, side),
        seam=seam_ratio(image),
        right=[all(facts[name] == value for name, value in asked.items()) for facts in seen],
        features=features(judge, cut),
    )


def kept(path: Path, count: int, find: Callable[[int], T]) -> list[T]:
    """Return the first results of `find`.

    A file keeps each, so that a later run resumes from there.
    """
    found: list[T] = torch.load(path, weights_only=True) if path.exists() else []
    for index in range(len(found), count):
        found.append(find(index))
        torch.save(found, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    return found[:count]


def single_windows(models: Models, judge: Judge, wish: Wish, index: int) -> Tensor:
    """Return the features (SINGLES, C) of the family's own windows, each an image of its own.

    They are denoised side by side, without overlap, and decoded one by one.
    """
    (base,) = models.bases.values()
    settings = settings_for(models, wish[0], SINGLES, "no synchronising")
    settings = replace(settings, layout=EXACT.layout(base.window))
    pipeline = Pipeline(base)
    noise = pipeline.noise(settings, torch.Generator().manual_seed(1000 + index))
    latents = pipeline.denoise(settings, pipeline.encode(settings), noise)
    with torch.no_grad():
        images = [decode(base.vae, x) for x in latents.split(base.window, -1)]
    return features(judge, torch.cat(images).clamp(-1, 1))


def row(
    way: str, found: Sequence[Found], exact: Sequence[Found], singles: Tensor, networks: Networks
) -> str:
    """Return the row of a way in Markdown, beside exact with the same prompts and noise."""
    preset, weight = WAYS[way]
    setting = Setting(sync_threshold=5 if weight else 0)
    cells = [
        way,
        f"{operations(setting, preset, networks):.0f}",
        f"{min(f['seconds'] for f in found):.1f}",
        beside([f["distance"] for f in found], [f["distance"] for f in exact]),
        beside([mean(f["right"]) for f in found], [mean(f["right"]) for f in exact]),
        beside([f["seam"] for f in found], [f["seam"] for f in exact]),
        f"{strangeness(torch.cat([f['features'] for f in found]), singles):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def beside(values: Sequence[float], exact: Sequence[float]) -> str:
    """Return a mean, its difference from exact's, and the standard error of this difference.

    Both are of the same prompts and noise, whose own differences drop out.
    """
    more = [value - other for value, other in zip(values, exact, strict=True)]
    return f"{mean(values):.3f} ({mean(more):+.3f} ± {stdev(more) / len(more) ** 0.5:.3f})"


HEADER = """\
| | operations, 10^12 | seconds, the least | distance of windows (beside exact) \
| agreement (beside exact) | seam ratio (beside exact) | Frechet distance, over variance |
|---|---|---|---|---|---|---|"""


def main() -> None:
    """Make the images and print the table; the measurements of each image are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", help=f"of {', '.join(WAYS)}; default: all")
    parser.add_argument(
        "--seeds",
        type=int,
        default=24,
        help="images of each way, at least 2",
    )
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="a folder for the measurements, a new one after any change",
    )
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2, for a standard error; try 24")
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"unknown ways: {', '.join(sorted(unknown))}")
    models = load("tiny", modes=[options.mode], device="cpu")
    judge = load_judge(Judge(), "windows")
    options.work.mkdir(parents=True, exist_ok=True)

    def rings(way: str) -> list[Found]:
        def find(index: int) -> Found:
            return examine(models, judge, WISHES[index % len(WISHES)], index, way)

        return kept(options.work / f"{way}.pt", options.seeds, find)

    def windows(index: int) -> Tensor:
        return single_windows(models, judge, WISHES[index % len(WISHES)], index)

    singles = torch.cat(kept(options.work / "singles.pt", options.seeds, windows))
    exact, networks = rings("exact"), Networks()
    print(HEADER, flush=True)
    for way in options.ways or WAYS:
        print(row(way, rings(way), exact, singles, networks), flush=True)
    floor = strangeness(singles[::2], singles[1::2])
    print(f"\nOne half of the single windows from the other, so of fewer: {floor:.2f}")


if __name__ == "__main__":
    main()
