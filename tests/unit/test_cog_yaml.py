"""cog.yaml against what Cog's documentation says of each of its keys (docs/yaml.md, Cog 0.23)."""

import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "cog.yaml").read_text())

DOCUMENTED = {
    "build.cuda": (str, r"\d+\.\d+(\.\d+)?"),  # overrides the version that Cog chooses
    "build.gpu": (bool, r"True|False"),
    "build.python_requirements": (str, r"[\w./-]+\.txt"),
    "build.python_version": (str, r"3\.(10|11|12|13)(\.\d+)?"),  # as text, or 3.10 would be 3.1
    "build.sdk_version": (str, r"\d+\.\d+\.\d+"),
    "environment": (str, r"[A-Z_][A-Z0-9_]*=.*"),  # one of a list
    "predict": (str, r"[\w/]+\.py:\w+"),
}
"""The type and the form of the keys that we use."""

RESERVED = (
    *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONUNBUFFERED", "LIBRARY_PATH"),
    *("R8_*", "REPLICATE_*", "CUDA_*", "NVIDIA_*", "NV_*", "PGET_*", "KUBERNETES_*"),
    *("HF_ENDPOINT", "HF_HUB_ENABLE_HF_TRANSFER"),
)
"""Variables that `environment` must not set."""


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a document, with its dotted key; the items of a list have that of the list."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from leaves(child, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for child in value:
            yield from leaves(child, key)
    else:
        yield key, value


@pytest.mark.parametrize(("key", "value"), list(leaves(CONFIG)))
def test_every_key_is_documented_and_has_a_value_of_its_form(key, value):
    kind, form = DOCUMENTED[key]
    assert type(value) is kind
    assert re.fullmatch(form, str(value))


def test_it_runs_the_full_family_and_sets_no_reserved_variable():
    variables = dict(variable.split("=", 1) for variable in CONFIG["environment"])
    assert variables["PANORAMA_FAMILY"] == "full"
    assert len(variables) == len(CONFIG["environment"])
    documented = (ROOT / "docs" / "deploy.md").read_text().partition("<!-- environment -->")[2]
    for name in variables:
        assert not any(fnmatchcase(name, pattern) for pattern in RESERVED)
        assert f"`{name}`" in documented


def test_it_names_the_predictor():
    file, _, name = CONFIG["predict"].partition(":")
    predictor = getattr(import_module(file.removesuffix(".py")), name)
    assert "predict" in vars(predictor)
    assert "run" not in vars(predictor)  # Cog would take it for the newer name of predict


def managed_weights() -> list[dict[str, Any]]:
    """Return the entry of `weights` for each part of the manifest."""
    entries = []
    for name, part in tomllib.loads((ROOT / "weights" / "manifest.toml").read_text())[
        "full"
    ].items():
        source, files = part["sources"][0], [file["name"] for file in part["files"]]
        repository, revision = source["repository"], source["revision"]
        place = f"models--{repository.replace('/', '--')}/snapshots/{revision}"
        origin = (
            {"uri": f"{source['url']}/{files[0]}"}
            if "url" in source
            else {"uri": f"hf://{repository}@{revision}", "include": [f"/{file}" for file in files]}
        )
        entries.append({"name": name, "target": f"/src/weights/hub/{place}", "source": origin})
    return entries


def test_the_block_for_managed_weights_is_that_of_the_manifest():
    text = (ROOT / "docs" / "managed-weights.md").read_text()
    block = text.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(block) == {"weights": managed_weights()}
    variables = dict(variable.split("=", 1) for variable in CONFIG["environment"])
    assert variables["PANORAMA_WEIGHTS"] == "/src/weights/hub"


def pins() -> dict[str, str]:
    lines = (ROOT / CONFIG["build"]["python_requirements"]).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_it_builds_for_a_gpu():
    assert CONFIG["build"]["gpu"] is True


def test_the_sdk_is_the_one_that_is_tested_here():
    assert CONFIG["build"]["sdk_version"] == pins()["cog"] == pins()["coglet"] == version("cog")


def test_every_requirement_is_pinned_to_the_installed_version():
    for name, pinned in pins().items():
        assert version(name).partition("+")[0] == pinned, name
