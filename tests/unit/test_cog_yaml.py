import re
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "cog.yaml").read_text())


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_it_builds_for_a_gpu_with_everything_pinned():
    build = CONFIG["build"]
    assert build["gpu"] is True
    assert build["python_requirements"] == "requirements.txt"
    for key in ("python_version", "cuda", "sdk_version"):
        assert re.fullmatch(r"[\d.]+", build[key]), f"{key} must be quoted: YAML reads 3.10 as 3.1"


def test_it_names_the_predictor():
    assert CONFIG["predict"] == "predict.py:Predictor"


def test_the_container_runs_the_full_family():
    assert CONFIG["environment"] == ["PANORAMA_FAMILY=full"]


def test_the_sdk_is_the_one_that_is_tested_here():
    assert CONFIG["build"]["sdk_version"] == pins()["cog"] == pins()["coglet"] == version("cog")


def test_every_requirement_is_pinned_to_what_is_installed():
    for name, pinned in pins().items():
        assert version(name).partition("+")[0] == pinned, name
