"""Depth images as users send them."""

import hashlib
import logging
import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile
from tifffile import TiffFile, imwrite

from panorama.conditioning.depth import read, resize, warn_of_open_edges
from panorama.uploads import MAX_PIXELS
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


TYPES = {
    **{name: 2.0 ** (8 * int(name[1])) - 1 for name in ("u1", "u2", "u4", "u8")},
    **{name: 2.0 ** (8 * int(name[1]) - 1) - 1 for name in ("i1", "i2", "i4", "i8")},
    **{name: 1.0 for name in ("f2", "f4", "f8")},
}
"""The white of every type of number that a TIFF may have."""
STEPS = {"u1": 1 / 255, "i1": 1 / 127, "f2": 2**-11}
"""Their precision, where it is coarser than 1 / 32767."""


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    """Values in [0, 1] as numbers of a type."""
    if kind.startswith("f"):
        return values.astype(kind)
    white = 2 ** (8 * int(kind[1]) - kind.startswith("i")) - 1
    levels = np.round(values.astype(np.longdouble) * white)
    return levels.clip(0, white).astype(kind)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "rgb"])
@pytest.mark.parametrize("kind", TYPES)
def test_a_tiff_means_the_same_in_every_type_order_and_photometric(
    tmp_path, kind, photometric, order, compression
):
    pixels = stored(1 - ramp() if photometric == "miniswhite" else ramp(), kind)
    if photometric == "rgb":
        pixels = np.stack([pixels] * 3, -1)
    options = {"photometric": photometric, "byteorder": order, "compression": compression}
    imwrite(tmp_path / "a.tif", pixels, **options)
    found = values(tmp_path / "a.tif")
    assert found.dtype == np.float32 and found.shape == (32, 64)
    assert np.abs(found - ramp()).max() <= STEPS.get(kind, 1 / 32767) / 2 + 1e-6
    assert np.corrcoef(found.ravel(), ramp().ravel())[0, 1] > 0.999


@pytest.mark.parametrize("mode", ["L", "1"])
def test_a_white_is_zero_tiff_of_pillow_is_read_the_same(tmp_path, mode):
    pixels = (ramp() * 255).round().astype(np.uint8)
    Image.fromarray(255 - pixels).convert(mode).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as image:
        expected = np.asarray(image.convert("L"), np.float32) / 255
    assert np.allclose(values(tmp_path / "a.tif"), expected)


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_the_layout_of_a_tiff_does_not_matter(tmp_path, tile, planar, bigtiff):
    grey = stored(ramp(), "u2")
    pixels = np.stack([grey] * 3, -1 if planar == "contig" else 0)
    options = {"photometric": "rgb", "planarconfig": planar, "tile": tile, "bigtiff": bigtiff}
    imwrite(tmp_path / "a.tif", pixels, **options)
    assert np.abs(values(tmp_path / "a.tif") - ramp()).max() <= 1e-4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_as_a_png_is(tmp_path, orientation):
    pixels = stored(ramp(), "u2")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    imwrite(tmp_path / "a.tif", pixels, extratags=[(274, 3, 1, orientation, True)])
    assert np.array_equal(values(tmp_path / "a.tif"), values(tmp_path / "a.png"))


@pytest.mark.parametrize(("alpha", "expected"), [("unassalpha", 0.2), ("assocalpha", 0.5)])
@pytest.mark.parametrize(("photometric", "channels"), [("minisblack", 1), ("rgb", 3)])
def test_a_transparent_tiff_is_darker(tmp_path, photometric, channels, alpha, expected):
    pixels = np.full((32, 64, channels + 1), 0.5, np.float32)
    pixels[..., -1] = 0.4
    options = {"photometric": photometric, "extrasamples": [alpha], "planarconfig": "contig"}
    imwrite(tmp_path / "a.tif", pixels, **options)
    assert np.allclose(values(tmp_path / "a.tif"), expected)


@pytest.mark.parametrize(
    ("pixels", "options", "named"),
    [
        (np.zeros((32, 64, 2), "u1"), {"photometric": "minisblack"}, "2 samples"),
        (np.zeros((32, 64, 5), "u1"), {"photometric": "rgb"}, "5 samples"),
        (np.zeros((32, 64), "c8"), {"photometric": "minisblack"}, "not real numbers"),
        (np.zeros((16, 32, 32), "u1"), {"volumetric": True, "tile": (16, 16, 16)}, "samples"),
    ],
    ids=["an unnamed sample", "two", "complex numbers", "a volume"],
)
def test_a_tiff_of_anything_else_is_refused_by_name(tmp_path, pixels, options, named):
    extra = {"planarconfig": "contig"} if pixels.shape[-1] in (2, 5) else {}
    imwrite(tmp_path / "a.tif", pixels, **options, **extra)
    with pytest.raises(ValueError, match=rf"^depth_image='a\.tif': .*{named}.*; try a PNG"):
        read(tmp_path / "a.tif")


def png_with(image: bytes, checksum: int | None = None, end: bool = True) -> bytes:
    """Return a grey PNG of 32 x 16 pixels whose rows are given, perhaps with a wrong checksum."""

    def chunk(body: bytes, checksum: int | None = None) -> bytes:
        size = (len(body) - 4).to_bytes(4, "big")
        return size + body + (checksum or zlib.crc32(body)).to_bytes(4, "big")

    header = b"IHDR" + (32).to_bytes(4, "big") + (16).to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    pixels = chunk(b"IDAT" + zlib.compress(image), checksum)
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + pixels + chunk(b"IEND") * end


ROWS = b"".join(bytes([0, *range(0, 256, 8)]) for _ in range(16))  # of no filter


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"checksum": 0xDEADBEEF}, "bad header checksum in b'IDAT'"),
        ({"end": False}, "truncated PNG file"),
    ],
)
def test_a_png_with_a_wrong_checksum_or_without_an_end_is_refused(tmp_path, options, reason):
    path = tmp_path / "a.png"
    path.write_bytes(png_with(ROWS))
    assert (255 * values(path)[3]).round().tolist() == list(range(0, 256, 8))
    path.write_bytes(png_with(ROWS, **options))
    Image.open(path).load()  # Pillow alone takes it
    with pytest.raises(ValueError, match=reason):
        read(path)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd", "lzma", "packbits", "jpeg"])
def test_a_tiff_that_was_cut_is_refused(tmp_path, compression):
    rows = None if compression == "jpeg" else 4
    options = {"compression": compression, "rowsperstrip": rows}
    imwrite(tmp_path / "whole.tif", stored(ramp(), "u1"), **options)
    data = (tmp_path / "whole.tif").read_bytes()
    for lacking in (1, 10, 100, len(data) - 60, len(data) - 4):
        (tmp_path / "a.tif").write_bytes(data[:-lacking])
        with pytest.raises(ValueError, match=r"^depth_image='a\.tif': .*must be a whole image"):
            read(tmp_path / "a.tif")
    (tmp_path / "a.tif").write_bytes(data[:200])  # within the list of strips
    with pytest.raises(ValueError, match=r"\((the file is truncated|.*tiff.*|.*TIFF.*)\)"):
        read(tmp_path / "a.tif")


def test_a_tiff_with_more_samples_than_it_names_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    imwrite(path, np.zeros((32, 64, 3), np.uint8), **options)
    with TiffFile(path) as file:
        tag = file.pages.first.tags["ExtraSamples"].offset
    data = bytearray(path.read_bytes())
    data[tag : tag + 2] = (65000).to_bytes(2, "little")  # a private tag
    path.write_bytes(data)
    with pytest.raises(ValueError, match="3 samples"):
        read(path)


def test_a_large_tiff_is_not_decoded(tmp_path, monkeypatch):
    imwrite(tmp_path / "a.tif", np.zeros((4200, 8200), bool), compression="zlib")
    monkeypatch.setattr("tifffile.TiffPage.asarray", None)
    with pytest.raises(ValueError, match="it has 8200 x 4200 pixels"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_rounding_beyond_black_and_white_is_clipped(tmp_path, kind, photometric):
    pixels = ramp().astype(kind)
    pixels[0, 0], pixels[-1, -1] = -1e-8, np.nextafter(np.asarray(1, kind), np.asarray(2, kind))
    if kind == "f4":
        pixels[-1, -2] = 1.0000002
    imwrite(tmp_path / "a.tif", pixels, photometric=photometric)
    found = values(tmp_path / "a.tif")
    assert (found.min(), found.max()) == (0, 1)


@pytest.mark.parametrize(
    "wrong",
    [ramp() * 10, ramp() - 0.5, ramp() * 1.01, np.full((32, 64), np.nan), ramp() + np.inf],
    ids=["too bright", "negative", "a little too bright", "NaN", "infinite"],
)
@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_floats_beyond_black_and_white_are_refused(tmp_path, wrong, kind):
    imwrite(tmp_path / "a.tif", wrong.astype(kind))
    for meaning in ("nearness", "inverted"):
        with pytest.raises(ValueError, match="where white is 1; try depth_kind='distance'"):
            read(tmp_path / "a.tif", meaning)


def test_a_negative_integer_is_refused(tmp_path):
    imwrite(tmp_path / "a.tif", np.full((32, 64), -100, np.int16))
    with pytest.raises(ValueError, match="from black to white, not from -"):
        read(tmp_path / "a.tif")


METRES = 2 + 8 * ramp()  # from 2 m to 10 m
NEARNESS = (1 / METRES - 1 / 10) / (1 / 2 - 1 / 10)
DISTANCES = {
    "metres, float": (METRES.astype("f4"), {}),
    "metres, double": (METRES.astype("f8"), {}),
    "metres, half": (METRES.astype("f2"), {}),
    "metres, big-endian": (METRES.astype("f4"), {"byteorder": ">"}),
    "millimetres, 16 bit": ((METRES * 1000).round().astype("u2"), {}),
    "millimetres, signed": ((METRES * 1000).round().astype("i2"), {}),
    "millimetres, 32 bit": ((METRES * 1000).round().astype("u4"), {}),
    "millimetres, float": ((METRES * 1000).astype("f4"), {}),
    "kilometres": ((METRES / 1000).astype("f4"), {}),
    "a share of the farthest": ((METRES / 10).astype("f4"), {}),
    "a share, 16 bit": ((METRES / 10 * 65535).round().astype("u2"), {}),
    "in three channels": (np.stack([METRES.astype("f4")] * 3, -1), {"photometric": "rgb"}),
}


@pytest.mark.parametrize("kind", DISTANCES)
def test_distances_of_any_unit_become_nearness(tmp_path, kind, caplog):
    pixels, options = DISTANCES[kind]
    imwrite(tmp_path / "a.tif", pixels, **options)
    found = read(tmp_path / "a.tif", "distance").values
    assert found.dtype == np.float32
    assert np.abs(found - NEARNESS).max() < 1e-3
    assert caplog.records == []


def test_distances_of_a_png_become_nearness(tmp_path):
    path = saved(tmp_path / "a.png", (METRES * 1000).round().astype(np.uint16))
    assert np.abs(read(path, "distance").values - NEARNESS).max() < 1e-3


def test_an_infinite_distance_is_the_farthest(tmp_path, caplog):
    pixels = METRES.astype("f4")
    pixels[:8] = np.inf
    imwrite(tmp_path / "a.tif", pixels)
    found = read(tmp_path / "a.tif", "distance").values
    assert found[:8].max() == 0 and found.max() == 1
    assert np.abs(found[8:] - METRES[8:].min() / METRES[8:]).max() < 1e-6
    assert caplog.records == []


@pytest.mark.parametrize("hole", [np.nan, 0, -1, -9999, -1.7976931348623157e308, -np.inf])
def test_what_was_not_measured_is_the_farthest_with_a_warning(tmp_path, caplog, hole):
    pixels = METRES.copy()
    pixels[:8] = hole
    imwrite(tmp_path / "a.tif", pixels)
    found = read(tmp_path / "a.tif", "distance").values
    assert found[:8].max() == 0
    assert (found[8:].min(), found[8:].max()) == (0, 1)
    (record,) = caplog.records
    assert "25.0% of its distances" in record.getMessage()


@pytest.mark.parametrize("value", [0, -1, np.nan, 5])
def test_distances_that_tell_nothing_are_refused(tmp_path, value):
    imwrite(tmp_path / "a.tif", np.full((32, 64), value, np.float32))
    with pytest.raises(ValueError, match=r"^depth_image='a\.tif': .*two positive distances; try"):
        read(tmp_path / "a.tif", "distance")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_inverted_depth_is_turned_round(tmp_path, name):
    path = tmp_path / name
    pixels = (ramp() * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(path, **({"lossless": True} if name == "a.webp" else {}))
    assert np.allclose(read(path, "inverted").values, 1 - values(path))


@pytest.mark.parametrize(("low", "high"), [(0, 0.09), (0.5, 0.55), (0.95, 1), (0.3, 0.3)])
@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_little_depth_makes_a_warning(tmp_path, caplog, low, high, kind):
    imwrite(tmp_path / "a.tif", stored(low + (high - low) * ramp(), kind))
    for meaning in ("nearness", "inverted"):
        caplog.clear()
        read(tmp_path / "a.tif", meaning)
        (record,) = caplog.records
        share = record.getMessage().partition("it uses ")[2].partition("%")[0]
        assert abs(float(share) - 100 * (high - low)) < 0.5


@pytest.mark.parametrize(("low", "high"), [(0, 0.11), (0, 1), (0.8, 1)])
def test_enough_depth_makes_none(tmp_path, caplog, low, high):
    imwrite(tmp_path / "a.tif", stored(low + (high - low) * ramp(), "u2"))
    read(tmp_path / "a.tif")
    assert caplog.records == []


MAPS = ("viridis", "plasma", "inferno", "magma", "cividis", "turbo", "jet", "hsv", "Spectral")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.webp"])
@pytest.mark.parametrize("colours", MAPS)
def test_a_colour_map_makes_a_warning(tmp_path, caplog, name, colours):
    from matplotlib import colormaps

    pixels = (colormaps[colours](ramp())[..., :3] * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    read(tmp_path / name)
    (record,) = caplog.records
    assert "a colour map is no depth" in record.getMessage()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.webp"])
@pytest.mark.parametrize("tint", [(1, 1, 1), (1, 0.98, 0.95)], ids=["grey", "a faint tint"])
def test_grey_in_three_channels_makes_none(tmp_path, caplog, name, tint):
    grey = ramp()[..., None] * np.array(tint) * 255
    Image.fromarray(grey.round().astype(np.uint8)).save(tmp_path / name)
    read(tmp_path / name)
    assert caplog.records == []


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
    "missing": (lambda path: None, "must be a file that exists (there is none of that name)"),
    "a folder": (Path.mkdir, "must be a file that exists (it is a folder)"),
    "empty": (Path.touch, "cannot identify"),
    "no image": (lambda path: path.write_text("<html>404</html>"), "cannot identify"),
    "truncated": (truncated, "Truncated"),
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
    warn_of_open_edges("depth_image", depth if closed == "x" else depth.T, closed)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert f"its {edges} edges differ by 0.750" in message
    assert "neighbouring pixels by 0.012" in message


@pytest.mark.parametrize(
    ("values", "warns"),
    [
        (np.r_[np.zeros(999), 1 / 255], False),
        (np.r_[np.zeros(999), 3 / 255], True),
        (np.tile([0.0, 0.1], 500) + np.linspace(0, 0.2, 1000), False),  # 3 times the usual step
        (np.tile([0.0, 0.1], 500) + np.linspace(0, 0.4, 1000), True),  # 5 times
    ],
)
def test_edges_may_differ_by_two_levels_and_by_four_times_the_usual_step(caplog, values, warns):
    warn_of_open_edges("depth_image", columns(values), "x")
    assert len(caplog.records) == warns


@pytest.mark.parametrize("closed", ["", "x", "y"])
def test_edges_that_are_not_closed_make_none(caplog, closed):
    depth = columns(np.linspace(0, 0.75, 64))
    warn_of_open_edges("depth_image", depth.T if closed == "x" else depth, closed)
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
    warn_of_open_edges("depth_image", depth if closed == "x" else depth.T, closed)
    assert caplog.records == []
