"""Make the images of docs/gallery.md on the tiny family: script/gallery [--only NAME]."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from panorama.images.sphere import Face
from panorama.images.vae import from_pil, to_pil
from panorama.modes import Models, load
from panorama.request import Request

DOCS = Path(__file__).parents[1] / "docs"
WIDTH = 1024  # pixels of a sheet
LABEL = 24  # pixels above an image
DEPTH = DOCS / "depth.png"
ROOM = "hdri view, bedroom in the color of green"
HILLS = "hdri view, noon over green hills with trees"
DESERT = "hdri view, sunset over the desert"
OPEN = "autumn hills with trees"  # leaves the palette open
SPHERE = {"mode": "sdxl-360", "prompt": HILLS, "seed": 1}

Show = Callable[[Image.Image], Image.Image]
Inputs = Mapping[str, Any]


def rolled(image: Image.Image) -> Image.Image:
    """Turn a panorama by half its width, which brings its seam to the middle."""
    return Image.fromarray(np.roll(np.asarray(image), image.width // 2, axis=1))


def detail(image: Image.Image, side: int) -> Image.Image:
    """Return a part of a sphere around the horizon, enlarged to a side."""
    width, height = image.size
    part = image.crop((width // 4, height * 3 // 8, width // 2, height * 5 // 8))
    return part.resize((side, side // 2), Image.Resampling.BICUBIC)


def poles(image: Image.Image, side: int) -> Image.Image:
    """Return the views straight up and straight down, side by side."""
    faces = [Face(up, side // 2, 90.0).show(from_pil(image)) for up in (True, False)]
    return to_pil(torch.cat(faces, -1).clamp(0, 1))


@dataclass(frozen=True)
class Sheet:
    """Images that are shown together, by label."""

    images: Mapping[str, Inputs]
    columns: int = 1
    show: Show = lambda image: image


def mode(name: str, prompts: Iterable[str], **inputs: Any) -> dict[str, Inputs]:
    """Return the inputs of a mode for several prompts, with seeds from 1."""
    return {
        prompt: {"mode": name, "prompt": prompt, "seed": seed, **inputs}
        for seed, prompt in enumerate(prompts, 1)
    }


SHEETS: Mapping[str, Sheet] = {
    "syncdiffusion": Sheet(
        mode(
            "syncdiffusion",
            [
                "sunset over volcanic land",
                "noon over snowy mountains",
                "night over the desert",
                OPEN,
            ],
        )
    ),
    "syncdiffusion-xl": Sheet(
        mode(
            "syncdiffusion-xl",
            ["dawn over green hills", "noon over snowy mountains", "sunset over the desert", OPEN],
        )
    ),
    "sdxl-360": Sheet(
        mode("sdxl-360", [HILLS, "hdri view, dawn over snowy mountains", DESERT, ROOM]), columns=2
    ),
    "sync": Sheet(
        {
            f"sync_weight={weight}": {"prompt": OPEN, "sync_weight": float(weight), "seed": 3}
            for weight in (0, 20)
        }
    ),
    "speed": Sheet(
        {
            f"speed={speed}": {"prompt": "dawn over snowy mountains", "speed": speed, "seed": 2}
            for speed in ("exact", "fast")
        }
    ),
    "loop": Sheet(
        {
            f"loop_closure={closed}, turned by half": {
                **{"prompt": "sunset over green hills", "speed": "fast", "seed": 4},
                "loop_closure": closed == "true",
            }
            for closed in ("false", "true")
        },
        show=rolled,
    ),
    "depth": Sheet(
        {
            "depth_image": {"depth_image": DEPTH},
            **{
                prompt: {"mode": "sdxl-360", "prompt": prompt, "depth_image": DEPTH, "seed": 1}
                for prompt in (
                    ROOM,
                    "hdri view, kitchen in the color of yellow",
                    "hdri view, office in the color of blue",
                )
            },
        },
        columns=2,
    ),
    "upscale": Sheet(
        {f"upscale={factor}": SPHERE | {"upscale": factor} for factor in (1, 2, 4)},
        show=partial(detail, side=WIDTH),
    ),
    "poles": Sheet(
        {
            f"fix_poles={str(fixed).lower()}: up, down": SPHERE | {"fix_poles": fixed}
            for fixed in (False, True)
        },
        columns=2,
        show=partial(poles, side=WIDTH // 2),
    ),
}


def draw(models: Models, sheet: Sheet) -> Image.Image:
    """Make the images of a sheet, and put them together."""
    width, tiles = WIDTH // sheet.columns, []
    for label, inputs in sheet.images.items():
        if "prompt" in inputs:
            image = sheet.show(models.generate(Request(**inputs)).image)
        else:
            with Image.open(inputs["depth_image"]) as depth:
                image = ImageOps.grayscale(depth).convert("RGB")
        tiles.append(labelled(image, label, width))
    rows = -(-len(tiles) // sheet.columns)
    height = max(tile.height for tile in tiles)
    whole = Image.new("RGB", (WIDTH, rows * height), "white")
    for index, tile in enumerate(tiles):
        row, column = divmod(index, sheet.columns)
        whole.paste(tile, (column * width, row * height))
    return whole


def labelled(image: Image.Image, label: str, width: int) -> Image.Image:
    """Return an image resized to a width, below its label."""
    height = image.height * width // image.width
    tile = Image.new("RGB", (width, height + LABEL), "white")
    tile.paste(image.resize((width, height), Image.Resampling.BICUBIC), (0, LABEL))
    font = ImageFont.load_default(14)
    ImageDraw.Draw(tile).text((4, LABEL // 2), label, "black", font, anchor="lm")
    return tile


def main() -> None:
    """Write the sheets as JPEGs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SHEETS, nargs="+", default=list(SHEETS))
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    models = load("tiny")
    for name in options.only:
        path = options.out / f"gallery-{name}.jpg"
        draw(models, SHEETS[name]).save(path, quality=88)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
