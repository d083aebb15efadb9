"""What each lever of speed costs and does, as the table of docs/speed.md.

For each way, rings of five windows' width are made on the embedded family, one from each prompt of
a time and a land. Coherence, agreement and the seam are measured on each; the distance of
distributions is Frechet's (arXiv 1706.08500), between windows from all around the rings and single
windows of the family, in the features of the judge's last block.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from panorama.models import Models, levers, load
from panorama.request import SPEEDS, Speed
from script.coherence import WINDOWS, coherence, seam_ratio
from script.operations import Networks, Setting, operations
from weights.train.export import load_judge
from weights.train.measure import Wish, wished_landscapes
from weights.train.recognise import ATTRIBUTES, Judge, read

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
SINGLES = 21  # of each prompt


@dataclass(frozen=True)
class Found:
    """What was found of one ring."""

    seconds: float
    distance: float  # between its windows, by the judge
    seam: float
    right: Sequence[bool]  # of each window that overlaps no other
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


def make(models: Models, prompt: str, seed: int, way: str, width: int) -> Tensor:
    """A picture (1, 3, H, W) in [0, 1]; a ring, if it is wider than a window."""
    speed, weight = WAYS[way]
    pipe = models.pipelines["syncdiffusion"]
    side = pipe.window * pipe.vae_scale_factor
    picture: Tensor = pipe(
        prompt,
        side,
        width * side,
        num_inference_steps=speed.num_inference_steps,
        guidance_scale=models.settings("syncdiffusion").guidance_scale,
        **levers(pipe, speed, speed.scheduler),
        sync_weight=weight,
        loop_closure=width > 1,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return picture


def examine(models: Models, judge: Judge, wish: Wish, seed: int, way: str) -> Found:
    """Makes a ring and looks at it."""
    prompt, asked = wish
    started = time.perf_counter()
    picture = make(models, prompt, seed, way, WINDOWS)
    seconds = time.perf_counter() - started
    side = picture.shape[-2]
    apart = torch.cat(picture.split(side, -1)) * 2 - 1
    seen = read(judge, apart, ATTRIBUTES)
    turns = range(0, picture.shape[-1], picture.shape[-1] // CUTS)
    cut = torch.cat([picture.roll(-turn, -1)[..., :side] for turn in turns]) * 2 - 1
    return Found(
        seconds,
        coherence(judge, picture, side),
        seam_ratio(picture),
        [all(facts[name] == value for name, value in asked.items()) for facts in seen],
        features(judge, cut),
    )


def single_windows(models: Models, judge: Judge, wishes: Sequence[Wish], path: Path) -> Tensor:
    """The features of the family's own windows, each a picture of its own; kept in a file."""
    if path.exists():
        kept: Tensor = torch.load(path)
        return kept
    found = []
    for prompt, _ in wishes:
        for seed in range(SINGLES):
            picture = make(models, prompt, 1000 + seed, "no synchronising", 1)
            found.append(features(judge, picture * 2 - 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.cat(found), path)
    return torch.cat(found)


def row(way: str, found: Sequence[Found], singles: Tensor, networks: Networks) -> dict[str, Any]:
    """What is told of a way."""
    speed, weight = WAYS[way]
    setting = Setting(sync_threshold=5 if weight else 0)
    distances, seams = [f.distance for f in found], [f.seam for f in found]
    return {
        "way": way,
        "operations": operations(setting, speed, networks),
        "seconds": mean(f.seconds for f in found),
        "distance": mean(distances),
        "distance (sd)": stdev(distances),
        "agreement": mean(right for f in found for right in f.right),
        "seam": mean(seams),
        "seam (sd)": stdev(seams),
        "frechet": frechet(torch.cat([f.features for f in found]), singles),
        "pictures": len(found),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| | operations, 10^12 | seconds | distance of windows (sd) | agreement | seam ratio (sd) "
        "| Frechet distance |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['way']} | {r['operations']:.0f} | {r['seconds']:.1f} "
        f"| {r['distance']:.3f} ({r['distance (sd)']:.3f}) | {r['agreement']:.1%} "
        f"| {r['seam']:.2f} ({r['seam (sd)']:.2f}) | {r['frechet']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Makes the pictures; what was found of a way is kept, and a later run goes on from there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", help=f"of {', '.join(WAYS)}; all if none")
    parser.add_argument("--seeds", type=int, default=24, help="pictures of each way")
    parser.add_argument("--work", type=Path, required=True, help="a folder for what was found")
    options = parser.parse_args()
    models = load("tiny", modes=["syncdiffusion"], device="cpu")
    judge = load_judge(Judge(), "windows")
    wishes = list(wished_landscapes())
    singles = single_windows(models, judge, wishes[: options.seeds], options.work / "singles.pt")
    networks = Networks()
    rows = []
    for way in options.ways or WAYS:
        path = options.work / f"{way}.json"
        if not path.exists():
            found = [
                examine(models, judge, wish, seed, way)
                for seed, wish in enumerate(wishes[: options.seeds])
            ]
            path.write_text(json.dumps(row(way, found, singles, networks)))
        rows.append(json.loads(path.read_text()))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
