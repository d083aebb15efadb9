"""Measures the embedded family on held-out data: `python -m weights.train.measure --help`.

Prints what the model card says. Of the first family: the autoencoder's PSNR, the judge's own
accuracy, and how often pictures show what their prompt asked for. Of the second: the same of its
judge and its pictures, and how closely pictures follow a depth image, all of it with the LoRA as
requests have it by default and again without it.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from panorama.models import DEFAULT_FAMILY, Models, load
from panorama.request import INPUTS, ModeSettings, Request
from panorama.sdxl import SDXL360
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
"""A prompt and a seed to a picture (1, 3, H, W) in [0, 1]."""


def wished_landscapes(prefix: str = "") -> Iterator[Wish]:
    """Every pair of time and land."""
    for time, land in product(scenes.SKIES, scenes.LANDS):
        words = f"{scenes.TIME_WORDS[time][0]} over {scenes.LAND_WORDS[land][0]}"
        yield prefix + words, {"time": time, "land": land}


def wished_rooms(prefix: str) -> Iterator[Wish]:
    """Every pair of kind and colour."""
    for kind, color in product(rooms.KINDS, rooms.COLORS):
        yield f"{prefix}{kind} in the color of {color}", {"kind": kind, "color": color}


WISHES: Mapping[str, tuple[Sequence[Wish], int]] = {
    "outdoors": (tuple(wished_landscapes(PREFIX)), 2),
    "rooms": (tuple(wished_rooms(PREFIX)), 4),
}
"""What spheres of each kind are asked to show, and how many are made of each wish."""


def agreement(
    make: Make,
    judge: Judge,
    attributes: Attributes,
    wishes: Sequence[Wish],
    seeds: int,
    sheet: Path | None,
) -> dict[str, float]:
    """Share of pictures in which a judge reads each attribute, and all of them, as asked for.

    Args:
        make: makes a picture.
        judge: reads attributes.
        attributes: their values.
        wishes: what is asked for.
        seeds: pictures for every wish.
        sheet: a PNG to write of all pictures at half their size, a row for each wish.
    """
    hits: dict[str, list[bool]] = {name: [] for name in (*wishes[0][1], "all")}
    tiles = []
    for (prompt, wish), seed in product(wishes, range(seeds)):
        picture = make(prompt, seed)
        with torch.no_grad():
            (seen,) = read(judge, picture * 2 - 1, attributes)
        for name, value in wish.items():
            hits[name].append(seen[name] == value)
        hits["all"].append(all(hits[name][-1] for name in wish))
        tiles.append(F.avg_pool2d(picture, 2)[0])
    if sheet:
        save_sheet(tiles, seeds, sheet)
    return {name: float(np.mean(values)) for name, values in hits.items()}


def save_sheet(tiles: Sequence[Tensor], columns: int, path: Path) -> None:
    """Writes pictures (3, H, W) in [0, 1] of one size as a table."""
    rows = [torch.cat(list(tiles[i : i + columns]), -1) for i in range(0, len(tiles), columns)]
    pixels = torch.cat(rows, -2).permute(1, 2, 0).mul(255).round().byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def measure_syncdiffusion(models: Models, work: Path, sheets: Path | None) -> None:
    """Prints the first family's table."""
    pipe, settings = models.pipelines["syncdiffusion"], models.settings("syncdiffusion")
    for kind in dataset.KINDS:
        held_out = dataset.load(work, kind, "test")
        print(f"autoencoder PSNR, {kind}: {autoencoder.psnr(pipe.vae, held_out.rgb):.2f} dB")
    judge = load_judge(Judge(), "windows")
    held_out = dataset.load(work, "strips", "test")
    for name, share in accuracy(judge, held_out, 256, ATTRIBUTES).items():
        print(f"judge on held-out strips, {name}: {share:.1%}")
    size = pipe.window * pipe.vae_scale_factor

    def make(prompt: str, seed: int) -> Tensor:
        return pipe(
            prompt,
            size,
            size,
            guidance_scale=settings.guidance_scale,
            num_inference_steps=STEPS,
            sync_weight=0.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images

    wishes, sheet = list(wished_landscapes()), sheets and sheets / "windows.png"
    shares = agreement(make, judge, ATTRIBUTES, wishes, 4, sheet)
    for name, share in shares.items():
        print(f"prompt agreement over {4 * len(wishes)} windows, {name}: {share:.1%}")


def lora_scales(settings: ModeSettings) -> tuple[float, ...]:
    """What to measure: the strength that requests have by default, and none beside it."""
    return (float(INPUTS["lora_scale"].default), 0.0) if settings.tokens else (0.0,)


def measure_sdxl_360(models: Models, work: Path, sheets: Path | None) -> None:
    """Prints the second family's table."""
    pipe, settings = models.pipelines["sdxl-360"], models.settings("sdxl-360")
    judge = load_judge(Judge(SPHERE_ATTRIBUTES), "spheres")
    for kind, (wishes, _) in WISHES.items():
        asked = {name: SPHERE_ATTRIBUTES[name] for name in wishes[0][1]}
        shares = accuracy(judge, dataset.load(work, kind, "test"), settings.width, asked)
        for name, share in shares.items():
            print(f"judge on held-out {kind}, {name}: {share:.1%}")
    for scale in lora_scales(settings):
        print(f"with lora_scale {scale:g}:")
        folder = sheets and sheets / f"lora-{scale:g}"
        measure_spheres(make_spheres(pipe, settings, scale), judge, work, folder)


def make_spheres(pipe: SDXL360, settings: ModeSettings, lora_scale: float) -> Make:
    """What makes pictures with a strength of the LoRA, as a request for them would."""

    def make(prompt: str, seed: int, depth: Tensor | None = None) -> Tensor:
        request = Request(prompt=prompt, mode="sdxl-360", lora_scale=lora_scale, seed=seed)
        resolved = request.resolve(settings)
        picture: Tensor = pipe(
            resolved.full_prompt,
            resolved.height,
            resolved.width,
            guidance_scale=resolved.guidance_scale,
            num_inference_steps=STEPS,
            depth=depth,
            controlnet_conditioning_scale=resolved.controlnet_conditioning_scale,
            lora_scale=resolved.lora_scale,
            generator=torch.Generator().manual_seed(resolved.seed),
            output_type="pt",
        )
        return picture

    return make


def step(picture: Tensor) -> float:
    """The mean step between neighbouring columns of (1, 3, H, W) in [0, 1], in grey levels.

    What a style of crisp outlines changes.
    """
    return float(picture.diff(dim=-1).abs().mean() * 255)


def measure_spheres(make: Make, judge: Judge, work: Path, sheets: Path | None) -> None:
    """Prints how often pictures show what they are asked to, and follow a depth image."""
    for kind, (wishes, seeds) in WISHES.items():
        sheet = sheets and sheets / f"{kind}.png"
        steps: list[float] = []

        def watched(prompt: str, seed: int, seen: list[float] = steps) -> Tensor:
            picture = make(prompt, seed)
            seen.append(step(picture))
            return picture

        shares = agreement(watched, judge, SPHERE_ATTRIBUTES, wishes, seeds, sheet)
        for name, share in shares.items():
            print(f"prompt agreement over {len(steps)} {kind}, {name}: {share:.1%}")
        print(f"mean step between columns of {kind}: {np.mean(steps):.2f} grey levels")
        for name, means in depth_correlations(make, work, kind).items():
            values = ", ".join(f"{what} {mean:.3f}" for what, mean in means.items())
            print(f"depth correlation over {DEPTHS} {kind}, {name}: {values}")


def depth_correlations(make: Make, work: Path, kind: str) -> dict[str, dict[str, float]]:
    """How the depth that is read off pictures correlates with a given one.

    Args:
        make: makes a picture, with `depth` (H, W) or without.
        work: the folder of the held-out pictures, of the same size.
        kind: of pictures.

    Returns:
        For pictures that follow the depth image, for those of its caption alone, and for the
        render itself: Pearson's correlation, the mean over pictures, as it is and after each
        row's mean is taken out.
    """
    reader = load_judge(DepthReader(), "depths")
    held_out = dataset.load(work, kind, "test")
    rng = np.random.default_rng(0)
    found: dict[str, list[Tensor]] = {"depth image": [], "text alone": [], "render": []}
    for index in range(DEPTHS):
        subject = SUBJECTS[kind](**held_out.attributes[index])
        prompt = PREFIX + CAPTIONS[type(subject)](subject, rng, keep=1.0)
        depth = torch.from_numpy(depth_image(held_out.distance[index]))
        pictures = {
            "depth image": make(prompt, index, depth=depth) * 2 - 1,
            "text alone": make(prompt, index) * 2 - 1,
            "render": autoencoder.to_tensor(held_out.rgb[index][None]),
        }
        given = cells(depth[None])
        for name, picture in pictures.items():
            with torch.no_grad():
                seen = reader(picture)
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


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modes", nargs="*", help=f"of {', '.join(MEASURES)}; all if none is named")
    parser.add_argument("--family", default=DEFAULT_FAMILY)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--sheets", type=Path, help="a folder for PNGs of what was judged")
    arguments = parser.parse_args()
    for kind in dataset.KINDS:
        dataset.render_set(arguments.work, kind, "test", workers=2)
    models = load(arguments.family, modes=arguments.modes or None)
    for mode in models.pipelines:
        MEASURES[mode](models, arguments.work, arguments.sheets)


if __name__ == "__main__":
    main()
