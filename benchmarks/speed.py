"""The cost and the effect of each way to synchronise, as a Markdown table.

For each way, rings of five windows' width and flat strips of six are made on the tiny family,
from prompts that name a land and leave the palette open, which windows have to agree on. Columns:

- operations: those of Stable Diffusion 2 base at 2048 x 512, in units of 10^12.
- distance: mean perceptual distance of non-overlapping windows, and that of the worst image.
- edges, repetition, variety, seam: see `benchmarks/metrics.py`.
- agreement: the share of windows that show the land that was asked for.
- Frechet: the distance (arXiv 1706.08500) between windows and single images of the family, in the
  features of the judge's last block, over their variance.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TypedDict, TypeVar

import torch
from matplotlib import pyplot
from torch import Tensor

from benchmarks.coherence import SHAPES, Shape, keep
from benchmarks.figures import save
from benchmarks.metrics import coherence, repetition, variety
from benchmarks.operations import PUBLISHED_LOOP, STRIDE, Networks, calls_of
from panorama.images.vae import decode
from panorama.modes import Models, load
from panorama.pipeline import Pipeline, Settings
from panorama.quality import edge_ratio, seam_ratio
from panorama.sampling.presets import EXACT, FAST, Preset
from panorama.sampling.synchronize import SyncSettings
from panorama.sampling.views import Fixed
from weights.train.export import load_judge
from weights.train.measure import Wish, features, frechet_distance
from weights.train.recognise import Judge, read
from weights.train.scenes import LAND_WORDS

T = TypeVar("T")

GRADIENT = SyncSettings()
WAYS: Mapping[str, tuple[Preset, SyncSettings | None]] = {
    "published": (PUBLISHED_LOOP, GRADIENT),
    "MultiDiffusion": (PUBLISHED_LOOP, None),
    "no synchronising": (EXACT, None),
    "gradient": (EXACT, GRADIENT),
    "gradient, tiny decoder": (EXACT, replace(GRADIENT, tiny_decoder=True)),
    "means": (EXACT, replace(EXACT.sync(EXACT.sync_threshold), threshold=0)),
    "exact": (EXACT, EXACT.sync(EXACT.sync_threshold)),
    "fast, no synchronising": (FAST, None),
    "fast, gradient": (FAST, GRADIENT),
    "fast": (FAST, FAST.sync(FAST.sync_threshold)),
}
"""The ways that are compared."""
MODES = ("syncdiffusion", "syncdiffusion-xl")
CUTS = 32  # windows cut out of each panorama, for the distance of distributions
SINGLES = 12  # for each panorama
WISHES: Sequence[Wish] = tuple((words[0], {"land": land}) for land, words in LAND_WORDS.items())
"""The prompts, taken in turn, and the attributes that they ask for."""


class Found(TypedDict):
    """The measurements of one panorama."""

    seconds: float
    distance: float  # between its windows, by the judge
    edges: float
    seam: float  # meaningless where it is flat
    repetition: float
    right: list[bool]  # of each window that overlaps no other
    windows: Tensor  # those windows in 8 bits, (n, 3, h, w)
    features: Tensor  # (CUTS, C)


def settings_for(models: Models, prompt: str, shape: Shape, way: str) -> Settings:
    """Return the settings of a panorama, for the mode that was loaded."""
    ((mode, base),) = models.bases.items()
    preset, sync = WAYS[way]
    side = base.window * base.factor
    return Settings(
        prompt=f"{''.join(base.tokens)} {prompt}".strip(),
        height=side,
        width=shape.windows * side,
        closed=shape.closed,
        guidance_scale=models.settings(mode).guidance_scale,
        num_inference_steps=preset.num_inference_steps,
        scheduler=preset.scheduler,
        layout=preset.layout(STRIDE),
        sync=sync,
    )


def examine(
    models: Models, judge: Judge, shape: Shape, index: int, way: str, folder: Path | None
) -> Found:
    """Make a panorama and measure it."""
    prompt, asked = WISHES[index % len(WISHES)]
    (base,) = models.bases.values()
    settings, pipeline = settings_for(models, prompt, shape, way), Pipeline(base)
    started = time.perf_counter()
    image = pipeline(settings, torch.Generator().manual_seed(index))
    seconds = time.perf_counter() - started
    if folder:
        keep(image, folder / f"{way}-{index:02d}.png")
    side, width = image.shape[-2:]
    apart = torch.cat(image.split(side, -1)) * 2 - 1  # (n, 3, h, w)
    seen = read(judge, apart)
    turns = [k * (width if shape.closed else width - side) // CUTS for k in range(CUTS)]
    cut = torch.cat([image.roll(-turn, -1)[..., :side] for turn in turns]) * 2 - 1
    return Found(
        seconds=seconds,
        distance=coherence(judge, image, side),
        edges=edge_ratio(image, pipeline, settings, settings.num_inference_steps),
        seam=seam_ratio(image),
        repetition=repetition(image, side, ring=bool(shape.closed)),
        right=[all(facts[name] == value for name, value in asked.items()) for facts in seen],
        windows=apart.add(1).mul(127.5).round().byte(),
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
    settings = settings_for(models, wish[0], Shape("", SINGLES), "fast, no synchronising")
    settings = replace(settings, layout=Fixed(base.window))
    pipeline = Pipeline(base)
    noise = pipeline.noise(settings, torch.Generator().manual_seed(1000 + index))
    latents = pipeline.denoise(settings, pipeline.encode(settings), noise)
    with torch.no_grad():
        images = [decode(base.vae, x) for x in latents.split(base.window, -1)]
    return features(judge, torch.cat(images).clamp(-1, 1))


def varieties(judge: Judge, found: Sequence[Found]) -> float:
    """Return the variety between panoramas of one prompt, the mean over prompts with several."""
    windows = [f["windows"] / 127.5 - 1 for f in found]
    groups = [windows[first :: len(WISHES)] for first in range(len(WISHES))]
    return mean(variety(judge, group) for group in groups if len(group) > 1)


def cost(way: str, networks: Networks) -> float:
    """Return the operations of a way at 2048 x 512, in units of 10^12."""
    preset, sync = WAYS[way]
    if sync is None:
        return networks.operations(calls_of(preset, 0))
    preset = replace(preset, gradient=sync.threshold > 0)
    return networks.operations(calls_of(preset, sync.threshold, tiny_decoder=sync.tiny_decoder))


def row(
    name: str, way: str, found: Sequence[Found], judge: Judge, singles: Tensor, networks: Networks
) -> str:
    """Return the row of a way and a shape in Markdown."""
    distances, edges = [f["distance"] for f in found], [f["edges"] for f in found]
    cells = [
        f"{way}, {name}",
        f"{cost(way, networks):.0f}",
        f"{min(f['seconds'] for f in found):.1f}",
        f"{mean(distances):.3f} / {max(distances):.2f}",
        f"{mean(edges):.2f} / {max(edges):.2f}",
        f"{mean(f['seam'] for f in found):.2f}" if SHAPES[name].closed else "",
        f"{mean(f['repetition'] for f in found):.3f}",
        f"{varieties(judge, found):.3f}",
        f"{mean(right for f in found for right in f['right']):.3f}",
        f"{frechet_distance(torch.cat([f['features'] for f in found]), singles):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def plot(points: Sequence[tuple[str, str, float, float]], path: Path) -> None:
    """Draw distance against operations; each point is a way, a shape and the two values."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, marker in zip(SHAPES, "os", strict=True):
        chosen = [point for point in points if point[1] == name]
        axes.scatter([p[2] for p in chosen], [p[3] for p in chosen], marker=marker, label=name)
    for way in dict.fromkeys(point[0] for point in points):
        costs, distances = zip(*(point[2:] for point in points if point[0] == way), strict=True)
        axes.plot(costs, distances, color="grey", linewidth=0.5, zorder=0)
        place = costs[0], max(distances)
        axes.annotate(way, place, (0, 6), textcoords="offset points", fontsize=7, ha="center")
    axes.set(
        xscale="log",
        xlim=(min(p[2] for p in points) / 2, max(p[2] for p in points) * 2),
        xlabel="operations at 2048 x 512, 10^12",
        ylabel="mean distance between windows",
        ylim=(0, 1.1 * max(p[3] for p in points)),
    )
    axes.legend()
    save(figure, path)
    pyplot.close(figure)


HEADER = """\
| | operations, 10^12 | seconds, the least | distance, mean / worst | edges, mean / worst | seam \
| repetition | variety | agreement | Frechet |
|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Make the images and print the table; the measurements of each image are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", help=f"of {', '.join(WAYS)}; default: all")
    parser.add_argument("--seeds", type=int, default=24, help="images of each way and shape")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="a folder for the measurements, a new one after any change",
    )
    parser.add_argument("--keep", type=Path, help="a folder for the images")
    parser.add_argument("--plot", type=Path, help="an image of distance against operations")
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    options = parser.parse_args()
    if options.seeds <= len(WISHES):
        parser.error(f"--seeds must be more than the {len(WISHES)} prompts, for variety; try 24")
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"unknown ways: {', '.join(sorted(unknown))}")
    models = load("tiny", modes=[options.mode], device="cpu")
    judge, networks = load_judge(Judge(), "windows"), Networks()
    options.work.mkdir(parents=True, exist_ok=True)

    def windows(index: int) -> Tensor:
        return single_windows(models, judge, WISHES[index % len(WISHES)], index)

    singles = torch.cat(kept(options.work / "singles.pt", options.seeds, windows))
    print(HEADER, flush=True)
    points = []
    for way in options.ways or WAYS:
        for name in options.shapes:

            def find(index: int, way: str = way, name: str = name) -> Found:
                folder = options.keep and options.keep / name
                return examine(models, judge, SHAPES[name], index, way, folder)

            found = kept(options.work / f"{way}-{name}.pt", options.seeds, find)
            print(row(name, way, found, judge, singles, networks), flush=True)
            points.append((way, name, cost(way, networks), mean(f["distance"] for f in found)))
    if options.plot:
        plot(points, options.plot)
    floor = frechet_distance(singles[::2], singles[1::2])
    print(f"\nOne half of the single windows from the other, so of fewer: {floor:.2f}")


if __name__ == "__main__":
    main()
