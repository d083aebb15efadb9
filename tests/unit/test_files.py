"""Image files: their pixels, what they say made them, and what viewers need to show a 360."""

import json
import struct
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from panorama.images.files import Panorama, read_metadata, write_atomically
from panorama.request import Request

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


def segments(path: Path):
    """Marker and data of each segment of a JPEG before its pixels, read without Pillow."""
    data = path.read_bytes()
    assert data[:2] == b"\xff\xd8"
    at = 2
    while data[at + 1] != 0xDA:  # start of scan
        assert data[at] == 0xFF
        (length,) = struct.unpack(">H", data[at + 2 : at + 4])
        yield data[at + 1], data[at + 4 : at + 2 + length]
        at += 2 + length


def riff(path: Path):
    """Type and data of each chunk of a WebP, read without Pillow."""
    data = path.read_bytes()
    assert (data[:4], data[8:12]) == (b"RIFF", b"WEBP")
    at = 12
    while at < len(data):
        (length,) = struct.unpack("<I", data[at + 4 : at + 8])
        yield data[at : at + 4], data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


def png_xmp(path: Path) -> list[bytes]:
    """Return the XMP packets, as a viewer finds them: in an uncompressed iTXt chunk."""
    found = []
    for kind, body in chunks(path):
        keyword, _, rest = body.partition(b"\0")
        if kind == b"iTXt" and keyword == b"XML:com.adobe.xmp":
            assert rest[:2] == b"\0\0", "compressed: viewers that scan the file would miss it"
            found.append(rest[2:].split(b"\0", 2)[2])
    return found


def jpeg_xmp(path: Path) -> list[bytes]:
    """Return the XMP packets, as a viewer finds them: in an APP1 segment with Adobe's header."""
    header = b"http://ns.adobe.com/xap/1.0/\0"
    bodies = [body for marker, body in segments(path) if marker == 0xE1]
    return [body.removeprefix(header) for body in bodies if body.startswith(header)]


def webp_xmp(path: Path) -> list[bytes]:
    """Return the XMP packets, as a viewer finds them: in a chunk of that name."""
    return [body for kind, body in riff(path) if kind == b"XMP "]


XMP = {".png": png_xmp, ".jpg": jpeg_xmp, ".jpeg": jpeg_xmp, ".webp": webp_xmp}
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def gpano(path: Path) -> dict[str, str]:
    """Return the GPano fields of a file, {} without XMP."""
    packets = XMP[path.suffix](path)
    if not packets:
        return {}
    (packet,) = packets
    (description,) = ET.fromstring(packet.decode())[0]
    return {
        name.removeprefix(GPANO): value
        for name, value in description.attrib.items()
        if name.startswith(GPANO)
    }


@pytest.fixture(params=FORMATS)
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def saved(tmp_path: Path, suffix: str) -> Callable[..., Path]:
    def save(quality: int = 95, **fields: Any) -> Path:
        path = tmp_path / f"panorama{suffix}"
        panorama(**fields).save(path, quality)
        return path

    return save


def test_the_pixels_are_the_image(saved, suffix):
    with Image.open(saved()) as image:
        assert (image.format, image.mode, image.size) == (FORMATS[suffix], "RGB", (512, 128))
        if suffix == ".png":
            assert np.array_equal(image, noise())


@pytest.mark.parametrize("suffix", [".jpg", ".webp"], indirect=True)
def test_a_higher_quality_is_larger_and_nearer(tmp_path, suffix):
    waves = np.sin(np.arange(256) / 9)[:, None] * np.sin(np.arange(512) / 7) * 100 + 128
    image = Image.fromarray(np.stack([waves] * 3, -1).astype(np.uint8))
    sizes, errors = [], []
    for quality in (1, 50, 95, 100):
        path = tmp_path / f"{quality}{suffix}"
        Panorama(image, "", METADATA, {}).save(path, quality)
        sizes.append(path.stat().st_size)
        with Image.open(path) as found:
            errors.append(np.abs(np.asarray(found, float) - np.asarray(image, float)).mean())
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 1.5


def test_without_a_quality_it_is_95(saved, tmp_path, suffix):
    expected = saved(quality=95).read_bytes()
    panorama().save(tmp_path / f"default{suffix}")
    assert (tmp_path / f"default{suffix}").read_bytes() == expected


@pytest.mark.parametrize("name", ["a", "a.gif", "a.png.txt", ".png"])
def test_another_ending_is_refused_and_nothing_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=r"must be a file that ends in \.png, .*; try "):
        panorama().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_ending_in_capitals_is_one(tmp_path):
    panorama().save(tmp_path / "a.JPG")
    assert read_metadata(tmp_path / "a.JPG") == METADATA


@pytest.mark.parametrize("suffix", [".jpg", ".webp"], indirect=True)
def test_the_comment_is_one_that_exif_defines(saved):
    with Image.open(saved(closed="x")) as image:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"ASCII\0\0\0"
    assert json.loads(comment[8:].decode("ascii")) == METADATA


@pytest.mark.parametrize("suffix", [".jpg"], indirect=True)
def test_the_longest_prompts_fit_into_a_jpeg(saved):
    prompts = {"prompt": "\u3000" * 9_900, "negative_prompt": "a" * 500}
    assert Request(**prompts | {"prompt": "sea" + prompts["prompt"]}, output_format="jpg")
    metadata = METADATA | {"inputs": METADATA["inputs"] | prompts}
    assert read_metadata(saved(metadata=metadata)) == metadata


def test_an_image_says_what_made_it(saved):
    assert read_metadata(saved()) == METADATA


@pytest.mark.parametrize("suffix", [".png", ".jpg"], indirect=True)
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


@pytest.mark.parametrize("suffix", [".png", ".jpg"], indirect=True)  # a WebP takes any mode
def test_an_image_that_cannot_be_encoded_leaves_the_old_file(saved, tmp_path):
    path = saved()
    before = path.read_bytes()
    with pytest.raises(OSError):
        Panorama(Image.new("F", (8, 8)), "", METADATA, {}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_image_of_others_is_refused(tmp_path, suffix):
    path = tmp_path / f"other{suffix}"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(ValueError, match=rf"other{suffix}: must .*; try .*Panorama\.save"):
        read_metadata(path)


@pytest.mark.parametrize("comment", [b"", b"ASCII", b"ASCII\0\0\0a wide view", "text"])
@pytest.mark.parametrize("name", ["other.jpg", "other.webp"])
def test_a_comment_of_others_is_refused(tmp_path, name, comment):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    Image.new("RGB", (8, 8)).save(tmp_path / name, exif=exif)
    with pytest.raises(ValueError, match=r"other\.\w+: must "):
        read_metadata(tmp_path / name)


def test_metadata_of_others_is_refused(tmp_path):
    path, info = tmp_path / "other.png", PngInfo()
    info.add_itxt("panorama", "a wide view")
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    with pytest.raises(ValueError, match=r"other\.png: must "):
        read_metadata(path)
