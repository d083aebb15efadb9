"""The package as pip installs it, away from the repository."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from PIL import Image

from panorama.weights.manifest import read_manifest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUNDLE = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]


def is_bundled(path: Path) -> bool:
    return any((ROOT / source) in (path, *path.parents) for source in BUNDLE)


def test_everything_that_the_package_needs_of_the_weights_folder_is_bundled():
    weights = ROOT / "weights"
    needed = [weights / "manifest.toml"]
    needed += [path for path in (weights / "tiny").rglob("*") if path.is_file()]
    for family in read_manifest(weights / "manifest.toml"):
        # What is fetched is not in the repository.
        tracked = subprocess.run(
            ["git", "ls-files", f"weights/{family}"], cwd=ROOT, capture_output=True, text=True
        )
        needed += [ROOT / name for name in tracked.stdout.split() if (ROOT / name).exists()]
    for path in needed:
        assert is_bundled(path), path


def test_every_link_in_the_bundle_is_included_by_its_target():
    """The build backend skips links to folders."""
    for link in (path for path in (ROOT / "weights" / "tiny").rglob("*") if path.is_symlink()):
        target = link.resolve().relative_to(ROOT).as_posix()
        place = link.relative_to(ROOT / "weights").as_posix()
        assert BUNDLE[target] == f"panorama/bundled/{place}"


def test_every_requirement_of_the_package_is_pinned_for_the_container():
    pins = (ROOT / "requirements.txt").read_text()
    every = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["cog"]
    for requirement in every:
        assert f"\n{requirement.partition('>')[0]}==" in pins


@pytest.mark.slow
def test_an_installed_package_makes_an_image_without_the_repository(tmp_path):
    """Needs a network for the build backend; the dependencies are those of this environment."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    (packages,) = environment.glob("lib/*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    clean = {name: value for name, value in os.environ.items() if "PYTHON" not in name}
    inputs = ("prompt=night", "width=256", "height=256", "num_inference_steps=1", "sync_weight=0")
    command = [environment / "bin" / "panorama", *(f"-i{pair}" for pair in inputs)]
    result = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    with Image.open(tmp_path / "output.png") as image:
        assert image.size == (256, 256)
    view = [python, "-m", "panorama.images", "view", "output.png"]
    subprocess.run(view, cwd=tmp_path, env=clean, check=True)
    assert (tmp_path / "output.html").exists()
    code = "import panorama; print(*panorama.load(modes=['sdxl-360']).bases)"
    result = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert result.stdout == "sdxl-360\n", result.stderr
