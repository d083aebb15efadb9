"""The page in a real Chromium, on the library and on a real Cog server."""

import contextlib
import io
import json
import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from html import unescape
from math import inf
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, sync_playwright

from panorama.images.files import read_metadata
from panorama.request import INPUTS
from tests import browser

from .conftest import ROOT, Server, wait_until

PYTHON = ROOT / ".venv-studio" / "bin" / "python"
MILLISECONDS = 60_000
pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-studio, which script/studio makes"),
]
needs_chromium = pytest.mark.skipif(bool(browser.MISSING), reason=browser.MISSING)


@contextlib.contextmanager
def studio(log: Path, *arguments: str) -> Iterator[str]:
    """Yield the URL of a studio in a process of its own."""
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "OMP_WAIT_POLICY": "passive"}
    with log.open("w") as output:
        command = [str(PYTHON), "-m", "studio", "--port", "0", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        wait_until(lambda: "http" in log.read_text() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        yield log.read_text().split()[-1]
    finally:
        process.terminate()
        process.wait(60)
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Iterator[str]:
    with studio(tmp_path_factory.mktemp("studio") / "log") as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Yield a browser that resolves no name, but reaches this machine by its address."""
    flags = [*browser.FLAGS, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=browser.PATH, args=flags)
        yield running
        running.close()


@contextlib.contextmanager
def opened(chromium: Browser, url: str) -> Iterator[Page]:
    """Yield the page in a tab, which asks nobody but the studio for anything."""
    elsewhere: list[str] = []

    def watch(route: Route) -> None:
        if urlsplit(route.request.url).netloc != urlsplit(url).netloc:
            elsewhere.append(route.request.url)
        route.continue_()

    tab = chromium.new_page(viewport={"width": 1400, "height": 1000})
    tab.set_default_timeout(MILLISECONDS)
    tab.route("http*://**", watch)
    with tab.expect_request("**/heartbeat/*"):  # Gradio drops a click before that
        tab.goto(url)
    tab.get_by_role("button", name="Make the panorama").wait_for()
    yield tab
    tab.close()
    assert elsewhere == []


def fill(tab: Page, **inputs: object) -> None:
    for name, value in inputs.items():
        tab.locator(f"#input-{name} :is(textarea, input)").first.fill(str(value))


def make(tab: Page) -> None:
    tab.get_by_role("button", name="Make the panorama").click()


def make_small(tab: Page, seed: int) -> None:
    """Make a panorama of two steps, and wait for it."""
    tab.get_by_text("More inputs").click()
    fill(tab, prompt="sunset over green hills", width=512, height=256, seed=seed)
    fill(tab, num_inference_steps=2, sync_threshold=0)
    make(tab)
    tab.get_by_text(f"Seed {seed}, made in").wait_for()


def download(tab: Page, path: Path) -> Path:
    with tab.expect_download() as event:
        tab.get_by_text("Download the image").click()
    event.value.save_as(path)
    return path


def seam(tab: Page) -> Image.Image:
    """Return the image of the seam check, as the browser has it."""
    tab.get_by_text("Seam check").click()
    shown = tab.locator("img[alt='Rolled by half']")
    assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    with urllib.request.urlopen(shown.evaluate("image => image.src")) as answer:
        return Image.open(io.BytesIO(answer.read())).convert("RGB")


def problem(tab: Page, name: str) -> str:
    """Return the error at an input, waited for."""
    return tab.locator(f"#input-{name} [role=alert]").inner_text()


def test_there_is_a_component_for_every_input(library):
    with urllib.request.urlopen(f"{library}/config") as answer:
        components = [component["props"] for component in json.load(answer)["components"]]
    labelled = {props.get("label"): props for props in components}
    named = {props.get("elem_id"): props for props in components}
    for name, rule in INPUTS.items():
        component = labelled[name]
        assert named[f"input-{name}"]["visible"] == ("syncdiffusion" in rule.modes)
        about = unescape(re.sub("<.*?>", "", named[f"about-{name}"]["value"]))
        upper = f" to {rule.maximum}. " if rule.maximum < inf else ". "
        limits = f"{rule.minimum}{upper}" if rule.minimum > -inf else ""
        assert about.removeprefix("From ") == f"{limits}{rule.description}"
        if "minimum" in component:
            assert (component["minimum"], component["maximum"]) == (rule.minimum, rule.maximum)
        choices = ("", *rule.choices) if rule.choices and rule.optional else rule.choices
        assert tuple(value for _, value in component.get("choices", ())) == choices
        value = None if rule.required else rule.default
        shown = component.get("value")
        assert shown == value or shown == str(value) or (value is None and shown == "")


@needs_chromium
def test_a_panorama_from_a_prompt(library, chromium, tmp_path):
    with opened(chromium, library) as tab:
        make_small(tab, seed=7)
        viewer = tab.frame_locator("iframe[title=Viewer]")
        viewer.locator("canvas").wait_for()
        viewer.get_by_text("About this image").click()
        viewer.get_by_text("sunset over green hills").first.wait_for()

        file = download(tab, tmp_path / "a.png")
        inputs = read_metadata(file)["inputs"]
        assert (inputs["prompt"], inputs["seed"]) == ("sunset over green hills", 7)
        assert (inputs["num_inference_steps"], inputs["sync_threshold"]) == (2, 0)
        image = Image.open(file)
        assert image.size == (512, 256)
        pixels, rolled = (np.asarray(i, dtype=float) for i in (image, seam(tab)))
        error = np.abs(rolled - np.roll(pixels, 256, axis=1)).mean()
        assert error < 3 and error < np.abs(rolled - pixels).mean() / 3

        fill(tab, prompt="night", seed="")
        tab.get_by_role("button", name="Again with these inputs").click()
        filled = "() => document.querySelector('#input-seed :is(textarea, input)').value == '7'"
        tab.wait_for_function(filled)
        assert tab.locator("#input-prompt textarea").input_value() == "sunset over green hills"


@needs_chromium
def test_errors_appear_at_the_inputs_that_they_name(library, chromium):
    with opened(chromium, library) as tab:
        make(tab)
        assert problem(tab, "prompt").startswith("prompt='': must not be empty")
        fill(tab, prompt="night over the sea", width=1001)
        make(tab)
        assert "must be a multiple of 8" in problem(tab, "width")
        assert tab.locator("[role=alert]:visible").count() == 1

        # One of the models' own, in the part of the form that is closed.
        fill(tab, width="")
        tab.get_by_text("More inputs").click()
        fill(tab, stride=100)
        tab.get_by_text("More inputs").click()
        make(tab)
        assert "must be at most 32" in problem(tab, "stride")
        fill(tab, stride="many")
        make(tab)
        tab.get_by_text("stride='many': must be an integer; try 16").wait_for()


@needs_chromium
def test_a_mode_shows_its_own_inputs(library, chromium):
    with opened(chromium, library) as tab:
        shown = tab.locator("#input-depth_image")
        assert shown.count() == 0
        tab.get_by_role("button", name="A room by its depth").click()
        shown.get_by_label("depth.png").wait_for()
        assert tab.locator("#input-loop_closure").count() == 0


@needs_chromium
def test_a_run_stops(library, chromium):
    with opened(chromium, library) as tab:
        tab.get_by_text("More inputs").click()
        fill(tab, prompt="night over the sea", width=512, height=256)
        fill(tab, num_inference_steps=200, sync_threshold=0)
        make(tab)
        tab.get_by_alt_text("Preview").or_(tab.locator("progress")).first.wait_for()
        tab.get_by_role("button", name="Stop").click()
        tab.get_by_text("Stopped.").wait_for()
        tab.get_by_role("button", name="Make the panorama").click(trial=True)  # once it is enabled


@needs_chromium
def test_a_cog_server_makes_the_same_image(library, chromium, server: Server, tmp_path):
    with opened(chromium, library) as tab:
        make_small(tab, seed=3)
        own = download(tab, tmp_path / "own.png")
    url = f"http://127.0.0.1:{server.port}"
    with studio(tmp_path / "log", "--url", url) as remote, opened(chromium, remote) as tab:
        make_small(tab, seed=3)
        other = download(tab, tmp_path / "other.png")
        assert Image.open(other).tobytes() == Image.open(own).tobytes()

        # What the server alone can check, and its steps, which it reports while it runs.
        fill(tab, width=1001)
        make(tab)
        assert "must be a multiple of 8" in problem(tab, "width")
        fill(tab, width=1024, num_inference_steps=200)
        make(tab)
        tab.get_by_text("of 200").wait_for()
        tab.get_by_role("button", name="Stop").click()
        tab.get_by_text("Stopped.").wait_for()
        server.wait_until_idle()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--url", "ftp://a"], "studio: --url 'ftp://a': must be an http or https URL; try http"),
        (["--url", "http://127.0.0.1:9"], "studio: --url 'http://127.0.0.1:9': must be of a Cog"),
        (["--port", "70000"], "studio: --host 127.0.0.1 --port 70000: must be an address"),
        (["--family", "nonesuch"], "nonesuch"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, error):
    command = [PYTHON, "-m", "studio", "--port", "0", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert error in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
