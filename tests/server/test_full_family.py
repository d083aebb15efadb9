"""The whole of `full`, small, from a hub on loopback: fetched by setup, loaded, run offline."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from panorama.models import load
from panorama.perceptual import LPIPS
from panorama.weights import WeightsError
from tests import small_full
from tests.hub import Hub, running_hub

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "weights"
QUICK = ("num_inference_steps=2", "seed=1")

# No socket goes further than this process, whatever a library may try.
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


@pytest.fixture(scope="module")
def folder(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_manifest(hub, tmp_path_factory.mktemp("weights"))


def run(hub: Hub, folder: Path, *command: str, **more: str) -> "subprocess.CompletedProcess[str]":
    own = {
        "HF_ENDPOINT": hub.url,
        "PANORAMA_MIRROR": hub.url,
        "PANORAMA_WEIGHTS": str(folder),
        "PANORAMA_FAMILY": "full",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "home"),
    }
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **own, **more},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_what_is_missing_is_said_with_the_command_that_brings_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = len(hub.requests)
    monkeypatch.setenv("PANORAMA_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("PANORAMA_MIRROR", hub.url)
    with pytest.raises(WeightsError) as caught:
        load("full", modes=["syncdiffusion"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path / 'full'} has no verified copy of"
    unet = "  syncdiffusion/unet/diffusion_pytorch_model.safetensors of sd2, from sd2-community/"
    assert any(line.startswith(unet) for line in lines)
    command = f"script/fetch-weights --dir {tmp_path} --mode=syncdiffusion fetches them; in a cont"
    assert lines[-1].startswith(command)
    assert not any("sdxl" in line for line in lines)
    assert len(hub.requests) == asked


def own_manifest(hub: Hub, folder: Path) -> Path:
    """A weights folder with the manifest of this repository, but for the hash of VGG16."""
    text = (SHIPPED / "manifest.toml").read_text()
    assert text.count(small_full.VGG16_SHA256) == 1
    own = hashlib.sha256(hub.plain[small_full.VGG16_URL]).hexdigest()
    (folder / "manifest.toml").write_text(text.replace(small_full.VGG16_SHA256, own))
    return folder


def test_a_container_may_have_one_mode(hub: Hub, tmp_path: Path) -> None:
    folder = own_manifest(hub, tmp_path)
    code = "from predict import Predictor; p = Predictor(); p.setup(); print(*p.models.pipelines)"
    result = run(hub, folder, "-c", code, PANORAMA_MODES=" syncdiffusion")
    assert result.returncode == 0, result.stderr
    assert "lacks 14 files of full" in result.stdout
    assert result.stdout.splitlines()[-1] == "syncdiffusion"
    assert not (folder / "full" / "sdxl-360").exists()


def test_setup_fetches_the_family_and_then_both_modes_run_without_a_network(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    first, second, third = (tmp_path / f"{name}.png" for name in ("first", "second", "third"))
    sync = ["prompt=sea", "width=128", "height=64", "sync_threshold=1", "stride=16", *QUICK]
    sphere = ["prompt=sea", "mode=sdxl-360", "width=128", "height=64", *QUICK]
    inputs = {
        name: [part for value in values for part in ("-i", value)]
        for name, values in (("sync", sync), ("sphere", sphere))
    }
    result = run(hub, folder, "-m", "panorama", *inputs["sync"], "-o", str(first))
    assert result.returncode == 0, result.stderr
    assert f"{folder / 'full'} lacks 36 files of full" in result.stdout
    assert "33 files are to be fetched, " in result.stdout
    assert "syncdiffusion/unet/config.json came from http" in result.stdout
    assert "full is there, verified" in result.stdout
    assert "safety checker: none" in result.stdout
    assert result.stderr == ""
    asked = len(hub.requests)

    commands = [
        [*inputs["sync"], "-o", str(second)],
        [*inputs["sphere"], "-o", str(third)],
    ]
    result = run(hub, folder, "-c", NO_NETWORK.format(commands=commands))
    assert result.returncode == 0, result.stderr
    assert "lacks" not in result.stdout
    assert len(hub.requests) == asked
    assert first.read_bytes() == second.read_bytes()
    for path in (second, third):
        with Image.open(path) as image:
            assert image.size == (128, 64)
            assert np.asarray(image).std() > 0

    lpips = folder / "full" / "syncdiffusion" / "perceptual"
    model = LPIPS.from_pretrained(lpips)
    heads = load_file(SHIPPED / "lpips_vgg_heads.safetensors")
    assert len(heads) == len(model.heads)
    for k, mine in enumerate(model.heads):
        torch.testing.assert_close(mine.data, heads[f"lin{k}"].flatten())
    assert not list((folder / "full").rglob("*.pth"))
    assert {
        path.dtype for path in load_file(lpips / "diffusion_pytorch_model.safetensors").values()
    } == {torch.float32}
