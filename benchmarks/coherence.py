"""Coherence and seams on the tiny family, over many seeds, as a table for each mode.

syncdiffusion, syncdiffusion-xl: for every sync_weight, rings of five windows' width and flat strips
of six are made from a prompt that leaves the palette open. The distance is the mean perceptual
distance of all pairs of non-overlapping windows, by a network that has no part in making images.
`benchmarks/metrics.py` explains the other columns.

sdxl-360: the seam ratio and the Discontinuity Score with circular padding and, from the same noise,
without it; where there is a LoRA, at the strength that requests have by default, and at 0. Then
`benchmarks/spheres.py` compares enlarged spheres and redrawn poles with held-out renders.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, pstdev

import torch
from torch import Tensor

from benchmarks import spheres
from benchmarks.metrics import coherence, discontinuity_score, repetition, variety
from panorama.images.vae import to_pil
from panorama.modes import DEFAULT_FAMILY, load
from panorama.pipeline import Pipeline
from panorama.quality import edge_ratio, seam_ratio
from panorama.request import Request
from panorama.sampling.canvas import Axis
from weights.train import dataset
from weights.train.__main__ import WORK
from weights.train.depths import DepthReader
from weights.train.export import load_judge
from weights.train.measure import lora_scales, make_image
from weights.train.recognise import Judge

PROMPTS = {
    "syncdiffusion": "autumn hills with trees",
    "syncdiffusion-xl": "autumn hills with trees",
    "sdxl-360": "hdri view, sunset over green hills",
}
PADDINGS: Mapping[str, Axis] = {"circular": "x", "zeros": ""}


@dataclass(frozen=True)
class Shape:
    """The shape of a panorama one window high."""

    closed: Axis
    windows: int  # width, in windows


SHAPES: Mapping[str, Shape] = {"ring": Shape("x", 5), "strip": Shape("", 6)}


def table_windows(arguments: argparse.Namespace) -> None:
    """Print the coherence of a mode with windows, for every shape and sync_weight."""
    models = load(arguments.family, modes=[arguments.mode])
    base = models.bases[arguments.mode]
    if arguments.distance_scale is not None:
        base.perceptual.register_to_config(distance_scale=arguments.distance_scale)
    window = base.window * base.factor
    judge = load_judge(Judge(), "windows")
    print(f"{arguments.prompt!r}, windows of {window}, {arguments.seeds} seeds")
    print("       sync_weight  distance (sd)    worst   change  edges  repetition  variety  seam")
    for name, shape in SHAPES.items():
        reference = None
        for weight in arguments.weights:
            request = Request(
                prompt=arguments.prompt,
                mode=arguments.mode,
                width=shape.windows * window,
                height=window,
                num_inference_steps=arguments.steps,
                speed=arguments.speed,
                sync_weight=weight,
                loop_closure=bool(shape.closed),
            )
            images = []
            for seed in range(arguments.seeds):
                images.append(make_image(models, replace(request, seed=seed)))
                if arguments.keep:
                    keep(images[-1], arguments.keep / f"{name}-{weight:g}-{seed:02d}.png")
            distances = [coherence(judge, image, window) for image in images]
            reference = reference or mean(distances)
            pipeline, settings = Pipeline(base), models.prepare(request).settings()
            steps = settings.num_inference_steps
            panoramas = [torch.cat(image.split(window, -1)) * 2 - 1 for image in images]
            print(
                f"{name:5}  {weight:11g}  {mean(distances):.4f} ({pstdev(distances):.4f})"
                f"  {max(distances):.3f}  {mean(distances) / reference - 1:+6.1%}"
                f"  {mean(edge_ratio(i, pipeline, settings, steps) for i in images):5.2f}"
                f"  {mean(repetition(i, window, ring=bool(shape.closed)) for i in images):10.3f}"
                f"  {variety(judge, panoramas):7.3f}"
                + (f"  {mean(map(seam_ratio, images)):.3f}" if shape.closed else ""),
                flush=True,
            )


def table_sdxl_360(arguments: argparse.Namespace) -> None:
    """Print the seam with and without circular padding, with the LoRA as in use and without it."""
    models = load(arguments.family, modes=["sdxl-360"])
    settings = models.settings("sdxl-360")
    print(f"{arguments.prompt!r}, {settings.width} x {settings.height}, {arguments.seeds} seeds")
    print("lora_scale  padding   seam ratio (sd)  discontinuity score (sd)", flush=True)
    for scale, (name, closed) in product(lora_scales(settings), PADDINGS.items()):
        seams, scores = [], []
        for seed in range(arguments.seeds):
            request = Request(
                prompt=arguments.prompt,
                mode="sdxl-360",
                lora_scale=scale,
                num_inference_steps=arguments.steps,
                seed=seed,
            )
            image = make_image(models, request, closed=closed)
            seams.append(seam_ratio(image))
            scores.append(discontinuity_score(image))
            if arguments.keep:
                keep(image, arguments.keep / f"{name}-{scale:g}-{seed:02d}.png")
        print(
            f"{scale:10g}  {name:8}  {mean(seams):6.3f} ({pstdev(seams):.3f})"
            f"   {mean(scores):.3f} ({pstdev(scores):.3f})",
            flush=True,
        )


def table_spheres(arguments: argparse.Namespace) -> None:
    """Print what enlarging and redrawing poles change, and how closely depth is followed."""
    models = load(arguments.family, modes=["sdxl-360"])
    dataset.render_set(arguments.work, "outdoors", "test")
    found = spheres.held_out(dataset.load(arguments.work, "outdoors", "test"), arguments.seeds)

    def keep_named(image: Tensor, name: str) -> None:
        if arguments.keep:
            keep(image, arguments.keep / f"{name}.png")

    print(f"{len(found)} held-out landscapes, means")
    make = spheres.Maker(models, arguments.steps, keep_named)
    spheres.print_spheres(make, found)
    spheres.print_depths(make, found, load_judge(DepthReader(), "depths"))


def keep(image: Tensor, path: Path) -> None:
    """Write an image (1, 3, H, W) in [0, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(image).save(path)


TABLES: Mapping[str, Sequence[Callable[[argparse.Namespace], None]]] = {
    "syncdiffusion": [table_windows],
    "syncdiffusion-xl": [table_windows],
    "sdxl-360": [table_sdxl_360, table_spheres],
}


def main() -> None:
    """Make the images and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=TABLES, default="syncdiffusion")
    parser.add_argument("--family", default=DEFAULT_FAMILY)
    parser.add_argument("--prompt", help="defaults to the mode's own")
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--steps", type=int, help="defaults to the mode's own")
    parser.add_argument("--keep", type=Path, help="a folder for the images")
    parser.add_argument("--work", type=Path, default=WORK, help="where held-out images are")
    windows = parser.add_argument_group("modes with windows")
    windows.add_argument("--weights", type=float, nargs="+", default=[0.0, 20.0])
    windows.add_argument("--speed", help="exact or fast; defaults to the mode's own")
    windows.add_argument("--distance-scale", type=float, help="another scale of the distance")
    arguments = parser.parse_args()
    arguments.prompt = arguments.prompt or PROMPTS[arguments.mode]
    for table in TABLES[arguments.mode]:
        table(arguments)


if __name__ == "__main__":
    main()
