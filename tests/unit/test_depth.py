"""Depth images as users send them."""

import hashlib
import logging
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from panorama.conditioning.depth import MAX_PIXELS, read, resize, warn_of_open_edges
from tests.bad_images import bomb


def ramp(height: int = 32, width: int = 64) -> np.ndarray:
    """Depth in [0, 1] with a different value at every pixel."""
    return np.linspace(0, 1, height * width).reshape(height, width)


def saved(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return path


def values(path: Path) -> np.ndarray:
    return read(path).values


def test_it_knows_its_size_and_its_file(tmp_path):
    path = saved(tmp_path / "a.png", np.zeros((32, 64), np.uint8))
    depth = read(path)
    assert depth.size == (64, 32)
    assert depth.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_eight_and_sixteen_bits_mean_the_same(tmp_path):
    eight = values(saved(tmp_path / "8.png", (ramp() * 255).round().astype(np.uint8)))
    sixteen = values(saved(tmp_path / "16.png", (ramp() * 65535).round().astype(np.uint16)))
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
    depth = values(saved(tmp_path / name, grey, mode))
    assert np.abs(depth - ramp()).max() <= 2 / 255


@pytest.mark.parametrize("name", ["a.tif", "a.pgm"])
def test_other_formats_have_sixteen_bits_too(tmp_path, name):
    path = saved(tmp_path / name, (ramp() * 65535).round().astype(np.uint16))
    assert np.abs(values(path) - ramp()).max() <= 1e-4


def test_floats_are_taken_from_black_to_white_or_not_at_all(tmp_path):
    path = saved(tmp_path / "a.tif", ramp().astype(np.float32))
    assert np.allclose(values(path), ramp())
    for wrong in (ramp() * 10, ramp() - 0.5, np.full((32, 64), np.nan)):
        with pytest.raises(ValueError, match="not 0 to 1"):
            read(saved(tmp_path / "a.tif", wrong.astype(np.float32)))


def test_what_is_transparent_is_black(tmp_path):
    pixels = np.full((32, 64, 4), 200, np.uint8)
    pixels[:16, :, 3] = 0
    pixels[16:, :, 3] = 255
    depth = values(saved(tmp_path / "a.png", pixels))
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
        depth = values(tmp_path / "a.png")
    assert depth[:16].max() == 0
    assert depth[16:].min() == 1


@pytest.mark.parametrize(("kind", "white"), [(np.uint8, 255), (np.uint16, 65535)])
def test_an_image_is_turned_the_way_up_that_its_file_says(tmp_path, kind, white):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # its top is on the right
    image = Image.fromarray((ramp() * white).astype(kind))
    image.save(tmp_path / "a.png", exif=exif)
    turned = read(tmp_path / "a.png")
    assert turned.size == (32, 64)
    image.save(tmp_path / "a.png")
    assert np.array_equal(turned.values, np.rot90(values(tmp_path / "a.png"), -1))


def test_of_several_images_it_is_the_first(tmp_path):
    frames = [Image.new("L", (64, 32), level) for level in (51, 255)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert np.allclose(values(tmp_path / "a.tif"), 0.2)


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
    "no image": (lambda path: path.write_text("<html>404</html>"), "cannot identify"),
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
    message = str(error.value)
    assert message.startswith("depth_image='depth.png': ") and " must " in message
    assert reason in message
    assert str(tmp_path) not in message
    assert "; try " in message


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
    assert f"at most {MAX_PIXELS} pixels" in str(error.value)
    assert reason in str(error.value)
    assert seen == []


@pytest.mark.parametrize("closed", ["", "x", "y"])
def test_the_size_it_has_needs_no_resampling(closed):
    depth = ramp().astype(np.float32)
    assert resize(depth, 32, 64, closed) is depth


SIZES = [(16, 32), (64, 128), (8, 16), (32, 48), (40, 128)]


@pytest.mark.parametrize("closed", ["x", "y"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_resampling_commutes_with_rolling_around_the_axis_that_closes(height, width, closed):
    depth = np.random.default_rng(0).random((32, 64), np.float32)
    resized = resize(depth, height, width, closed)
    assert resized.shape == (height, width) and resized.dtype == np.float32
    assert resized.min() >= 0 and resized.max() <= 1
    axis = 1 if closed == "x" else 0
    quarter = resize(np.roll(depth, depth.shape[axis] // 4, axis), height, width, closed)
    assert np.abs(quarter - np.roll(resized, resized.shape[axis] // 4, axis)).max() < 1e-6


@pytest.mark.parametrize("closed", ["", "x", "y"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_an_axis_that_does_not_close_keeps_its_edges_apart(height, width, closed):
    """Away from the edges that do close, resampling is that of Pillow."""
    depth = np.random.default_rng(0).random((32, 64), np.float32)
    resized = resize(depth, height, width, closed)
    image = Image.fromarray(depth).resize((width, height), Image.Resampling.BILINEAR)
    plain = np.asarray(image)
    rows = slice(None) if closed != "y" else slice(height // 4, -height // 4)
    columns = slice(None) if closed != "x" else slice(width // 4, -width // 4)
    assert np.abs(resized - plain)[rows, columns].max() < 1e-6


@pytest.mark.parametrize("closed", ["", "x", "y"])
def test_resampling_keeps_what_is_constant(closed):
    assert np.allclose(resize(np.full((20, 30), 0.25, np.float32), 64, 128, closed), 0.25)


def columns(values: np.ndarray) -> np.ndarray:
    return np.tile(values.astype(np.float32), (32, 1))


@pytest.mark.parametrize(("closed", "edges"), [("x", "left and right"), ("y", "top and bottom")])
def test_edges_that_do_not_meet_make_a_warning_with_the_step(caplog, closed, edges):
    depth = columns(np.linspace(0, 0.75, 64))
    warn_of_open_edges(depth if closed == "x" else depth.T, closed)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert f"its {edges} edges differ by 0.750" in message
    assert "neighbouring pixels by 0.012" in message


@pytest.mark.parametrize("closed", ["", "x", "y"])
def test_edges_that_are_not_closed_make_none(caplog, closed):
    depth = columns(np.linspace(0, 0.75, 64))
    warn_of_open_edges(depth.T if closed == "x" else depth, closed)
    assert caplog.records == []


@pytest.mark.parametrize(
    "depth",
    [
        columns(np.sin(np.arange(64) * 2 * np.pi / 64) / 2 + 0.5),
        columns(np.full(64, 0.5)),
        np.random.default_rng(0).random((32, 64), np.float32),
    ],
    ids=["a wave", "constant", "noise"],
)
@pytest.mark.parametrize("closed", ["x", "y"])
def test_edges_that_meet_make_none(caplog, closed, depth):
    warn_of_open_edges(depth if closed == "x" else depth.T, closed)
    assert caplog.records == []
