"""The container holds everything that predict.py needs, and little else."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LARGE = 100_000  # bytes; below it, a file that nobody needs does no harm
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUNDLE = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
NEEDED = (
    *("predict.py", "cog.yaml", "requirements.txt", "LICENSE", ".cog/openapi_schema.json"),
    *("panorama", "panorama/sampling/lpips_vgg_heads.LICENSE", *BUNDLE),
    *("script/healthcheck", "script/supervise"),
)
UNWANTED = (
    ".git/config",
    ".hypothesis/examples/a",
    ".mypy_cache/3.11/a.json",
    ".pytest_cache/v/cache",
    ".ruff_cache/a",
    ".venv/bin/python",
    ".venv-studio/bin/python",
    "benchmarks/bench.py",
    "deploy/nginx.conf",
    "docs/sunset.png",
    "out.png",
    "panorama/__pycache__/views.cpython-311.pyc",
    "script/bench",
    "studio/page.py",
    "tests/data/cases.json",
    "weights/full/unet/model.safetensors.part",
    "weights/train/judges/windows.safetensors",
    "weights/train/work/scenes/0.png",
)


def expression(pattern: str) -> re.Pattern[str]:
    """Translate a pattern of Docker: from the root, `*` within a name, `**` over any folders."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.strip("/"))
    text = "".join(parts.get(piece, re.escape(piece)) for piece in pieces)
    return re.compile(f"{text}(?:/.*)?")  # with a folder goes what is in it


def ignored(path: str) -> bool:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    matching = [p for p in patterns if expression(p.removeprefix("!")).fullmatch(path)]
    return bool(matching) and not matching[-1].startswith("!")  # the last one decides


def context(root: Path = ROOT) -> Iterator[Path]:
    """Yield the files and links that Docker is given, relative to the root."""
    for folder, folders, files in os.walk(root):
        place = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if not ignored((place / name).as_posix())]
        links = [name for name in folders if (root / place / name).is_symlink()]
        names = (*files, *links)
        yield from (place / name for name in names if not ignored((place / name).as_posix()))


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("docs", "docs/a/b.png", "panorama/docs"),
        ("*.png", "out.png", "weights/out.png"),
        ("**/*.part", "weights/full/a.part", "a.parts"),
        ("**/__pycache__", "__pycache__/a.pyc", "pycache"),
        ("weights/train", "weights/train/work/a", "weights/training"),
    ],
)
def test_patterns_match_as_in_docker(pattern, matching, other):
    assert expression(pattern).fullmatch(matching)
    assert not expression(pattern).fullmatch(other)


@pytest.mark.parametrize("path", UNWANTED)
def test_files_for_developers_are_left_out(path):
    assert ignored(path)


def test_large_files_are_weights_of_a_family():
    for path in context():
        if (ROOT / path).stat().st_size > LARGE:
            assert path.suffix == ".safetensors" and path.parts[0] == "weights", path
            assert path.parts[1] != "train", path


def test_everything_that_the_predictor_needs_is_included():
    given = {path.as_posix() for path in context()}
    for name in NEEDED:
        files = [ROOT / name, *(ROOT / name).rglob("*")]
        needed = {path.relative_to(ROOT).as_posix() for path in files if path.is_file()}
        assert needed
        assert {name for name in needed if not name.endswith(".pyc")} <= given


def test_the_container_has_enough_to_make_an_image(tmp_path):
    for path in context():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).symlink_to(ROOT / path)  # there may be gigabytes of other families
    inputs = ("prompt=night", "width=256", "height=256", "num_inference_steps=1", "sync_weight=0")
    command = [sys.executable, "-m", "panorama", *(f"-i{pair}" for pair in inputs), "-o", "a.png"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "a.png").stat().st_size > 0
