"""Measures of an image, over HTTP."""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from panorama import read_metadata
from tests.small_sdxl import save_family

from .conftest import Server, serving

pytestmark = pytest.mark.server

RING = {"prompt": "sea", "mode": "syncdiffusion-xl", "loop_closure": True, "speed": "fast"}
RING |= {"num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server of a random family, whose windows differ more than it says."""
    folder = tmp_path_factory.mktemp("family")
    save_family(folder, modes=["syncdiffusion-xl"], width=256, height=128, guidance_scale=3.0)
    with (folder / "family.toml").open("a") as file:
        file.write("\n[intra_lpips]\nsyncdiffusion-xl = [0, 1e-9]\n")
    with serving(folder / "log", PANORAMA_FAMILY=str(folder)) as server:
        yield server


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp"])
def test_the_metrics_of_a_prediction_are_those_in_its_image(
    server: Server, output_format: str, tmp_path: Path
) -> None:
    _, prediction = server.predict(RING | {"output_format": output_format})
    quality = prediction["metrics"]["quality"]
    names = {"seam_ratio", "seam_contrast", "intra_lpips", "edge_ratio", "sharpness"}
    assert set(quality) == names
    path = tmp_path / f"out.{output_format}"
    path.write_bytes(base64.b64decode(prediction["output"].partition(",")[2]))
    assert read_metadata(path)["quality"] == quality


def test_what_is_unusual_is_in_the_log_of_the_prediction(server: Server) -> None:
    _, prediction = server.predict(RING | {"sync_weight": 0.0})
    distance = prediction["metrics"]["quality"]["intra_lpips"]
    (told,) = [line for line in prediction["logs"].splitlines() if "intra_lpips" in line]
    assert told.startswith(f"intra_lpips={distance:.3g}, in this family usually 0 to 1e-09: ")
    assert told.endswith("try another seed, or sync_weight=20")
