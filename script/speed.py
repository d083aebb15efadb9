"""What each lever of speed costs and does, as a Markdown table.

For each way, rings of five windows' width are made on the embedded family, from prompts that name
a land and leave the palette open, which windows have to agree on. Coherence, agreement and the seam
are measured on each; the distance of distributions is Frechet's (arXiv 1706.08500), between windows
from all around the rings and single windows of the family, in the features of the judge's last
block.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TypedDict, TypeVar

import torch
from torch import Tensor

from panorama.decode import decode
from panorama.models import Models, levers, load
from panorama.request import SPEEDS, Speed
from script.coherence import WINDOWS, coherence, seam_ratio
from script.operations import Networks, Setting, operations
from weights.train.export import load_judge
from weights.train.measure import Wish
from weights.train.recognise import ATTRIBUTES, Judge, read
from weights.train.scenes import LAND_WORDS

T = TypeVar("T")

WAYS: Mapping[str, tuple[Speed, float]] = {
    "no synchronising": (SPEEDS["exact"], 0.0),
    "exact": (SPEEDS["exact"], 20.0),
    "disjoint windows": (Speed(50, disjoint=True), 20.0),
    "20 steps of DPM-Solver++ 2M": (Speed(20, "dpm++"), 20.0),
    "20 steps of UniPC": (Speed(20, "unipc"), 20.0),
    "gradient of x0": (Speed(50, sync_on_x0=True), 20.0),
    "gradient of x0, half resolution": (Speed(50, sync_on_x0=True, sync_pooling=2), 20.0),
    "fast": (SPEEDS["fast"], 20.0),
    "fast, no synchronising": (SPEEDS["fast"], 0.0),
}
"""What is compared: the levers, and the sync_weight."""
CUTS = 32  # windows around each ring, for the distance of distributions
SINGLES = 21  # for each ring
WISHES: Sequence[Wish] = tuple((words[0], {"land": land}) for land, words in LAND_WORDS.items())
"""The prompts, taken in turn, and what they ask for."""


class Found(TypedDict):
    """What was found of one ring."""

    seconds: float
    distance: float  # between its windows, by the judge
    seam: float
    right: list[bool]  # of each window that overlaps no other
    features: Tensor  # (CUTS, C)


def features(judge: Judge, windows: Tensor) -> Tensor:
    """The means (N, C) over windows (N, 3, H, W) in [-1, 1] of what the last block sees."""
    x = windows
    with torch.no_grad():
        for block in judge.blocks:
            x = block(x)
    return x.mean((2, 3))


def frechet(first: Tensor, second: Tensor) -> float:
    """The Frechet distance of the normal distributions of features (N, C) and (M, C)."""
    first, second = first.double(), second.double()
    means = (first.mean(0) - second.mean(0)).square().sum()
    one, two = (torch.cov(x.T) for x in (first, second))
    product = torch.linalg.eigvals(one @ two).real.clamp(min=0).sqrt().sum()
    return float(means + one.trace() + two.trace() - 2 * product)


def strangeness(found: Tensor, singles: Tensor) -> float:
    """The Frechet distance of features from those of single windows, over the latters' variance."""
    return frechet(found, singles) / float(torch.cov(singles.T.double()).trace())


def make(models: Models, prompt: str, seed: int, way: str) -> Tensor:
    """A ring (1, 3, H, W) in [0, 1]."""
    speed, weight = WAYS[way]
    pipe = models.pipelines["syncdiffusion"]
    side = pipe.window * pipe.vae_scale_factor
    picture: Tensor = pipe(
        prompt,
        side,
        WINDOWS * side,
        num_inference_steps=speed.num_inference_steps,
        guidance_scale=models.settings("syncdiffusion").guidance_scale,
        **levers(pipe, speed, speed.scheduler),
        sync_weight=weight,
        loop_closure=True,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return picture


def examine(models: Models, judge: Judge, wish: Wish, seed: int, way: str) -> Found:
    """Makes a ring and looks at it."""
    prompt, asked = wish
    started = time.perf_counter()
    picture = make(models, prompt, seed, way)
    seconds = time.perf_counter() - started
    side = picture.shape[-2]
    apart = torch.cat(picture.split(side, -1)) * 2 - 1
    seen = read(judge, apart, ATTRIBUTES)
    turns = range(0, picture.shape[-1], picture.shape[-1] // CUTS)
    cut = torch.cat([picture.roll(-turn, -1)[..., :side] for turn in turns]) * 2 - 1
    return Found(
        seconds=seconds,
        distance=coherence(judge, picture, side),
        seam=seam_ratio(picture),
        right=[all(facts[name] == value for name, value in asked.items()) for facts in seen],
        features=features(judge, cut),
    )


def kept(path: Path, count: int, find: Callable[[int], T]) -> list[T]:
    """The first of what `find` finds; a file keeps each, and a later run goes on from there."""
    found: list[T] = torch.load(path, weights_only=True) if path.exists() else []
    for index in range(len(found), count):
        found.append(find(index))
        torch.save(found, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    return found[:count]


def single_windows(models: Models, judge: Judge, wish: Wish, index: int) -> Tensor:
    """The features (SINGLES, C) of the family's own windows, each a picture of its own.

    They are denoised side by side, without overlap, and decoded one by one.
    """
    pipe = models.pipelines["syncdiffusion"]
    side = pipe.window * pipe.vae_scale_factor
    latents = pipe(
        wish[0],
        side,
        SINGLES * side,
        guidance_scale=models.settings("syncdiffusion").guidance_scale,
        sync_weight=0,
        stride=pipe.window,
        generator=torch.Generator().manual_seed(1000 + index),
        output_type="latent",
    ).images
    with torch.no_grad():
        pictures = [decode(pipe.vae, x) for x in latents.split(pipe.window, -1)]
    return features(judge, torch.cat(pictures).clamp(-1, 1))


def row(
    way: str, found: Sequence[Found], exact: Sequence[Found], singles: Tensor, networks: Networks
) -> str:
    """What is told of a way, in Markdown; where it stands beside exact, of the same pictures."""
    speed, weight = WAYS[way]
    setting = Setting(sync_threshold=5 if weight else 0)
    cells = [
        way,
        f"{operations(setting, speed, networks):.0f}",
        f"{min(f['seconds'] for f in found):.1f}",
        beside([f["distance"] for f in found], [f["distance"] for f in exact]),
        beside([mean(f["right"]) for f in found], [mean(f["right"]) for f in exact]),
        beside([f["seam"] for f in found], [f["seam"] for f in exact]),
        f"{strangeness(torch.cat([f['features'] for f in found]), singles):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def beside(values: Sequence[float], exact: Sequence[float]) -> str:
    """A mean, how much more that is than exact's, and the standard error of this difference.

    Both are of the same prompts and noise, so what differs between those drops out.
    """
    more = [value - other for value, other in zip(values, exact, strict=True)]
    return f"{mean(values):.3f} ({mean(more):+.3f} ± {stdev(more) / len(more) ** 0.5:.3f})"


HEADER = """\
| | operations, 10^12 | seconds, the least | distance of windows (beside exact) \
| agreement (beside exact) | seam ratio (beside exact) | Frechet distance, over variance |
|---|---|---|---|---|---|---|"""


def main() -> None:
    """Makes the pictures and prints the table; what was found of each picture is kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", help=f"of {', '.join(WAYS)}; all if none")
    parser.add_argument(
        "--seeds",
        type=int,
        default=24,
        help="pictures of each way, at least 2",
    )
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="a folder for what was found, a new one after any change",
    )
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds has to be at least 2, for a standard error")
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"unknown ways: {', '.join(sorted(unknown))}")
    models = load("tiny", modes=["syncdiffusion"], device="cpu")
    judge = load_judge(Judge(), "windows")
    options.work.mkdir(parents=True, exist_ok=True)

    def pictures(way: str) -> list[Found]:
        def find(index: int) -> Found:
            return examine(models, judge, WISHES[index % len(WISHES)], index, way)

        return kept(options.work / f"{way}.pt", options.seeds, find)

    def windows(index: int) -> Tensor:
        return single_windows(models, judge, WISHES[index % len(WISHES)], index)

    singles = torch.cat(kept(options.work / "singles.pt", options.seeds, windows))
    exact, networks = pictures("exact"), Networks()
    print(HEADER, flush=True)
    for way in options.ways or WAYS:
        print(row(way, pictures(way), exact, singles, networks), flush=True)
    floor = strangeness(singles[::2], singles[1::2])
    print(f"\nOne half of the single windows from the other, so of fewer: {floor:.2f}")


if __name__ == "__main__":
    main()
