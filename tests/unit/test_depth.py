"""Depth images as users send them."""

import logging
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from panorama.depth import read, resize, warn_of_step
from tests.bad_pictures import bomb


def ramp(height: int = 32, width: int = 64) -> np.ndarray:
    """Depth in [0, 1] with a different value at every pixel."""
    return np.linspace(0, 1, height * width).reshape(height, width)


def saved(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return path


def test_eight_and_sixteen_bits_mean_the_same(tmp_path):
    eight = read(saved(tmp_path / "8.png", (ramp() * 255).round().astype(np.uint8)))
    sixteen = read(saved(tmp_path / "16.png", (ramp() * 65535).round().astype(np.uint16)))
    assert eight.shape == sixteen.shape == (32, 64)
    assert eight.dtype == sixteen.dtype == np.float32
    assert np.abs(eight - ramp()).max() <= 0.5 / 255 + 1e-6
    assert np.abs(sixteen - ramp()).max() <= 0.5 / 65535 + 1e-6


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.png", "RGB"), ("a.png", "RGBA"), ("a.png", "LA"), ("a.png", "P"), ("a.tif", "CMYK")],
)
def test_colour_is_read_by_its_brightness(tmp_path, name, mode):
    grey = (ramp() * 255).round().astype(np.uint8)
    depth = read(saved(tmp_path / name, grey, mode))
    assert np.abs(depth - ramp()).max() <= 2 / 255


@pytest.mark.parametrize("name", ["a.tif", "a.pgm"])
def test_other_formats_have_sixteen_bits_too(tmp_path, name):
    path = saved(tmp_path / name, (ramp() * 65535).round().astype(np.uint16))
    assert np.abs(read(path) - ramp()).max() <= 1e-4


def test_floats_are_taken_from_black_to_white_or_not_at_all(tmp_path):
    path = saved(tmp_path / "a.tif", ramp().astype(np.float32))
    assert np.allclose(read(path), ramp())
    for values in (ramp() * 10, np.full((32, 64), np.nan)):
        with pytest.raises(ValueError, match="not 0 to 1"):
            read(saved(tmp_path / "a.tif", values.astype(np.float32)))


def test_what_is_transparent_is_black(tmp_path):
    pixels = np.full((32, 64, 4), 200, np.uint8)
    pixels[:16, :, 3] = 0
    pixels[16:, :, 3] = 255
    depth = read(saved(tmp_path / "a.png", pixels))
    assert depth[:16].max() == 0
    assert np.allclose(depth[16:], 200 / 255)


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_a_palette_may_be_transparent(tmp_path, transparency):
    image = Image.new("P", (64, 32), 1)
    image.putpalette([255] * 6)
    image.paste(0, (0, 0, 64, 16))
    image.save(tmp_path / "a.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth = read(tmp_path / "a.png")
    assert depth[:16].max() == 0
    assert depth[16:].min() == 1


@pytest.mark.parametrize(("kind", "white"), [(np.uint8, 255), (np.uint16, 65535)])
def test_a_picture_is_turned_the_way_up_that_its_file_says(tmp_path, kind, white):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # its top is on the right
    image = Image.fromarray((ramp() * white).astype(kind))
    image.save(tmp_path / "a.png", exif=exif)
    turned = read(tmp_path / "a.png")
    image.save(tmp_path / "a.png")
    assert np.array_equal(turned, np.rot90(read(tmp_path / "a.png"), -1))


def test_of_several_pictures_it_is_the_first(tmp_path):
    frames = [Image.new("L", (64, 32), level) for level in (51, 255)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert np.allclose(read(tmp_path / "a.tif"), 0.2)


def truncated(path: Path) -> None:
    rng = np.random.default_rng(0)
    saved(path, rng.integers(0, 255, (64, 128), np.uint8))
    path.write_bytes(path.read_bytes()[:2000])


def sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


BAD = {
    "missing": (lambda path: None, "No such file"),
    "a folder": (Path.mkdir, "directory"),
    "empty": (Path.touch, "cannot identify"),
    "no picture": (lambda path: path.write_text("<html>404</html>"), "cannot identify"),
    "truncated": (truncated, "truncated"),
    "a decompression bomb": (lambda path: path.write_bytes(bomb()), "decompression bomb"),
    "too many bytes": (lambda path: sparse(path, 3 * 10**8), "it has 300000000 bytes"),
    "a transparent colour in 16 bits": (
        lambda path: Image.new("I;16", (64, 32)).save(path, transparency=7),
        "a transparent colour",
    ),
    "PostScript": (lambda path: Image.new("L", (64, 32)).save(path, "EPS"), "cannot identify"),
    "1 x 1": (lambda path: saved(path, np.zeros((1, 1), np.uint8)), "at least 16 pixels a side"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_depth_image_is_refused(tmp_path, kind):
    make, reason = BAD[kind]
    path = tmp_path / "depth.png"
    make(path)
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith("depth_image='depth.png': depth_image must ")
    assert reason in str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert str(error.value).endswith(" would do")


@pytest.mark.parametrize(
    ("size", "reason"),
    [((8200, 4200), "it has 8200 x 4200 pixels"), ((10000, 9000), "90000000 pixels")],
)
def test_too_many_pixels_are_not_decoded_and_not_warned_of(tmp_path, monkeypatch, size, reason):
    path = tmp_path / "depth.png"
    Image.new("1", size).save(path)
    monkeypatch.setattr(PngImageFile, "load", None)
    with warnings.catch_warnings(record=True) as seen, pytest.raises(ValueError) as error:
        read(path)
    assert f"at most {8192 * 4096} pixels" in str(error.value)
    assert reason in str(error.value)
    assert seen == []


def test_the_size_it_has_needs_no_resampling():
    depth = ramp().astype(np.float32)
    assert resize(depth, 32, 64) is depth


@pytest.mark.parametrize(("height", "width"), [(16, 32), (64, 128), (8, 16), (32, 48), (40, 128)])
def test_resampling_commutes_with_rolling(height, width):
    depth = np.random.default_rng(0).random((32, 64), np.float32)
    resized = resize(depth, height, width)
    assert resized.shape == (height, width)
    assert resized.min() >= 0 and resized.max() <= 1
    quarter = resize(np.roll(depth, 16, axis=1), height, width)
    assert np.abs(quarter - np.roll(resized, width // 4, axis=1)).max() < 1e-6


def test_resampling_keeps_what_is_constant():
    assert np.allclose(resize(np.full((20, 30), 0.25, np.float32), 64, 128), 0.25)


def columns(values: np.ndarray) -> np.ndarray:
    return np.tile(values.astype(np.float32), (32, 1))


def test_edges_that_do_not_meet_make_a_warning_with_the_step(caplog):
    warn_of_step(columns(np.linspace(0, 0.75, 64)))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "edges differ by 0.750" in record.getMessage()
    assert "neighbouring columns by 0.012" in record.getMessage()


@pytest.mark.parametrize(
    "depth",
    [
        columns(np.sin(np.arange(64) * 2 * np.pi / 64) / 2 + 0.5),
        columns(np.full(64, 0.5)),
        np.random.default_rng(0).random((32, 64), np.float32),
    ],
    ids=["a wave", "constant", "noise"],
)
def test_edges_that_meet_make_none(caplog, depth):
    warn_of_step(depth)
    assert caplog.records == []
