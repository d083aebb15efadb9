"""Measure the tiny family on held-out data: `python -m weights.train.measure --help`.

The output is the figures of the model card. For syncdiffusion: the autoencoder's PSNR, the judge's
own accuracy, how often windows show what their prompt asked for, and how close to renders they are.
For sdxl-360: how often spheres show what was asked for, and how closely they follow a depth image.
For syncdiffusion-xl: how closely its rings follow the same depth images.
"""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from panorama.conditioning.depth import from_distance
from panorama.modes import DEFAULT_FAMILY, Models, load
from panorama.pipeline import Pipeline
from panorama.quality import sharpness
from panorama.request import INPUTS, ModeSettings, Request
from weights.train import autoencoder, dataset, rooms, scenes
from weights.train.__main__ import WORK
from weights.train.depths import (
    CELL,
    DepthReader,
    cells,
    correlation,
    depth_image,
    shape_correlation,
)
from weights.train.export import load_judge
from weights.train.recognise import ATTRIBUTES, SPHERE_ATTRIBUTES, WINDOW, Judge, read
from weights.train.scenes import LAND_WORDS, TIME_WORDS
from weights.train.sdxl import PREFIX
from weights.train.views import Change, Pixels, halve, to_tensor

STEPS = 30
DEPTHS = 24  # held-out depth images of each kind
SKYLINES = 24  # windows of snowy mountains
RISE = 8.0  # degrees that their skyline has to rise
MOUNTS = (0.06, 0.3)
"""The range of depth that mountains have: more than the sky, less than trees."""

Facts = Mapping[str, object]
"""The attributes of an image."""
Wish = tuple[str, Facts]
"""A prompt, and the attributes that it asks for."""
Make = Callable[..., Tensor]
"""A function from a prompt and a seed to an image (1, 3, H, W) in [0, 1]."""


@dataclass(frozen=True)
class Measuring:
    """The models, images and settings of a measurement."""

    models: Models
    work: Path
    sheets: Path | None  # a folder for contact sheets
    windows: int  # generated for the Frechet distance

    def held_out(self, kind: str) -> dataset.Images:
        """Return the held-out images of a kind."""
        return dataset.load(self.work, kind, "test")


def make_image(models: Models, request: Request, **changes: Any) -> Tensor:
    """Make the image (1, 3, H, W) in [0, 1] of a request that has a seed.

    Changes replace settings of the pipeline that follow from the request.
    """
    settings = replace(models.prepare(request).settings(), **changes)
    generator = torch.Generator().manual_seed(request.seed)
    return Pipeline(models.bases[request.mode])(settings, generator).cpu()


def make_prompted(
    models: Models, prompt: str, seed: int, depth: Tensor | None = None, **inputs: Any
) -> Tensor:
    """Make the image (1, 3, H, W) in [0, 1] of a prompt, which follows a depth image if given."""
    request = Request(prompt=prompt, seed=seed, num_inference_steps=STEPS, **inputs)
    return make_image(models, request, depth=depth)


LANDSCAPES: Sequence[Wish] = tuple(
    (f"{times[0]} over {lands[0]}", {"time": time, "land": land})
    for (time, times), (land, lands) in product(TIME_WORDS.items(), LAND_WORDS.items())
)
ROOMS: Sequence[Wish] = tuple(
    (f"{kind} in the color of {color}", {"kind": kind, "color": color})
    for kind, color in product(rooms.KINDS, rooms.COLORS)
)
WISHES: Mapping[str, tuple[Sequence[Wish], int]] = {
    "outdoors": (LANDSCAPES, 2),
    "rooms": (ROOMS, 4),
}
"""The wishes for spheres of each kind, and how many are made of each wish."""


def shares(
    seen: Sequence[Facts], right: Sequence[Facts], names: Collection[str], both: str
) -> dict[str, float]:
    """Return the share of images in which each attribute, and in which the first two are right."""
    hits = np.array([[a[n] == b[n] for n in names] for a, b in zip(seen, right, strict=True)])
    values = [*hits.mean(0).tolist(), float(hits[:, :2].all(1).mean())]
    return dict(zip((*names, both), values, strict=True))


def accuracy(
    judge: Judge, images: dataset.Images, show: Change, names: Sequence[str]
) -> dict[str, float]:
    """Return the share of spheres, as shown, of which a judge reads each attribute right."""
    seen = [read(judge, to_tensor(show(image)[None]))[0] for image in images.rgb]
    return shares(seen, images.attributes, names, " and ".join(names[:2]))


def agreement(
    make: Make, judge: Judge, wishes: Sequence[Wish], seeds: int, sheet: Path | None
) -> dict[str, float]:
    """Return the share of images in which a judge reads each attribute, and all, as wished.

    As many are made of each wish as there are seeds. If there is to be a sheet, it shows all images
    at half their size, a row for each wish.
    """
    seen, tiles = [], []
    for (prompt, _), seed in product(wishes, range(seeds)):
        image = make(prompt, seed)
        seen += read(judge, image * 2 - 1)
        tiles.append(F.avg_pool2d(image, 2)[0])
    if sheet:
        save_sheet(tiles, seeds, sheet)
    asked = [facts for _, facts in wishes for _ in range(seeds)]
    return shares(seen, asked, wishes[0][1], "all")


def save_sheet(tiles: Sequence[Tensor], columns: int, path: Path) -> None:
    """Write images (3, H, W) in [0, 1] of one size as a grid."""
    rows = [torch.cat(list(tiles[i : i + columns]), -1) for i in range(0, len(tiles), columns)]
    pixels = torch.cat(rows, -2).permute(1, 2, 0).mul(255).round().byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=90)


def window(sphere: Pixels) -> Pixels:
    """Return the first window of a strip of a sphere (H, W, 3)."""
    return sphere[scenes.STRIP, :WINDOW]


def measure_syncdiffusion(given: Measuring) -> None:
    """Print the table of syncdiffusion."""
    base = given.models.bases["syncdiffusion"]
    for kind, show in (
        ("outdoors", lambda sphere: sphere[scenes.STRIP]),
        ("rooms", halve),
        ("rooms", np.asarray),
    ):
        images = [show(image) for image in given.held_out(kind).rgb]
        size = f"{images[0].shape[1]} x {images[0].shape[0]}"
        print(f"autoencoder PSNR, {kind}, {size}: {autoencoder.psnr(base.vae, images):.2f} dB")
    judge = load_judge(Judge(), "windows")
    for name, share in accuracy(judge, given.held_out("outdoors"), window, [*ATTRIBUTES]).items():
        print(f"judge on held-out windows, {name}: {share:.1%}")
    side, sheet = base.window * base.factor, given.sheets and given.sheets / "windows.jpg"
    inputs = {"width": side, "height": side, "sync_weight": 0.0, "scheduler": "dpm++"}
    make = partial(make_prompted, given.models, **inputs)
    for name, share in agreement(make, judge, LANDSCAPES, 4, sheet).items():
        print(f"prompt agreement over {4 * len(LANDSCAPES)} windows, {name}: {share:.1%}")
    measure_skylines(make, given)
    measure_likeness(make, judge, given)


def measure_skylines(make: Make, given: Measuring) -> None:
    """Print how often the skyline of snowy mountains rises by RISE."""
    reader = load_judge(DepthReader(), "depths")
    held_out = given.held_out("outdoors")
    renders = [
        window(image)
        for image, facts in zip(held_out.rgb, held_out.attributes, strict=True)
        if facts["land"] == "snowy mountains"
    ]
    made = torch.cat([make("snowy mountains", seed) for seed in range(SKYLINES)]) * 2 - 1
    for name, images in (("renders", to_tensor(np.stack(renders))), ("windows", made)):
        depth = reader(images)  # (N, H / CELL, W / CELL)
        mounts = ((depth > MOUNTS[0]) & (depth < MOUNTS[1])).any(-1)  # (N, H / CELL)
        rows = mounts.float().argmax(1) * CELL + scenes.STRIP.start  # of the highest cells' tops
        rises = mounts.any(1) & (90 - 180 * rows / scenes.HEIGHT >= RISE)
        share = float(rises.float().mean())
        print(f"skyline of {len(rows)} {name} of snowy mountains >= {RISE:g} degrees: {share:.1%}")


def measure_likeness(make: Make, judge: Judge, given: Measuring) -> None:
    """Print sharpness of windows and their Frechet distance to as many held-out renders.

    The windows' captions name all that the renders show, or leave out as much as those of training.
    Where a caption leaves something out, the model chooses. No caption says that there are no
    clouds, so windows of captions that name everything do not show exactly what the renders do.
    """
    held_out = given.held_out("outdoors")
    for name, keep in {"that name everything": 1.0, "as in training": scenes.KEEP}.items():
        rng, found, made = np.random.default_rng(0), [], []
        pairs = cycle(zip(held_out.rgb, held_out.attributes, strict=True))
        described = ((image, scenes.Scene(**facts).caption(rng, keep)) for image, facts in pairs)
        captioned = ((image, text) for image, text in described if text)  # a request needs a prompt
        for seed, (image, text) in enumerate(islice(captioned, given.windows)):
            made.append(make(text, seed))
            turned = np.roll(image, -int(rng.integers(image.shape[1])), 1)
            found.append(to_tensor(window(turned)[None]) / 2 + 0.5)
        ours, renders = torch.cat(made), torch.cat(found)
        seen = [features(judge, images * 2 - 1) for images in (ours, renders)]
        print(
            f"{len(ours)} windows of captions {name}: "
            f"sharpness over that of renders {sharpness(ours) / sharpness(renders):.3f}, "
            f"Frechet distance over the variance {frechet_distance(*seen):.3f}",
            flush=True,
        )


@torch.no_grad()
def features(judge: Judge, windows: Tensor) -> Tensor:
    """Return the means (N, C) of the last block's features of windows (N, 3, H, W) in [-1, 1]."""
    return judge.blocks(windows)[-1].mean((2, 3))


def frechet_distance(found: Tensor, singles: Tensor) -> float:
    """Return how far features (N, C) are from those of single windows (M, C), over their variance.

    It is the Frechet distance of the normal distributions, as in FID.
    """
    found, singles = found.double(), singles.double()
    means = (found.mean(0) - singles.mean(0)).square().sum()
    one, two = (torch.cov(x.T) for x in (found, singles))
    product = torch.linalg.eigvals(one @ two).real.clamp(min=0).sqrt().sum()
    return float(means + one.trace() + two.trace() - 2 * product) / float(two.trace())


def lora_scales(settings: ModeSettings) -> tuple[float, ...]:
    """Return the strengths of the LoRA to measure: the default of requests, and none."""
    return (float(INPUTS["lora_scale"].default), 0.0) if settings.has_lora else (0.0,)


def measure_sdxl_360(given: Measuring) -> None:
    """Print the table of sdxl-360."""
    settings = given.models.settings("sdxl-360")
    judge = load_judge(Judge(SPHERE_ATTRIBUTES), "spheres")
    for kind, (wishes, _) in WISHES.items():
        for name, share in accuracy(judge, given.held_out(kind), halve, [*wishes[0][1]]).items():
            print(f"judge on held-out {kind}, {name}: {share:.1%}")
    for scale, (kind, (wishes, seeds)) in product(lora_scales(settings), WISHES.items()):
        sheet = given.sheets and given.sheets / f"{kind}-{scale:g}.jpg"
        make = make_spheres(given.models, "sdxl-360", scale)
        prefixed = [(PREFIX + prompt, facts) for prompt, facts in wishes]
        found = agreement(make, judge, prefixed, seeds, sheet)
        for name, share in found.items():
            print(f"with lora_scale {scale:g}, {len(wishes) * seeds} {kind}, {name}: {share:.1%}")


SPHERE_INPUTS: dict[str, Mapping[str, Any]] = {
    "sdxl-360": {},
    "syncdiffusion-xl": {"width": 2 * WINDOW, "height": WINDOW, "loop_closure": True},
}
"""The modes that follow depth images, with their inputs for a sphere."""


def make_spheres(models: Models, mode: str, lora_scale: float) -> Make:
    """Return a maker of spheres with a strength of the LoRA, as requests make them."""
    return partial(make_prompted, models, mode=mode, lora_scale=lora_scale, **SPHERE_INPUTS[mode])


def measure_depths(given: Measuring, mode: str) -> None:
    """Print how closely images of a mode follow depth images."""
    for scale, kind in product(lora_scales(given.models.settings(mode)), dataset.SETS):
        make, held_out = make_spheres(given.models, mode, scale), given.held_out(kind)
        seen = "vertical steps" if kind == dataset.EMPTY else "depth"
        for name, (whole, rest) in correlations(make, held_out, kind).items():
            print(
                f"with lora_scale {scale:g}, correlation of {seen}, {kind}, {name}: "
                f"as it is {whole:.3f}, less each row's mean {rest:.3f}",
                flush=True,
            )


def correlations(make: Make, held_out: dataset.Images, kind: str) -> dict[str, list[float]]:
    """Correlate the depth that is read off images with the depth given.

    In empty rooms, correlate vertical steps with those of the render, where walls meet floor and
    ceiling.

    Returns:
        For the names of `follow`: Pearson's correlation, the mean over images, as it is and after
        each row's mean is taken out.
    """
    reader, rng = load_judge(DepthReader(), "depths"), np.random.default_rng(0)
    found: dict[str, list[Tensor]] = {}
    for index, attributes in islice(enumerate(held_out.attributes), DEPTHS):
        prompt = PREFIX + dataset.SETS[kind].subject(**attributes).caption(rng, keep=1.0)
        images = follow(make, prompt, index, held_out)
        if kind == dataset.EMPTY:
            seen = {name: vertical_steps(image) for name, image in images.items()}
            expected = seen["render"]
        else:
            seen = {name: reader(image) for name, image in images.items()}
            expected = cells(torch.from_numpy(depth_image(held_out.distance[index]))[None])
        for name, one in seen.items():
            pair = [
                correlation(one, expected),
                shape_correlation(one, expected),
            ]
            found.setdefault(name, []).append(torch.cat(pair))
    return {name: torch.stack(values).mean(0).tolist() for name, values in found.items()}


def follow(make: Make, prompt: str, index: int, held_out: dataset.Images) -> dict[str, Tensor]:
    """Make images (1, 3, H, W) in [-1, 1] that follow the depth of a held-out render.

    The first follows a depth image like those of training. The second follows inverse distances,
    as `depth_kind=distance` makes them. The third follows the prompt alone. The last is the render.
    """
    depth, inverse = (turn(held_out.distance[index]) for turn in (depth_image, from_distance))
    return {
        "depth image": make(prompt, index, depth=torch.from_numpy(depth)) * 2 - 1,
        "inverse distances": make(prompt, index, depth=torch.from_numpy(inverse)) * 2 - 1,
        "text alone": make(prompt, index) * 2 - 1,
        "render": to_tensor(halve(held_out.rgb[index])[None]),
    }


def vertical_steps(images: Tensor) -> Tensor:
    """Return the steps of brightness between cells of images (N, 3, H, W), (N, h - 1, w)."""
    return cells(images.mean(1)).diff(dim=1).abs()


MEASURES: Mapping[str, Callable[[Measuring], None]] = {
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
    parser.add_argument("--sheets", type=Path, help="a folder for contact sheets")
    parser.add_argument("--windows", type=int, default=1000, help="for the Frechet distance")
    parser.add_argument("--depths-only", action="store_true", help="leave out all but depth")
    arguments = parser.parse_args()
    for kind in dataset.SETS:
        dataset.render_set(arguments.work, kind, "test")
    models = load(arguments.family, modes=arguments.modes or None, device="cpu")
    given = Measuring(models, arguments.work, arguments.sheets, arguments.windows)
    for mode in models.bases:
        print(f"{mode}:")
        if mode in MEASURES and not arguments.depths_only:
            MEASURES[mode](given)
        if mode in SPHERE_INPUTS:
            measure_depths(given, mode)


if __name__ == "__main__":
    main()
