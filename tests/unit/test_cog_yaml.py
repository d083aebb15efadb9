"""cog.yaml follows the rules of Cog 0.23, which is not here to check it.

The rules are those of Cog's documentation (docs/yaml.md) and of what `cog build` refuses
(pkg/config in replicate/cog): the fields, the Python that a container may have, and the variables
that it sets itself.
"""

import ast
import copy
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "cog.yaml").read_text())

FIELDS = {
    "build": dict,
    "concurrency": dict,
    "environment": list,
    "image": str,
    "predict": str,
    "run": str,
    "train": str,
    "weights": list,
}
BUILD_FIELDS = {
    "cuda": str,
    "cudnn": str,
    "gpu": bool,
    "python_requirements": str,
    "python_version": str,
    "run": list,
    "sdk_version": str,
    "system_packages": list,
}
DEPRECATED = ("python_packages", "pre_install")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
DENIED = (
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "PYTHONUNBUFFERED",
    "R8_*",
    "REPLICATE_*",
    "LIBRARY_PATH",
    "CUDA_*",
    "NVIDIA_*",
    "NV_*",
    "PGET_*",
    "HF_ENDPOINT",
    "HF_HUB_ENABLE_HF_TRANSFER",
    "KUBERNETES_*",
)


def check(config: dict[str, Any], root: Path = ROOT) -> None:
    """Raises ValueError for what Cog would refuse, or warn of."""
    check_fields(config, FIELDS, "")
    if "build" not in config:
        raise ValueError("build: missing")
    check_build(config["build"], root)
    check_environment(config.get("environment", []))
    check_predictor(config.get("predict", ""), root)


def check_fields(fields: dict[str, Any], known: dict[str, type], where: str) -> None:
    for name, value in fields.items():
        if name in DEPRECATED:
            raise ValueError(f"{where}{name}: deprecated")
        if name not in known:
            raise ValueError(f"{where}{name}: no such field")
        if not isinstance(value, known[name]):
            raise ValueError(f"{where}{name}: must be a {known[name].__name__}")


def check_build(build: dict[str, Any], root: Path) -> None:
    check_fields(build, BUILD_FIELDS, "build.")
    if re.sub(r"^(\d+\.\d+)\.\d+$", r"\1", build.get("python_version", "")) not in PYTHONS:
        raise ValueError(f"build.python_version: must be given, one of {', '.join(PYTHONS)}")
    for name in ("cuda", "sdk_version"):
        if not re.fullmatch(r"\d+(\.\d+)+", build.get(name, "1.0")):
            raise ValueError(f"build.{name}: must be a version")
    if not (root / build.get("python_requirements", "")).is_file():
        raise ValueError("build.python_requirements: no such file")


def check_environment(environment: list[str]) -> None:
    names = []
    for variable in environment:
        name, equals, _ = variable.partition("=")
        if not name or not equals:
            raise ValueError(f"environment: {variable} must be NAME=VALUE")
        if any(fnmatchcase(name, pattern) for pattern in DENIED):
            raise ValueError(f"environment: {name} is not allowed")
        names.append(name)
    if len(set(names)) != len(names):
        raise ValueError("environment: a variable is given twice")


def check_predictor(target: str, root: Path) -> None:
    """The class is there, and has the method that Cog calls."""
    name, colon, predictor = target.partition(":")
    if not colon or not name.endswith(".py") or not (root / name).is_file():
        raise ValueError(f"predict: {target} must be FILE.py:CLASS, and the file there")
    for node in ast.parse((root / name).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == predictor:
            if "predict" in [f.name for f in node.body if isinstance(f, ast.FunctionDef)]:
                return
            raise ValueError(f"predict: {predictor} has no method predict")
    raise ValueError(f"predict: {name} has no class {predictor}")


def test_cog_yaml_keeps_the_rules():
    check(CONFIG)


Change = Callable[[dict[str, Any]], Any]

BAD: dict[str, tuple[Change, str]] = {
    "no build": (lambda c: c.pop("build"), "build: missing"),
    "an unknown field": (lambda c: c.update(predictor="predict.py:Predictor"), "no such field"),
    "an unknown build field": (lambda c: c["build"].update(python="3.11"), "no such field"),
    "gpu as text": (lambda c: c["build"].update(gpu="true"), "gpu: must be a bool"),
    "no Python": (lambda c: c["build"].pop("python_version"), "python_version: must be given"),
    "an old Python": (lambda c: c["build"].update(python_version="3.9"), "python_version: must"),
    "Python as a number": (lambda c: c["build"].update(python_version=3.10), "must be a str"),
    "CUDA without its minor": (lambda c: c["build"].update(cuda="13"), "cuda: must be a version"),
    "packages": (lambda c: c["build"].update(python_packages=["torch==2.13.0"]), "deprecated"),
    "pre_install": (lambda c: c["build"].update(pre_install=["true"]), "deprecated"),
    "no such requirements": (
        lambda c: c["build"].update(python_requirements="requirements-gpu.txt"),
        "python_requirements: no such file",
    ),
    "no such file": (lambda c: c.update(predict="run.py:Predictor"), "predict: run.py"),
    "no class": (lambda c: c.update(predict="predict.py"), "must be FILE.py:CLASS"),
    "no such class": (lambda c: c.update(predict="predict.py:Runner"), "no class Runner"),
    "a class that predicts nothing": (
        lambda c: c.update(predict="predict.py:Stopwatch"),
        "has no method predict",
    ),
    "a map of variables": (lambda c: c.update(environment={"A": "b"}), "must be a list"),
    "a variable without a value": (lambda c: c["environment"].append("A"), "must be NAME=VALUE"),
    "a variable twice": (lambda c: c["environment"].append("PANORAMA_FAMILY=tiny"), "twice"),
} | {
    name: (lambda c, name=name: c["environment"].append(f"{name}=x"), f"{name} is not allowed")
    for name in ("HF_ENDPOINT", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "PATH", "R8_TOKEN")
}


@pytest.mark.parametrize("kind", BAD)
def test_what_breaks_a_rule_is_refused(kind):
    change, message = BAD[kind]
    config = copy.deepcopy(CONFIG)
    change(config)
    with pytest.raises(ValueError, match=re.escape(message)):
        check(config)


def test_a_variable_that_only_begins_as_a_denied_one_is_allowed():
    check(CONFIG | {"environment": ["HF_HUB_OFFLINE=1", "PATHS=a", "HF_ENDPOINT_2=b"]})


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_it_builds_for_a_gpu_with_everything_pinned():
    build = CONFIG["build"]
    assert build["gpu"] is True
    assert {"cuda", "sdk_version"} <= set(build)
    assert build["python_requirements"] == "requirements.txt"


def test_it_names_the_predictor():
    assert CONFIG["predict"] == "predict.py:Predictor"


def test_the_container_runs_the_full_family():
    assert CONFIG["environment"] == ["PANORAMA_FAMILY=full"]


def test_the_sdk_is_the_one_that_is_tested_here():
    assert CONFIG["build"]["sdk_version"] == pins()["cog"] == pins()["coglet"] == version("cog")


def test_every_requirement_is_pinned_to_what_is_installed():
    for name, pinned in pins().items():
        assert version(name).partition("+")[0] == pinned, name
