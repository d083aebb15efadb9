import dataclasses
import struct
import xml.etree.ElementTree as ET
import zlib
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

from panorama.picture import read_metadata, save
from panorama.request import ModeSettings, Request

SETTINGS = ModeSettings(
    width=512, height=128, guidance_scale=7.5, multiple=8, smallest=128, window=16
)
WITH_LORA = dataclasses.replace(SETTINGS, tokens=("<s0>", "<s1>"))
GPANO = "{http://ns.google.com/photos/1.0/panorama/}"


def resolved(**inputs):
    own, settings = ({}, WITH_LORA) if "mode" in inputs else ({"stride": 8}, SETTINGS)
    return Request(**{"prompt": "sea", "seed": 7, **own, **inputs}).resolve(settings)


def noise(request) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (request.height, request.width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def chunks(path):
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


def gpano(path) -> dict[str, str]:
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
def saved(tmp_path):
    def save_one(**inputs):
        request = resolved(**inputs)
        path = tmp_path / "picture.png"
        save(noise(request), path, request, "tiny")
        return path

    return save_one


def test_the_pixels_are_the_image(saved):
    with Image.open(saved()) as image:
        assert np.array_equal(image, noise(resolved()))


def test_a_picture_says_what_made_it(saved):
    prompt = 'Straße, 山 & <"sea">\nat night'
    metadata = read_metadata(saved(prompt=prompt, guidance_scale=3))
    assert Request(**metadata["inputs"]) == Request(
        **resolved(prompt=prompt).inputs() | {"guidance_scale": 3.0}
    )
    assert metadata["family"] == "tiny"
    assert metadata["tokens"] == ""
    assert set(metadata["versions"]) == {"panorama", "torch", "diffusers"}


def test_it_says_only_what_belongs_to_its_mode_and_a_file_by_its_hash(saved, tmp_path):
    depth = tmp_path / "depth.png"
    Image.new("L", (512, 256)).save(depth)
    inputs = read_metadata(saved(mode="sdxl-360", depth_image=depth))["inputs"]
    assert inputs["depth_image"] == f"sha256:{sha256(depth.read_bytes()).hexdigest()}"
    assert (inputs["lora_scale"], inputs["height"]) == (0.8, 256)
    assert "stride" not in inputs


@pytest.mark.parametrize(
    ("inputs", "tokens"),
    [({}, "<s0><s1>"), ({"prompt": "sea like <s1>"}, ""), ({"lora_scale": 0}, "")],
)
def test_it_says_whether_tokens_were_put_in_front_of_the_prompt(saved, inputs, tokens):
    metadata = read_metadata(saved(mode="sdxl-360", **inputs))
    assert metadata["tokens"] == tokens
    assert metadata["inputs"]["prompt"] == inputs.get("prompt", "sea")


def test_the_same_request_gives_the_same_bytes(saved):
    first = saved(loop_closure=True).read_bytes()
    assert saved(loop_closure=True).read_bytes() == first
    assert saved(loop_closure=True, seed=8).read_bytes() != first


def test_a_ring_is_the_middle_band_of_an_equirectangular_picture(saved):
    assert gpano(saved(loop_closure=True)) == {
        "ProjectionType": "equirectangular",
        "UsePanoramaViewer": "True",
        "FullPanoWidthPixels": "512",
        "FullPanoHeightPixels": "256",
        "CroppedAreaImageWidthPixels": "512",
        "CroppedAreaImageHeightPixels": "128",
        "CroppedAreaLeftPixels": "0",
        "CroppedAreaTopPixels": "64",
    }


def test_sdxl_360_is_closed_without_being_asked_to(saved):
    assert gpano(saved(mode="sdxl-360"))["CroppedAreaTopPixels"] == "64"


def test_a_picture_twice_as_wide_as_high_is_the_whole_of_one(saved):
    fields = gpano(saved(height=256))
    assert fields["FullPanoHeightPixels"] == fields["CroppedAreaImageHeightPixels"] == "256"
    assert fields["CroppedAreaTopPixels"] == "0"


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"width": 128, "height": 512, "loop_closure": True},
        {"width": 256, "height": 256, "loop_closure": True},
    ],
    ids=["flat", "closed top to bottom", "ring higher than half its width"],
)
def test_what_viewers_cannot_show_as_a_360_does_not_claim_to_be_one(saved, inputs):
    assert gpano(saved(**inputs)) == {}


def test_saving_replaces_a_file_whole_and_leaves_nothing_beside_it(saved, tmp_path):
    saved(seed=1)
    path = saved(seed=2)
    assert read_metadata(path)["inputs"]["seed"] == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_that_cannot_be_encoded_leaves_the_old_file(saved, tmp_path):
    path = saved()
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write mode"):
        save(Image.new("HSV", (8, 8)), path, resolved(), "tiny")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_of_others_is_not_taken_for_ours(tmp_path):
    path = tmp_path / "other.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(ValueError, match="does not say what made it"):
        read_metadata(path)
