"""A family with a safety checker, over HTTP."""

from collections.abc import Iterator

import pytest

from tests.small_safety import ALL, save_checker
from tests.small_sdxl import save_family

from .conftest import Server, decoded, png, serving

pytestmark = pytest.mark.server

QUICK = {"prompt": "bedroom", "mode": "sdxl-360", "num_inference_steps": 1, "seed": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server whose checker flags every image."""
    folder = tmp_path_factory.mktemp("family")
    save_family(folder, width=128, height=64, guidance_scale=3.0)
    save_checker(folder / "safety_checker", ALL)
    with serving(folder / "log", PANORAMA_FAMILY=str(folder)) as server:
        yield server


def test_a_flagged_image_is_withheld_unless_the_request_says_otherwise(server: Server) -> None:
    _, unchecked = server.predict(QUICK | {"disable_safety_checker": True})
    code, withheld = server.predict(QUICK)
    _, again = server.predict(QUICK | {"disable_safety_checker": True})
    assert (code, withheld["status"]) == (200, "failed")
    assert "StableDiffusionSafetyChecker" in withheld["error"]
    assert "another seed or prompt" in withheld["error"]
    assert "output" not in withheld
    assert unchecked["status"] == again["status"] == "succeeded"
    assert decoded(unchecked).size == (128, 64)
    assert png(again) == png(unchecked)


def test_its_log_speaks_of_no_black_image(server: Server) -> None:
    _, withheld = server.predict(QUICK)
    assert withheld["status"] == "failed"
    assert "safety checker: StableDiffusionSafetyChecker" in server.log()
    assert "ImageWithheldError" in server.log()
    assert "black image" not in server.log()
    assert "Warning:" not in server.log()
