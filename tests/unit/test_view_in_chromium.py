"""The page of an image in a real Chromium, opened from disk, without a network."""

import io
import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from math import pi, radians, tan
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from playwright.sync_api import Browser, Page

from panorama.images.files import Panorama
from panorama.images.viewer import view
from panorama.sampling.canvas import Axis
from tests import browser

pytestmark = pytest.mark.skipif(bool(browser.MISSING), reason=browser.MISSING or "it is there")
Pixels = NDArray[np.float64]
Shown = tuple[Image.Image, Page]
SIZE = 480, 270  # of the window
BARE = ".pnlm-ui, #panel { visibility: hidden }"
PROMPT = (
    "</title></script><script>hacked = 1</script><img src=x onerror='hacked = 1'>&amp; $image ä山"
)
INPUTS = {"prompt": PROMPT, "mode": "sdxl-360", "seed": 7}
METADATA = {"inputs": INPUTS, "family": "tiny", "versions": {"panorama": "1.2.3"}}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.chromium() as running:
        yield running


def wait_until(page: Page, expression: str) -> None:
    """Wait until an expression is true; playwright's own way polls by eval, which pages forbid."""
    end = time.monotonic() + 30
    while not page.evaluate(f"Boolean({expression})"):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


@contextmanager
def opened(
    chromium: Browser, folder: Path, image: Image.Image | Path, closed: Axis = ""
) -> Iterator[Page]:
    """Write the page of an image, and open it from disk."""
    file, problems, requests = folder / "out.html", [], []
    if isinstance(image, Path):
        view(image, file)
    else:
        view(Panorama(image, closed, METADATA | {"closed": closed}, {}), file)
    page = chromium.new_page(viewport={"width": SIZE[0], "height": SIZE[1]}, has_touch=True)
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda told: problems.extend([told.text] * (told.type == "error")))
    page.goto(file.as_uri())
    wait_until(page, "!viewer || viewer.isLoaded()")
    settle(page)
    yield page
    page.close()
    assert [url for url in requests if not url.startswith("blob:")] == [file.as_uri()]
    assert problems == []


@pytest.fixture(scope="module")
def sphere(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    image = pattern(1024, 512)
    with opened(chromium, tmp_path_factory.mktemp("sphere"), image, "x") as page:
        yield image, page


@pytest.fixture(scope="module")
def ring(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    image = pattern(1024, 256)
    with opened(chromium, tmp_path_factory.mktemp("ring"), image, "x") as page:
        yield image, page


@pytest.fixture(scope="module")
def strip(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """Yield an open strip that is red at its left end, blue at its right end and nowhere black."""
    red = np.linspace(255, 0, 1024)[None, :, None].repeat(256, 0)
    values = np.concatenate([red, np.zeros_like(red), 255 - red], -1)
    image = Image.fromarray(values.round().astype(np.uint8))
    with opened(chromium, tmp_path_factory.mktemp("strip"), image) as page:
        yield image, page


def settle(page: Page) -> None:
    """Wait until the view stands still and is drawn."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")


def look(page: Page, yaw: float, pitch: float = 0, field: float = 60) -> Pixels:
    """Look somewhere, and return what is seen (H, W, 3), 0 to 255."""
    page.evaluate("viewer.stopMovement()")
    for name, angle in (("Hfov", field), ("Pitch", pitch), ("Yaw", yaw)):
        page.evaluate(f"viewer.set{name}({angle}, false)")
    settle(page)
    return seen(page)


def seen(page: Page) -> Pixels:
    with Image.open(io.BytesIO(page.screenshot(style=BARE))) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64)


def pattern(width: int, height: int) -> Image.Image:
    """Smooth noise that closes left to right."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    wide = Image.fromarray(np.concatenate([noise] * 3, 1)).filter(ImageFilter.GaussianBlur(4))
    values = np.asarray(wide, dtype=np.float64)[:, width : 2 * width]
    values = (values - values.mean()) / values.std() * 50 + 128
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def directions(yaw: float, pitch: float, field: float) -> tuple[Pixels, Pixels]:
    """Return the azimuth and elevation of every pixel of the window, radians."""
    width, height = SIZE
    reach = tan(radians(field) / 2)
    right, up = np.meshgrid(
        reach * (2 * (np.arange(width) + 0.5) / width - 1),
        reach * height / width * (1 - 2 * (np.arange(height) + 0.5) / height),
    )
    p = radians(pitch)
    ahead, above = np.cos(p) - up * np.sin(p), np.sin(p) + up * np.cos(p)
    return radians(yaw) + np.arctan2(right, ahead), np.arctan2(above, np.hypot(right, ahead))


def sample(image: Image.Image, columns: Pixels, rows: Pixels) -> Pixels:
    """Interpolate an image, whose pixel (0, 0) reaches from 0 to 1, around its left and right."""
    values = np.asarray(image, dtype=np.float64)
    height, width = values.shape[:2]
    left, top = np.floor(columns - 0.5), np.floor(rows - 0.5)
    right, down = (columns - 0.5 - left)[..., None], (rows - 0.5 - top)[..., None]

    def pixel(row: Pixels, column: Pixels) -> Pixels:
        return values[row.clip(0, height - 1).astype(int), (column % width).astype(int)]

    upper = (1 - right) * pixel(top, left) + right * pixel(top, left + 1)
    lower = (1 - right) * pixel(top + 1, left) + right * pixel(top + 1, left + 1)
    return (1 - down) * upper + down * lower


def on_sphere(image: Image.Image, yaw: float, pitch: float = 0, field: float = 60) -> Pixels:
    azimuth, elevation = directions(yaw, pitch, field)
    columns = (azimuth / (2 * pi) + 0.5) * image.width
    return sample(image, columns, (0.5 - elevation / pi) * image.height)


def on_cylinder(
    image: Image.Image, radius: float, yaw: float, pitch: float = 0, field: float = 60
) -> Pixels:
    azimuth, elevation = directions(yaw, pitch, field)
    columns = azimuth * radius + image.width / 2
    return sample(image, columns, image.height / 2 - radius * np.tan(elevation))


@pytest.mark.parametrize(
    "place", [(180, 0, 60), (180, 0, 35), (-150, 40, 90), (0, 0, 60), (0, -60, 60), (20, 90, 90)]
)
def test_a_sphere_is_seen_in_perspective_across_its_seam(sphere, place):
    image, page = sphere
    away = np.abs(look(page, *place) - on_sphere(image, *place))
    assert away.mean() < 0.3  # rounding
    assert away.max() < 3


def test_there_is_no_step_at_the_seam(sphere):
    _, page = sphere
    steps = np.abs(np.diff(look(page, 180), axis=1)).mean((0, 2))
    assert steps[SIZE[0] // 2 - 3 : SIZE[0] // 2 + 2].max() < 1.5 * np.median(steps)


@pytest.mark.parametrize("place", [(180, 0, 60), (0, 0, 60), (180, 8, 70), (100, -8, 70)])
def test_a_ring_is_seen_on_a_cylinder(ring, place):
    image, page = ring
    away = np.abs(look(page, *place) - on_cylinder(image, image.width / (2 * pi), *place))
    assert away.mean() < 0.8  # its rows were resampled
    assert away.max() < 10


@pytest.mark.parametrize("end", [-1, 1])
def test_a_strip_ends_where_it_ends(strip, end):
    image, page = strip
    radius = 128 / tan(radians(30))
    found = look(page, end * 179)
    yaw, pitch, field = page.evaluate("[viewer.getYaw(), viewer.getPitch(), viewer.getHfov()]")
    assert end * yaw < np.degrees(512 / radius) - field / 2
    away = np.abs(found - on_cylinder(image, radius, yaw, pitch, field))
    assert away.mean() < 1
    edge = found[:, 0 if end < 0 else -1]
    assert np.abs(edge - [(255, 0, 0), (0, 0, 255)][end > 0]).mean() < 5  # 3 % from the end


@pytest.mark.parametrize("field", [30, 120])
@pytest.mark.parametrize(("yaw", "pitch"), [(-179, 90), (-179, -90), (179, 90), (0, 90)])
def test_nothing_is_seen_beyond_a_strip(strip, yaw, pitch, field):
    _, page = strip
    assert look(page, yaw, pitch, field).max(-1).min() > 60  # what lies beyond is black


def test_the_first_view_of_a_strip_shows_nothing_beyond_it(chromium, strip, tmp_path):
    with opened(chromium, tmp_path, strip[0]) as page:
        assert seen(page).max(-1).min() > 60


def test_a_jpeg_stays_as_it_is_and_has_a_step_of_half_a_pixel_at_most(chromium, tmp_path):
    image, file = pattern(1024, 512), tmp_path / "out.jpg"
    image.save(file, quality=100, subsampling=0)
    with opened(chromium, tmp_path, file) as page, Image.open(file) as decoded:
        away = np.abs(look(page, 180) - on_sphere(decoded, 180))
        assert away.mean() < 0.6
        assert np.percentile(away, 99.95) < 10


def test_a_ring_may_be_wider_than_a_texture(chromium, tmp_path):
    """Pannellum makes two textures of it, which meet in the middle."""
    image = pattern(8192, 128)
    with opened(chromium, tmp_path, image, "x") as page:
        for yaw in (0, 90, 180):
            away = np.abs(look(page, yaw, 0, 8) - on_cylinder(image, 8192 / (2 * pi), yaw, 0, 8))
            assert away.mean() < 0.8
            assert np.percentile(away, 99.9) < 10


def test_keys_and_touch_move_the_view(ring):
    _, page = ring
    turns = {}
    for key in ("ArrowRight", "a"):
        look(page, 0, 0, 60)
        page.keyboard.press(key, delay=300)
        turns[key] = page.evaluate("viewer.getYaw()")
    assert turns["ArrowRight"] > 0.2 and turns["a"] < -0.2

    look(page, 0, 0, 60)
    for key in ("Control", "Shift", "Control+d"):  # pannellum takes them of itself
        page.keyboard.press(key, delay=200)
    assert page.evaluate("viewer.getYaw()") == 0
    assert page.evaluate("viewer.getHfov()") == 60
    page.keyboard.press("+", delay=200)
    assert page.evaluate("viewer.getHfov()") < 60

    look(page, 0, 0, 60)
    session = page.context.new_cdp_session(page)
    for kind, x in (("touchStart", 240), ("touchMove", 200), ("touchMove", 140)):
        points = [{"x": x, "y": 130}]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    settle(page)
    assert page.evaluate("viewer.getYaw()") > 5  # the image follows the finger to the left


@pytest.mark.parametrize(("width", "height", "field"), [(480, 270, 100), (270, 540, 61.6)])
def test_the_first_view_is_100_degrees_along_the_longer_side(
    chromium, sphere, width, height, field
):
    page = chromium.new_page(viewport={"width": width, "height": height})
    page.goto(sphere[1].url)
    wait_until(page, "viewer.isLoaded()")
    assert page.evaluate("viewer.getHfov()") == pytest.approx(field, abs=0.1)
    page.close()


def test_f_is_full_screen_where_the_panel_stays(ring):
    _, page = ring
    # Pannellum marks its button once it has heard of the change; an earlier key would be lost.
    marked = "document.querySelector('.pnlm-fullscreen-toggle-button-active')"
    for inside in ("true", "false"):
        page.keyboard.press("f")
        wait_until(page, f"Boolean(document.fullscreenElement && {marked}) === {inside}")
        if inside == "true":
            assert page.evaluate("document.fullscreenElement.contains(panel)")
    wait_until(page, f"!document.fullscreenElement && !{marked}")


def test_the_panel_says_what_made_the_image(sphere):
    _, page = sphere
    for is_open in (True, False):
        page.keyboard.press("i")
        assert page.evaluate("panel.open") is is_open
    facts = page.evaluate("[...panel.querySelectorAll('dt')].map(e => e.textContent)")
    values = page.evaluate("[...panel.querySelectorAll('dd')].map(e => e.textContent)")
    assert dict(zip(facts, values, strict=True)) == {
        "Prompt": PROMPT,
        "Mode": "sdxl-360",
        "Seed": "7",
        "Family": "tiny",
        "Version": "1.2.3",
        "Size": "1024 x 512",
    }
    everything = page.evaluate("panel.querySelector('pre').textContent")
    assert json.loads(everything) == METADATA | {"closed": "x"}


def test_a_prompt_is_text_and_runs_nothing(sphere):
    _, page = sphere
    assert page.title() == PROMPT[:80]
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.evaluate("document.images.length") == 0


def test_the_page_runs_no_script_but_its_own(chromium, sphere):
    page, blocked = chromium.new_page(), []
    page.on("console", lambda told: blocked.append(told.text))
    page.goto(sphere[1].url)
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "hacked = 1";
            document.body.append(script);
        }"""
    )
    assert page.evaluate("typeof hacked") == "undefined"
    assert any("Content Security Policy" in text for text in blocked)
    page.close()


def test_a_tall_image_is_shown_flat(chromium, tmp_path):
    with opened(chromium, tmp_path, pattern(256, 512), "y") as page:
        wait_until(page, "flat.complete")
        assert page.evaluate("[flat.naturalWidth, flat.naturalHeight]") == [256, 512]
        assert page.locator("#flat").is_visible() and page.locator("#panel").is_visible()
        assert not page.locator("#help").count()


def test_without_webgl_the_image_is_shown_flat(chromium, tmp_path):
    view(Panorama(pattern(512, 256), "x", METADATA, {}), tmp_path / "out.html")
    launch = chromium.browser_type.launch
    with closing(launch(executable_path=browser.PATH, args=["--disable-3d-apis"])) as bare:
        page = bare.new_page()
        page.goto((tmp_path / "out.html").as_uri())
        wait_until(page, "document.images.length === 1 && flat.complete")
        assert page.evaluate("flat.naturalHeight") == 256
        assert page.locator("#panel").is_visible()


def test_an_image_too_large_for_the_graphics_is_shown_flat(chromium, tmp_path):
    with opened(chromium, tmp_path, pattern(512, 256), "x") as page:
        page.evaluate(
            """() => document.querySelector("canvas").getContext("experimental-webgl")
                .getExtension("WEBGL_lose_context").loseContext()"""
        )
        wait_until(page, "document.images.length === 1 && flat.complete")
        assert not page.locator("#panorama").count()
