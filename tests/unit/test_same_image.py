"""Equal requests give equal files in any process, whatever was made before (docs/inputs.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from panorama.images.files import read_metadata
from panorama.jobs import MODES

ROOT = Path(__file__).parents[2]
MAKE = """
import json, sys
from panorama import Request, load

models = load("tiny", device="cpu")
for path, inputs in json.loads(sys.argv[1]):
    models.generate(Request(**inputs)).save(path)
"""
QUICK = {"prompt": "dawn over green hills", "num_inference_steps": 2, "height": 256, "seed": 1}
SYNCED = {"width": 384, "sync_threshold": 1, "loop_closure": True}
REQUESTS: dict[str, dict[str, Any]] = {
    "exact": SYNCED | {"mode": "syncdiffusion", "speed": "exact"},
    "fast": SYNCED | {"mode": "syncdiffusion-xl", "speed": "fast"},
    "360": {"mode": "sdxl-360", "width": 256, "lora_scale": 0.0},
}
OTHER = {"prompt": "night over the sea", "num_inference_steps": 1, "height": 320, "seed": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images from two processes: `plain`, and `mixed`, in another order and among others."""
    folder = tmp_path_factory.mktemp("images")
    plain, mixed = [], []
    for name, inputs in REQUESTS.items():
        wanted = QUICK | inputs
        plain.append((f"plain-{name}.png", wanted))
        mixed += [(f"mixed-{name}.png", wanted), ("other.png", wanted | OTHER)]
    for images in (plain, mixed[::-1]):
        make(folder, images)
    return folder


def make(folder: Path, images: list[tuple[str, dict[str, Any]]]) -> None:
    """Make images in a new process with one thread."""
    paths = [(str(folder / name), inputs) for name, inputs in images]
    subprocess.run(
        [sys.executable, "-c", MAKE, json.dumps(paths)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=280,
    )


def test_the_requests_are_of_every_mode() -> None:
    assert {inputs["mode"] for inputs in REQUESTS.values()} == set(MODES)


@pytest.mark.parametrize("name", REQUESTS)
def test_two_processes_make_the_same_file_whatever_each_made_before(
    folder: Path, name: str
) -> None:
    plain, mixed = folder / f"plain-{name}.png", folder / f"mixed-{name}.png"
    assert plain.read_bytes() == mixed.read_bytes()
    metadata = read_metadata(plain)
    assert (metadata["device"], metadata["threads"]) == ("cpu", 1)
