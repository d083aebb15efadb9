"""The mode sdxl-360 over HTTP, with depth images as clients send them."""

import base64
import functools
import http.server
import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tifffile import imwrite

from panorama import read_metadata
from tests.bad_images import bomb
from tests.small_sdxl import save_family

from .conftest import Server, decoded, png, serving

pytestmark = pytest.mark.server

QUICK = {"prompt": "bedroom", "mode": "sdxl-360", "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the server's own folder for temporary files."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, temporary: Path) -> Iterator[Server]:
    """Yield a server of a random family that has this mode alone."""
    folder = tmp_path_factory.mktemp("family")
    save_family(folder, width=256, height=128, guidance_scale=3.0)
    with serving(folder / "log", PANORAMA_FAMILY=str(folder), TMPDIR=str(temporary)) as server:
        yield server


def depth(height: int = 64, width: int = 192) -> bytes:
    """Return a PNG whose left and right edges match."""
    turn = np.linspace(0, 2 * np.pi, width, endpoint=False)
    values = np.tile(127 + 127 * np.sin(turn), (height, 1)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@pytest.fixture
def http_url(tmp_path: Path) -> Iterator[str]:
    """Yield the URL of a depth image on a real HTTP server."""
    (tmp_path / "depth.png").write_bytes(depth())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/depth.png"
        httpd.shutdown()
        thread.join()


def test_setup_prints_no_warnings(server: Server) -> None:
    assert "should be kept in float32" not in server.log()
    assert "new embeddings" not in server.log()
    assert "Warning:" not in server.log()


def test_a_prediction_from_text_alone(server: Server) -> None:
    code, prediction = server.predict(QUICK)
    assert (code, prediction["status"]) == (200, "succeeded")
    assert decoded(prediction).size == (256, 128)
    assert re.fullmatch(r"seed: 1\ncost: \d+\nstep 1/2\nstep 2/2\n?", prediction["logs"])


def test_a_depth_image_comes_as_a_data_url_or_an_http_url(server: Server, http_url: str) -> None:
    _, by_data = server.predict(QUICK | {"depth_image": data_url(depth())})
    _, by_http = server.predict(QUICK | {"depth_image": http_url})
    assert by_data["status"] == "succeeded"
    assert decoded(by_data).size == (192, 64)
    assert re.fullmatch(r"seed: 1\ncost: \d+\nstep 1/2\nstep 2/2\n?", by_data["logs"])
    assert png(by_data) == png(by_http)
    _, without = server.predict(QUICK | {"width": 192, "height": 64})
    assert list(decoded(without).tobytes()) != list(decoded(by_data).tobytes())


def test_edges_that_do_not_match_are_logged(server: Server) -> None:
    values = np.tile(np.linspace(0, 255, 192).astype(np.uint8), (64, 1))
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    _, prediction = server.predict(QUICK | {"depth_image": data_url(buffer.getvalue())})
    assert "left and right edges differ by 1.000" in prediction["logs"]


def tiff(values: np.ndarray, **options: Any) -> str:
    """Return the data URL of a TIFF."""
    buffer = io.BytesIO()
    imwrite(buffer, values, **options)
    return f"data:image/tiff;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_every_kind_of_depth_gives_the_image_of_its_nearness(server: Server) -> None:
    turn = np.linspace(0, 2 * np.pi, 192, endpoint=False)
    metres = np.tile(6 - 4 * np.cos(turn), (64, 1))  # from 2 m to 10 m
    nearness = (1 / metres - 0.1) / (0.5 - 0.1)
    white = np.round(nearness * 65535).astype(np.uint16)
    kinds = {
        "nearness": (tiff(white), {}),
        "white is zero": (tiff(65535 - white, photometric="miniswhite", byteorder=">"), {}),
        "inverted": (tiff(65535 - white), {"depth_kind": "inverted"}),
        "metres": (tiff(metres.astype(np.float32)), {"depth_kind": "distance"}),
    }
    images = {}
    for name, (url, inputs) in kinds.items():
        _, prediction = server.predict(QUICK | {"depth_image": url, **inputs})
        assert prediction["status"] == "succeeded", prediction
        images[name] = np.asarray(decoded(prediction), np.int16)
    for image in images.values():
        assert np.abs(image - images["nearness"]).max() <= 1


@pytest.mark.parametrize(
    ("name", "mime", "inputs"),
    [
        ("PNG", "image/png", {}),
        ("JPEG", "image/jpeg", {"output_format": "jpg", "output_quality": 80}),
        ("WEBP", "image/webp", {"output_format": "webp", "output_quality": 80}),
    ],
)
def test_an_image_comes_in_the_format_that_was_asked_for(
    server: Server, tmp_path: Path, name: str, mime: str, inputs: dict[str, Any]
) -> None:
    _, prediction = server.predict(QUICK | inputs)
    head, _, data = prediction["output"].partition(",")
    assert head == f"data:{mime};base64"
    path = tmp_path / "a"
    path.write_bytes(base64.b64decode(data))
    with Image.open(path) as image:
        assert (image.format, image.size) == (name, (256, 128))
    assert b"GPano:ProjectionType" in path.read_bytes()
    assert read_metadata(path)["inputs"]["seed"] == 1


BAD = {
    "empty": (data_url(b""), ("depth_image=",)),
    "no image": (data_url(b"<html>404</html>"), ("depth_image=",)),
    "truncated": (data_url(depth()[:-40]), ("depth_image=",)),
    "a decompression bomb": (data_url(bomb()), ("depth_image=",)),
    "too many pixels": (
        data_url(depth(3200, 3200)),
        ("width=3200 (from depth_image)", "width=2048 and height=2048"),
    ),
    "1 x 1": (data_url(depth(1, 1)), ("depth_image=", "16")),
    "odd size": (
        data_url(depth(60, 190)),
        ("width=190 (from depth_image)", "width=192 and height=64"),
    ),
    "a path": ("/etc/passwd", ("depth_image='/etc/passwd'", "file")),
    "a file URL": ("file:///etc/passwd", ("depth_image=", "file")),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_depth_image_fails_before_the_first_step_and_leaves_no_file(
    server: Server, temporary: Path, kind: str
) -> None:
    url, told = BAD[kind]
    server.wait_until_idle()
    before = set(temporary.rglob("*"))
    assert before  # the folder is the one that the server uses
    code, prediction = server.predict(QUICK | {"depth_image": url})
    assert (code, prediction["status"]) == (200, "failed")
    for words in told:
        assert words in prediction["error"]
    reason = prediction["error"].partition("ValueError: ")[2]
    assert reason and prediction["error"].count(reason) == 1
    assert "Error: " not in reason
    assert "step" not in prediction["logs"]
    server.wait_until_idle()
    assert set(temporary.rglob("*")) == before


def test_inputs_of_the_other_mode_are_refused_where_they_were_set(server: Server) -> None:
    _, prediction = server.predict(QUICK | {"loop_closure": True})
    assert "loop_closure=True" in prediction["error"]
    assert "mode='sdxl-360'" in prediction["error"]
    _, prediction = server.predict(QUICK | {"loop_closure": False, "stride": 16})
    assert prediction["status"] == "succeeded"


def test_a_mode_that_the_family_lacks_is_refused(server: Server) -> None:
    _, prediction = server.predict({"prompt": "sea"})
    assert "mode='syncdiffusion'" in prediction["error"]
    assert "try 'sdxl-360'" in prediction["error"]
