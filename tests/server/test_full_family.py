"""The whole of `full`, small, from a hub on loopback: fetched by setup, loaded, run offline."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panorama.modes import load
from panorama.weights import WeightsError
from tests import small_full
from tests.hub import Hub, running_hub

ROOT = Path(__file__).parents[2]
QUICK = ("prompt=sea", "height=128", "num_inference_steps=2", "seed=1")

# No socket connects to anything, whatever a library may try.
NO_NETWORK = """
import socket, sys
def refuse(*arguments, **options):
    raise AssertionError("a network was asked for")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from panorama.__main__ import main
for arguments in {commands}:
    assert main(arguments) == 0
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        small_full.fill(hub)
        yield hub


@pytest.fixture
def folder(hub: Hub, tmp_path: Path) -> Path:
    """Return an empty cache, with a manifest of what the hub has."""
    (tmp_path / "weights").mkdir()
    return small_full.write_manifest(hub, tmp_path / "weights")


def run(hub: Hub, folder: Path, *command: str, **more: str) -> "subprocess.CompletedProcess[str]":
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder.parent / "home"),
        "TORCH_HOME": str(folder.parent / "torch"),
        "PANORAMA_WEIGHTS": str(folder),
        "PANORAMA_FAMILY": "full",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **own, **more},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_missing_weights_are_an_error_with_the_command_that_fetches_them(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = len(hub.requests)
    monkeypatch.setenv("PANORAMA_WEIGHTS", str(folder))
    with pytest.raises(WeightsError) as caught:
        load("full", modes=["syncdiffusion"])
    assert str(folder) in str(caught.value)
    assert f"script/fetch-weights --dir {folder} --mode=syncdiffusion" in str(caught.value)
    assert len(hub.requests) == asked


def test_a_container_may_have_one_mode(hub: Hub, folder: Path) -> None:
    code = "from predict import Predictor; p = Predictor(); p.setup(); print(*p.models.bases)"
    result = run(hub, folder, "-c", code, PANORAMA_MODES=" syncdiffusion")
    assert result.returncode == 0, result.stderr
    assert "fetching unet/config.json from sd2-community" in result.stdout
    assert result.stdout.splitlines()[-2:] == ["safety checker: none", "syncdiffusion"]
    assert not list(folder.glob("models--*xl*"))


def test_setup_fetches_the_family_and_then_every_mode_runs_without_a_network(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    modes = {
        "sync": ["width=192", "stride=16", "sync_threshold=1"],
        "xl": ["mode=syncdiffusion-xl", "width=192", "speed=exact", "sync_threshold=1"],
        "sphere": ["mode=sdxl-360", "width=256"],
    }
    commands = {
        name: [
            *(part for value in (*QUICK, *values) for part in ("-i", value)),
            "-o",
            str(tmp_path / f"{name}.png"),
        ]
        for name, values in modes.items()
    }
    result = run(hub, folder, "-m", "panorama", *commands["sync"])
    assert result.returncode == 0, result.stderr
    assert "arn" not in result.stderr  # no warnings; a progress bar may be there
    assert "fetching" in result.stdout
    first, asked = (tmp_path / "sync.png").read_bytes(), len(hub.requests)

    result = run(hub, folder, "-c", NO_NETWORK.format(commands=list(commands.values())))
    assert result.returncode == 0, result.stderr
    assert "fetching" not in result.stdout
    assert len(hub.requests) == asked
    assert (tmp_path / "sync.png").read_bytes() == first
    for name in modes:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.height == 128
            assert np.asarray(image).std() > 0
