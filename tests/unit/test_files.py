"""PNG files: their pixels, what they say made them, and what viewers need to show a 360."""

import struct
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from panorama.images.files import Panorama, read_metadata, write_atomically

GPANO = "{http://ns.google.com/photos/1.0/panorama/}"
METADATA = {
    "inputs": {"prompt": 'Straße, 山 & <"sea">\nat night', "seed": 7, "depth_image": None},
    "tokens": "<s0><s1>",
    "family": "tiny",
    "versions": {"panorama": "1"},
}


def noise(width: int = 512, height: int = 128) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def panorama(width: int = 512, height: int = 128, **fields: Any) -> Panorama:
    given = {"closed": "", "metadata": METADATA, "seconds": {}} | fields
    return Panorama(noise(width, height), **given)


def chunks(path: Path):
    """Type and data of each chunk of a PNG, read without Pillow."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at = 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        (crc,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert crc == zlib.crc32(kind + body)
        yield kind, body
        at += 12 + length


def gpano(path: Path) -> dict[str, str]:
    """The GPano fields, as a viewer finds them: in an uncompressed iTXt chunk."""
    for kind, body in chunks(path):
        keyword, _, rest = body.partition(b"\0")
        if kind == b"iTXt" and keyword == b"XML:com.adobe.xmp":
            assert rest[:2] == b"\0\0", "compressed: viewers that scan the file would miss it"
            packet = rest[2:].split(b"\0", 2)[2].decode()
            (description,) = ET.fromstring(packet)[0]
            return {
                name.removeprefix(GPANO): value
                for name, value in description.attrib.items()
                if name.startswith(GPANO)
            }
    return {}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(**fields: Any) -> Path:
        path = tmp_path / "panorama.png"
        panorama(**fields).save(path)
        return path

    return save


def test_the_pixels_are_the_image(saved):
    with Image.open(saved()) as image:
        assert np.array_equal(image, noise())


def test_an_image_says_what_made_it(saved):
    assert read_metadata(saved()) == METADATA


def test_an_image_too_large_for_pillow_says_what_made_it(saved, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_metadata(saved()) == METADATA


def test_the_same_panorama_gives_the_same_bytes(saved):
    first = saved(closed="x", seconds={"denoise": 1.0}).read_bytes()
    assert saved(closed="x", seconds={"denoise": 2.0}).read_bytes() == first
    assert saved(closed="x", metadata=METADATA | {"family": "full"}).read_bytes() != first


def test_a_ring_is_the_middle_band_of_an_equirectangular_image(saved):
    assert gpano(saved(closed="x")) == {
        "ProjectionType": "equirectangular",
        "UsePanoramaViewer": "True",
        "FullPanoWidthPixels": "512",
        "FullPanoHeightPixels": "256",
        "CroppedAreaImageWidthPixels": "512",
        "CroppedAreaImageHeightPixels": "128",
        "CroppedAreaLeftPixels": "0",
        "CroppedAreaTopPixels": "64",
    }


def test_a_ring_twice_as_wide_as_high_is_a_whole_one(saved):
    fields = gpano(saved(height=256, closed="x"))
    assert fields["FullPanoHeightPixels"] == fields["CroppedAreaImageHeightPixels"] == "256"
    assert fields["CroppedAreaTopPixels"] == "0"


@pytest.mark.parametrize(
    ("width", "height", "closed"),
    [(512, 128, ""), (512, 256, ""), (128, 512, "y"), (512, 256, "y"), (256, 256, "x")],
    ids=["flat", "2:1", "tall, closed", "closed top to bottom", "higher than half its width"],
)
def test_an_image_that_is_no_360_does_not_claim_to_be_one(saved, width, height, closed):
    assert gpano(saved(width=width, height=height, closed=closed)) == {}


def test_saving_replaces_a_file_whole_and_leaves_nothing_beside_it(saved, tmp_path):
    saved()
    path = saved(metadata={"seed": 2})
    assert read_metadata(path) == {"seed": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_of_the_old_file_never_sees_part_of_the_new_one(saved):
    path = saved()
    before = path.read_bytes()
    with path.open("rb") as reader:
        saved(metadata={"seed": 2})
        assert reader.read() == before


def test_an_image_that_cannot_be_encoded_leaves_the_old_file(saved, tmp_path):
    path = saved()
    before = path.read_bytes()
    with pytest.raises(OSError):
        Panorama(Image.new("HSV", (8, 8)), "", METADATA, {}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("suffix", ["png", "jpeg"])
def test_an_image_of_others_is_refused(tmp_path, suffix):
    path = tmp_path / f"other.{suffix}"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(ValueError, match=rf"other\.{suffix}: must .*; try .*Panorama\.save"):
        read_metadata(path)


def test_metadata_of_others_is_refused(tmp_path):
    path, info = tmp_path / "other.png", PngInfo()
    info.add_itxt("panorama", "a wide view")
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    with pytest.raises(ValueError, match=r"other\.png: must "):
        read_metadata(path)
