"""Images to start from: read whole, as they look, or refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tifffile import imwrite

from panorama.images.source import MAX_BYTES, read
from panorama.uploads import SMALLEST_SIDE


def save(path: Path, mode: str = "RGB", **options: object) -> np.ndarray:
    """Write an image of 32 x 24 random pixels, and return its pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, len(mode)), np.uint8)
    Image.fromarray(pixels, mode).save(path, **options)
    return pixels


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif"])
def test_every_pixel_is_read(tmp_path: Path, name: str) -> None:
    pixels = save(tmp_path / name)
    image = read(tmp_path / name)
    assert image.size == (32, 24) and image.pixels.dtype == torch.float32
    expected = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    assert torch.equal(image.pixels, expected)


def test_it_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter turn clockwise
    pixels = save(tmp_path / "a.png", exif=exif)
    image = read(tmp_path / "a.png")
    assert image.size == (24, 32)
    expected = torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1)[None] / 255
    assert torch.equal(image.pixels, expected)


def test_what_is_transparent_is_black(tmp_path: Path) -> None:
    pixels = np.full((24, 32, 4), 255, np.uint8)
    pixels[:12, :, 3] = 0
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    image = read(tmp_path / "a.png").pixels
    assert (image[:, :, :12] == 0).all() and (image[:, :, 12:] == 1).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_grey_of_16_bits_keeps_them(tmp_path: Path, name: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (24, 32), np.uint16)
    values[0, :2] = 0, 65535
    Image.fromarray(values).save(tmp_path / name)
    image = read(tmp_path / name).pixels
    expected = torch.from_numpy(values.astype(np.float32) / np.float32(65535))
    assert torch.equal(image, expected.expand(1, 3, -1, -1))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (np.float32, {}),
        (np.int32, {}),
        (np.int16, {}),
        (np.uint16, {"photometric": "miniswhite"}),
    ],
)
def test_other_samples_of_more_than_8_bits_are_refused(
    tmp_path: Path, dtype: type, options: dict[str, str]
) -> None:
    imwrite(tmp_path / "a.tif", np.ones((24, 32), dtype), **options)
    with pytest.raises(ValueError, match=r"image='a\.tif': .*nor 16 unsigned.*; try a PNG"):
        read(tmp_path / "a.tif")


def test_the_same_file_has_the_same_hash(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    save(tmp_path / "c.bmp")
    a, b, c = (read(tmp_path / name).sha256 for name in ("a.png", "b.png", "c.bmp"))
    assert a == b != c and len(a) == 64


def cut(path: Path) -> None:
    save(path)
    path.write_bytes(path.read_bytes()[:-200])


def damaged(path: Path) -> None:
    """Write a PNG that decodes, with a byte of the checksum of its pixels changed."""
    save(path)
    data = bytearray(path.read_bytes())
    end = data.rindex(b"IEND") - 4  # after the checksum
    data[end - 1] ^= 1
    path.write_bytes(bytes(data))
    with Image.open(path) as image:
        image.load()


def text(path: Path) -> None:
    path.write_text("no image")


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)


def huge(path: Path) -> None:
    Image.new("1", (8192, 4097)).save(path)


def small(path: Path) -> None:
    Image.new("RGB", (SMALLEST_SIDE - 1, 64)).save(path)


def gif(path: Path) -> None:
    Image.new("RGB", (64, 64)).save(path, "GIF")


@pytest.mark.parametrize(
    "write", [cut, damaged, text, large, huge, small, gif, Path.mkdir, lambda path: None]
)
def test_any_other_file_is_refused_by_name(tmp_path: Path, write: object) -> None:
    path = tmp_path / "in.png"
    write(path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"image='in\.png': must be .*; try ") as caught:
        read(path)
    assert str(tmp_path) not in str(caught.value)
