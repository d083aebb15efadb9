"""The page of an image, as a file: its size, its parts, and what it covers around the viewer."""

import base64
import io
import json
import re
import subprocess
import sys
from hashlib import sha256
from math import atan, degrees, pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import panorama
from panorama.images import viewer
from panorama.images.__main__ import main
from panorama.images.files import Panorama, closed_axis, open_image
from panorama.images.viewer import Scene, arrange, bend, page, view

ROOT = Path(__file__).parents[2]
PANNELLUM = ROOT / "panorama" / "images" / "pannellum"
VENDORED = {
    "COPYING": "e20b384f83f8f580d69e32d2419e093d777830689b3ab48cafbe4284b6ebc3c1",
    "pannellum.css": "da0906e704524cca414ce6160c7be218048dcdd0c13fafa84184f6ea0b084785",
    "pannellum.js": "51b8df674333612adbd807b6f47940d4d7aa07317d949d3f1314f84de965fc3c",
}


METADATA = {"inputs": {"prompt": "sunset over volcanic land", "seed": 2}, "family": "tiny"}


def saved(path: Path, width: int, height: int, closed: str = "", **metadata: Any) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3))
    image = Image.fromarray(pixels.astype(np.uint8)).resize((width, height))
    Panorama(image, closed, metadata, {}).save(path)
    return path


def block(html: bytes, name: str) -> tuple[str, str]:
    """Return the media type and the text of a data block of a page."""
    (found,) = re.findall(rf'<script type="([^"]*)" id="{name}">([^<]*)</script>', html.decode())
    return found


def settings(html: bytes) -> Any:
    return json.loads(block(html, "settings")[1])


def embedded(html: bytes) -> tuple[str, bytes]:
    media_type, text = block(html, "image")
    return media_type, base64.b64decode(text, validate=True)


def test_the_library_is_the_one_that_npm_has():
    """script/vendor-viewer verifies the package that these files come from."""
    found = {path.name: sha256(path.read_bytes()).hexdigest() for path in PANNELLUM.iterdir()}
    assert found == VENDORED


def test_the_page_has_the_licence_of_the_library(tmp_path):
    html = page(saved(tmp_path / "a.png", 64, 32).read_bytes()).decode()
    assert (PANNELLUM / "COPYING").read_text() in html
    assert (PANNELLUM / "pannellum.js").read_text() in html


def test_only_the_licence_and_the_library_name_other_hosts(tmp_path):
    html = page(saved(tmp_path / "a.png", 64, 32).read_bytes()).decode()
    own = html.replace((PANNELLUM / "pannellum.js").read_text(), "")
    own = own.replace((PANNELLUM / "pannellum.css").read_text(), "")
    assert re.findall(r"https?://[^ ,]+", own) == ["https://pannellum.org"]


@pytest.mark.parametrize(
    ("width", "height", "closed", "expected"),
    [
        (1024, 512, "x", Scene(360, 180)),
        (2048, 512, "x", Scene(360, 2 * degrees(atan(pi / 4)), 1024 / pi)),
        (512, 512, "x", Scene(360, 2 * degrees(atan(pi)), 256 / pi)),
        # 60 degrees high, as far as that is at most 330 degrees wide
        (512, 512, "", Scene(degrees(2 * 3**-0.5), 60, 256 * 3**0.5)),
        (1024, 512, "", Scene(degrees(4 * 3**-0.5), 60, 256 * 3**0.5)),
        (
            4096,
            256,
            "",
            Scene(330, 2 * degrees(atan(128 / 4096 * 330 / 180 * pi)), 4096 / 330 * 180 / pi),
        ),
        (512, 1024, "", None),
        (512, 1024, "y", None),
    ],
    ids=str,
)
def test_what_an_image_covers_around_the_viewer(width, height, closed, expected):
    found = arrange(width, height, closed)
    assert (found is None) == (expected is None)
    if found:
        values = (found.width, found.height, found.radius)
        assert values == pytest.approx((expected.width, expected.height, expected.radius))


def test_an_open_strip_has_limits_and_a_ring_and_a_sphere_have_none(tmp_path):
    strip = settings(page(saved(tmp_path / "a.png", 512, 128).read_bytes()))
    assert -strip["minYaw"] == strip["maxYaw"] == pytest.approx(strip["haov"] / 2)
    assert -strip["minPitch"] == strip["maxPitch"] == pytest.approx(strip["vaov"] / 2)
    assert strip["maxHfov"] <= strip["haov"]
    ring = settings(page(saved(tmp_path / "a.png", 512, 128, "x").read_bytes()))
    assert "minYaw" not in ring and "maxYaw" not in ring
    assert -ring["minPitch"] == ring["maxPitch"] == pytest.approx(ring["vaov"] / 2)
    sphere = settings(page(saved(tmp_path / "a.png", 256, 128, "x").read_bytes()))
    assert not {"minYaw", "maxYaw", "minPitch", "maxPitch"} & set(sphere)
    assert settings(page(saved(tmp_path / "a.png", 128, 256, "y").read_bytes())) is None


def test_a_png_is_embedded_without_loss_and_with_its_edges_on_both_sides(tmp_path):
    path = saved(tmp_path / "a.png", 256, 128, "x")
    media_type, data = embedded(page(path.read_bytes()))
    with Image.open(path) as image, Image.open(io.BytesIO(data)) as found:
        assert (media_type, found.format) == ("image/webp", "WEBP")
        assert np.array_equal(found, np.pad(image, ((0, 0), (1, 1), (0, 0)), "wrap"))
    assert settings(page(path.read_bytes()))["haov"] == pytest.approx(360 * 258 / 256)


@pytest.mark.parametrize(("suffix", "kind"), [(".jpg", "image/jpeg"), (".webp", "image/webp")])
def test_a_jpeg_or_webp_of_a_sphere_stays_as_it_is(tmp_path, suffix, kind):
    path = saved(tmp_path / f"a{suffix}", 256, 128, "x")
    html = page(path.read_bytes())
    assert embedded(html) == (kind, path.read_bytes())
    assert settings(html)["haov"] == 360


@pytest.mark.parametrize(("suffix", "kind"), [(".jpg", "image/jpeg"), (".webp", "image/webp")])
def test_a_jpeg_or_webp_of_a_ring_keeps_its_format(tmp_path, suffix, kind):
    media_type, data = embedded(page(saved(tmp_path / f"a{suffix}", 512, 64, "x").read_bytes()))
    with Image.open(io.BytesIO(data)) as found:
        assert (media_type, found.get_format_mimetype(), found.width) == (kind, kind, 514)


def test_a_png_too_wide_for_webp_stays_a_png(tmp_path):
    media_type, data = embedded(page(saved(tmp_path / "a.png", 16384, 16, "x").read_bytes()))
    with Image.open(io.BytesIO(data)) as found:
        assert (media_type, found.format, found.width) == ("image/png", "PNG", 16386)


def test_rows_of_a_cylinder_become_rows_of_equal_angles():
    scene = arrange(512, 512, "x")
    rows = 512 / 2 - np.arange(512) - 0.5  # above the middle
    heights = np.degrees(np.arctan(rows / scene.radius))  # of a ramp of elevations
    ramp = Image.fromarray(np.round(heights[:, None].repeat(512, 1) + 100).astype(np.uint8))
    bent = np.asarray(bend(ramp.convert("RGB"), scene), dtype=float)[:, 0, 0] - 100
    assert len(bent) == round(scene.radius * np.radians(scene.height))
    expected = scene.height * (0.5 - (np.arange(len(bent)) + 0.5) / len(bent))
    np.testing.assert_allclose(bent, expected, atol=1)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("scale", [1, 2])
def test_the_page_is_at_most_400_kb_larger_than_the_image(tmp_path, scale, suffix):
    path = tmp_path / f"a{suffix}"
    with Image.open(ROOT / "docs" / "sunset.png") as image:
        size = scale * image.width, scale * image.height
        Panorama(image.convert("RGB").resize(size), "x", METADATA, {}).save(path)
    view(path, tmp_path / "a.html")
    assert (tmp_path / "a.html").stat().st_size - path.stat().st_size < 400_000


def test_an_image_says_by_its_metadata_whether_it_closes(tmp_path):
    for closed in ("", "x", "y"):
        Panorama(Image.new("RGB", (256, 128)), "", {"closed": closed}, {}).save(tmp_path / "a.png")
        with open_image(tmp_path / "a.png") as image:
            assert closed_axis(image) == closed


@pytest.mark.parametrize(
    ("fields", "closed"),
    [
        ('GPano:FullPanoWidthPixels="300" GPano:CroppedAreaImageWidthPixels="300"', "x"),
        ('GPano:FullPanoWidthPixels="900" GPano:CroppedAreaImageWidthPixels="300"', ""),
        (
            "<GPano:FullPanoWidthPixels>300</GPano:FullPanoWidthPixels>"
            "<GPano:CroppedAreaImageWidthPixels>300</GPano:CroppedAreaImageWidthPixels>",
            "x",
        ),
        ("", ""),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_of_others_closes_if_its_gpano_says_so(tmp_path, fields, closed, suffix):
    path, info = tmp_path / f"a.{suffix}", PngInfo()
    info.add_itxt("XML:com.adobe.xmp", fields)
    options = {"pnginfo": info} if suffix == "png" else {"xmp": fields.encode()}
    Image.new("RGB", (300, 100)).save(path, **options)
    with open_image(path) as image:
        assert closed_axis(image) == closed


@pytest.mark.parametrize(("width", "closed"), [(200, "x"), (201, ""), (100, "")])
def test_an_image_that_says_nothing_closes_if_it_is_twice_as_wide_as_high(tmp_path, width, closed):
    Image.new("RGB", (width, 100)).save(tmp_path / "a.png")
    with open_image(tmp_path / "a.png") as image:
        assert closed_axis(image) == closed


@pytest.mark.parametrize("metadata", [[], 3, {"inputs": 3}, {"inputs": {"prompt": ["a"]}}, {}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_an_image_of_others_has_a_page(tmp_path, metadata, mode):
    info = PngInfo()
    info.add_itxt("panorama", json.dumps(metadata))
    Image.new(mode, (64, 32)).save(tmp_path / "a.png", pnginfo=info)
    view(tmp_path / "a.png", tmp_path / "a.html")
    html = (tmp_path / "a.html").read_text()
    assert "<dt>Size</dt><dd>64 x 32</dd>" in html
    assert ("<dt>Prompt</dt>" in html) == ("prompt" in str(metadata))


def test_view_takes_a_panorama_too(tmp_path):
    shown = Panorama(Image.new("RGB", (64, 32), "red"), "x", {"family": "tiny"}, {})
    panorama.view(shown, tmp_path / "a.html")
    assert "<dt>Family</dt><dd>tiny</dd>" in (tmp_path / "a.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_script_view_writes_the_page_beside_the_image(tmp_path, capsys):
    path = saved(tmp_path / "a.png", 64, 32)
    assert main(["view", str(path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.html'}\n"
    assert main(["view", str(path), "-o", str(tmp_path / "b.HTML")]) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.HTML").read_bytes()
    assert (tmp_path / "a.html").read_bytes() == page(path.read_bytes(), str(path))


def torn(path: Path) -> Path:
    path.write_bytes(saved(path, 64, 32).read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.png"], "none.png: must be a file that exists; try output.png"),
        (["a.png", "-o", "b.png"], "-o b.png: must be a file that ends in .html; try output.html"),
        (["a.png", "-o", "x/b.html"], "-o x/b.html: must be in a folder that exists"),
        (["text.png"], "text.png: must be a whole PNG, JPEG or WebP image"),
        (["torn.png"], "torn.png: must be a whole PNG, JPEG or WebP image"),
        (["torn.jpg"], "torn.jpg: must be a whole PNG, JPEG or WebP image"),
        ([], "the following arguments are required: image"),
    ],
)
def test_a_bad_command_gets_one_line_and_writes_nothing(
    arguments, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a.png", 64, 32)
    (tmp_path / "text.png").write_text("an image")
    torn(tmp_path / "torn.png")
    torn(tmp_path / "torn.jpg")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as exit_:
        main(["view", *arguments])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"view: {told}") and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_viewing_does_not_load_torch(tmp_path):
    saved(tmp_path / "a.png", 64, 32)
    code = (
        "import sys; from panorama.images.__main__ import main; main(['view', sys.argv[1]]); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], cwd=ROOT, check=True)


def test_a_title_is_no_longer_than_it_may_be():
    shown = Panorama(Image.new("RGB", (64, 32)), "", {"inputs": {"prompt": "a" * 5000}}, {})
    title = re.findall("<title>(.*)</title>", page(shown.encode()).decode())
    assert title == ["a" * viewer.LONGEST_TITLE]
