"""`script/gallery`: what it makes is legal, and docs/gallery.md shows all of it."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gallery import DOCS, LABEL, SHEETS, Sheet, detail, draw, poles, rolled
from panorama.modes import Models, load
from panorama.request import Request


@pytest.fixture(scope="module")
def models() -> Models:
    return load("tiny", device="cpu")


def test_every_image_is_legal(models: Models) -> None:
    for sheet in SHEETS.values():
        for inputs in sheet.images.values():
            assert "prompt" not in inputs or models.prepare(Request(**inputs)).cost > 0


def test_the_page_shows_every_sheet() -> None:
    shown = re.findall(r"\]\((gallery-\S+\.jpg)\)", (DOCS / "gallery.md").read_text())
    assert sorted(shown) == sorted(f"gallery-{name}.jpg" for name in SHEETS)


def test_a_sheet_has_its_images_in_rows_below_their_labels(models: Models) -> None:
    small = {"mode": "sdxl-360", "prompt": "sea", "width": 128, "height": 64}
    small |= {"num_inference_steps": 1}
    images = {f"seed {seed}": small | {"seed": seed} for seed in range(3)}
    sheet = draw(models, Sheet(images, columns=2, show=rolled))
    assert sheet.size == (1024, 2 * (LABEL + 256))
    made = rolled(models.generate(Request(**images["seed 2"])).image).resize((512, 256), 3)
    tile = sheet.crop((0, LABEL + 256 + LABEL, 512, sheet.height))
    assert np.array_equal(np.asarray(tile), np.asarray(made))
    assert np.asarray(sheet.crop((0, 0, 512, LABEL))).min() == 0  # of the label's letters


def test_what_is_shown_of_a_sphere() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 128, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    assert np.array_equal(np.asarray(rolled(rolled(image))), pixels.numpy())
    assert detail(image, 32).tobytes() == image.crop((32, 24, 64, 40)).tobytes()
    sky = Image.new("RGB", (128, 64), "blue")
    sky.paste("green", (0, 32, 128, 64))
    assert poles(sky, 64).getpixel((16, 16)) == (0, 0, 255)
    assert poles(sky, 64).getpixel((48, 16)) == (0, 128, 0)
