"""Measure the embedded family on held-out data: `python -m weights.train.measure --help`.

The output is the figures of the model card. For syncdiffusion: the autoencoder's PSNR, the judge's
own accuracy, and how often images show what their prompt asked for. For sdxl-360: the same for its
judge and its images, and how closely images follow a depth image. For syncdiffusion-xl: how closely
its rings follow the same depth images. Both SDXL modes are measured with the LoRA at its default
strength, and again without it.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from panorama.modes import DEFAULT_FAMILY, Models, load
from panorama.pipeline import Pipeline
from panorama.request import INPUTS, ModeSettings, Request
from weights.train import autoencoder, dataset, rooms, scenes
from weights.train.__main__ import WORK
from weights.train.depths import DepthReader, around, cells, correlation, depth_image
from weights.train.export import load_judge
from weights.train.recognise import (
    ATTRIBUTES,
    SPHERE_ATTRIBUTES,
    Attributes,
    Judge,
    accuracy,
    read,
)
from weights.train.sdxl import CAPTIONS, PREFIX, SUBJECTS

STEPS = 30
DEPTHS = 24  # held-out depth images of each kind

Wish = tuple[str, Mapping[str, object]]
"""A prompt, and the attributes that it asks for."""
Make = Callable[..., Tensor]
"""A function from a prompt and a seed to an image (1, 3, H, W) in [0, 1]."""


def make_image(models: Models, request: Request, **changes: Any) -> Tensor:
    """Make the image (1, 3, H, W) in [0, 1] of a request that has a seed.

    Args:
        models: the family.
        request: the request to make an image of.
        changes: settings of the pipeline that replace those of the request.
    """
    settings = replace(models.prepare(request).settings(), **changes)
    generator = torch.Generator().manual_seed(request.seed)
    return Pipeline(models.bases[request.mode])(settings, generator).cpu()


def wished_landscapes(prefix: str = "") -> Iterator[Wish]:
    """Yield every pair of time and land."""
    for time, land in product(scenes.SKIES, scenes.LANDS):
        words = f"{scenes.TIME_WORDS[time][0]} over {scenes.LAND_WORDS[land][0]}"
        yield prefix + words, {"time": time, "land": land}


def wished_rooms(prefix: str) -> Iterator[Wish]:
    """Yield every pair of kind and colour."""
    for kind, color in product(rooms.KINDS, rooms.COLORS):
        yield f"{prefix}{kind} in the color of {color}", {"kind": kind, "color": color}


WISHES: Mapping[str, tuple[Sequence[Wish], int]] = {
    "outdoors": (tuple(wished_landscapes(PREFIX)), 2),
    "rooms": (tuple(wished_rooms(PREFIX)), 4),
}
"""The wishes for spheres of each kind, and how many are made of each wish."""


def agreement(
    make: Make,
    judge: Judge,
    attributes: Attributes,
    wishes: Sequence[Wish],
    seeds: int,
    sheet: Path | None,
) -> dict[str, float]:
    """Return the share of images in which a judge reads each attribute, and all, as wished.

    Args:
        make: makes an image.
        judge: reads attributes.
        attributes: the values of those attributes.
        wishes: the prompts, and the attributes that they ask for.
        seeds: the number of images made for each wish.
        sheet: a PNG to write of all images at half their size, a row for each wish.
    """
    hits: dict[str, list[bool]] = {name: [] for name in (*wishes[0][1], "all")}
    tiles = []
    for (prompt, wish), seed in product(wishes, range(seeds)):
        image = make(prompt, seed)
        with torch.no_grad():
            (seen,) = read(judge, image * 2 - 1, attributes)
        for name, value in wish.items():
            hits[name].append(seen[name] == value)
        hits["all"].append(all(hits[name][-1] for name in wish))
        tiles.append(F.avg_pool2d(image, 2)[0])
    if sheet:
        save_sheet(tiles, seeds, sheet)
    return {name: float(np.mean(values)) for name, values in hits.items()}


def save_sheet(tiles: Sequence[Tensor], columns: int, path: Path) -> None:
    """Write images (3, H, W) in [0, 1] of one size as a grid."""
    rows = [torch.cat(list(tiles[i : i + columns]), -1) for i in range(0, len(tiles), columns)]
    pixels = torch.cat(rows, -2).permute(1, 2, 0).mul(255).round().byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def measure_syncdiffusion(models: Models, work: Path, sheets: Path | None) -> None:
    """Print the table of syncdiffusion."""
    base = models.bases["syncdiffusion"]
    for kind in dataset.KINDS:
        held_out = dataset.load(work, kind, "test")
        print(f"autoencoder PSNR, {kind}: {autoencoder.psnr(base.vae, held_out.rgb):.2f} dB")
    judge = load_judge(Judge(), "windows")
    held_out = dataset.load(work, "strips", "test")
    for name, share in accuracy(judge, held_out, 256, ATTRIBUTES).items():
        print(f"judge on held-out strips, {name}: {share:.1%}")
    size = base.window * base.factor

    def make(prompt: str, seed: int) -> Tensor:
        request = Request(
            prompt=prompt,
            width=size,
            height=size,
            num_inference_steps=STEPS,
            sync_weight=0.0,
            seed=seed,
        )
        return make_image(models, request)

    wishes, sheet = list(wished_landscapes()), sheets and sheets / "windows.png"
    shares = agreement(make, judge, ATTRIBUTES, wishes, 4, sheet)
    for name, share in shares.items():
        print(f"prompt agreement over {4 * len(wishes)} windows, {name}: {share:.1%}")


def lora_scales(settings: ModeSettings) -> tuple[float, ...]:
    """Return the strengths of the LoRA to measure: the default of requests, and none."""
    return (float(INPUTS["lora_scale"].default), 0.0) if settings.tokens else (0.0,)


def measure_sdxl_360(models: Models, work: Path, sheets: Path | None) -> None:
    """Print the table of sdxl-360."""
    settings = models.settings("sdxl-360")
    judge = load_judge(Judge(SPHERE_ATTRIBUTES), "spheres")
    for kind, (wishes, _) in WISHES.items():
        asked = {name: SPHERE_ATTRIBUTES[name] for name in wishes[0][1]}
        shares = accuracy(judge, dataset.load(work, kind, "test"), settings.width, asked)
        for name, share in shares.items():
            print(f"judge on held-out {kind}, {name}: {share:.1%}")
    for scale in lora_scales(settings):
        print(f"with lora_scale {scale:g}:")
        make = make_spheres(models, "sdxl-360", scale)
        measure_agreement(make, judge, sheets and sheets / f"lora-{scale:g}")


def measure_depths(models: Models, mode: str, work: Path) -> None:
    """Print how closely images of a mode follow a depth image."""
    for scale, kind in product(lora_scales(models.settings(mode)), WISHES):
        for name, means in depth_correlations(
            make_spheres(models, mode, scale), work, kind
        ).items():
            values = ", ".join(f"{what} {mean:.3f}" for what, mean in means.items())
            print(
                f"with lora_scale {scale:g}, depth correlation over {DEPTHS} {kind}, "
                f"{name}: {values}",
                flush=True,
            )


SPHERES: dict[str, Mapping[str, Any]] = {
    "sdxl-360": {},
    "syncdiffusion-xl": {"width": 512, "height": 256, "loop_closure": True},
}
"""The modes that follow depth images, with their inputs for a sphere."""


def make_spheres(models: Models, mode: str, lora_scale: float) -> Make:
    """Return a maker of spheres with a strength of the LoRA, as requests make them."""

    def make(prompt: str, seed: int, depth: Tensor | None = None) -> Tensor:
        request = Request(
            prompt=prompt,
            mode=mode,
            lora_scale=lora_scale,
            num_inference_steps=STEPS,
            seed=seed,
            **SPHERES[mode],
        )
        return make_image(models, request, depth=depth)

    return make


def step(image: Tensor) -> float:
    """Return the mean step between neighbouring columns of (1, 3, H, W) in [0, 1], in grey levels.

    A style of crisp outlines raises it.
    """
    return float(image.diff(dim=-1).abs().mean() * 255)


def measure_agreement(make: Make, judge: Judge, sheets: Path | None) -> None:
    """Print how often spheres show what their prompt asks for."""
    for kind, (wishes, seeds) in WISHES.items():
        sheet = sheets and sheets / f"{kind}.png"
        steps: list[float] = []

        def watched(prompt: str, seed: int, seen: list[float] = steps) -> Tensor:
            image = make(prompt, seed)
            seen.append(step(image))
            return image

        shares = agreement(watched, judge, SPHERE_ATTRIBUTES, wishes, seeds, sheet)
        for name, share in shares.items():
            print(f"prompt agreement over {len(steps)} {kind}, {name}: {share:.1%}")
        print(f"mean step between columns of {kind}: {np.mean(steps):.2f} grey levels")


def depth_correlations(make: Make, work: Path, kind: str) -> dict[str, dict[str, float]]:
    """Correlate the depth that is read off images with the depth given.

    Args:
        make: makes an image, with `depth` (H, W) or without.
        work: the folder of the held-out images, of the same size.
        kind: the kind of the images.

    Returns:
        For images that follow the depth image, for those of its caption alone, and for the render
        itself: Pearson's correlation, the mean over images, as it is and after each row's mean is
        taken out.
    """
    reader = load_judge(DepthReader(), "depths")
    held_out = dataset.load(work, kind, "test")
    rng = np.random.default_rng(0)
    found: dict[str, list[Tensor]] = {"depth image": [], "text alone": [], "render": []}
    for index in range(DEPTHS):
        subject = SUBJECTS[kind](**held_out.attributes[index])
        prompt = PREFIX + CAPTIONS[type(subject)](subject, rng, keep=1.0)
        depth = torch.from_numpy(depth_image(held_out.distance[index]))
        images = {
            "depth image": make(prompt, index, depth=depth) * 2 - 1,
            "text alone": make(prompt, index) * 2 - 1,
            "render": autoencoder.to_tensor(held_out.rgb[index][None]),
        }
        given = cells(depth[None])
        for name, image in images.items():
            with torch.no_grad():
                seen = reader(image)
            pair = [correlation(seen, given), correlation(around(seen), around(given))]
            found[name].append(torch.cat(pair))
    means = {name: torch.stack(values).mean(0).tolist() for name, values in found.items()}
    return {
        name: {"as it is": whole, "less each row's mean": rest}
        for name, (whole, rest) in means.items()
    }


MEASURES: Mapping[str, Callable[[Models, Path, Path | None], None]] = {
    "syncdiffusion": measure_syncdiffusion,
    "sdxl-360": measure_sdxl_360,
}
"""The functions that print the figures of each mode, except those of depth."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modes", nargs="*", help="default: all of the family")
    parser.add_argument("--family", default=DEFAULT_FAMILY)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--sheets", type=Path, help="a folder for PNGs of the images judged")
    parser.add_argument("--depths-only", action="store_true", help="leave out all but depth")
    arguments = parser.parse_args()
    for kind in dataset.KINDS:
        dataset.render_set(arguments.work, kind, "test", workers=2)
    models = load(arguments.family, modes=arguments.modes or None)
    for mode in models.bases:
        print(f"{mode}:")
        if mode in MEASURES and not arguments.depths_only:
            MEASURES[mode](models, arguments.work, arguments.sheets)
        if mode in SPHERES:
            measure_depths(models, mode, arguments.work)


if __name__ == "__main__":
    main()
