"""Imports point one way. The design in one table, by folders."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALONE: set[str] = set()
MAY_IMPORT = {
    "__version__": ALONE,
    "errors": ALONE,
    "request": {"errors"},
    "limits": {"errors", "request"},
    "uploads": ALONE,
    "sampling": {"errors"},
    "conditioning": {"errors", "uploads", "sampling"},
    "images": {"errors", "uploads", "sampling"},
    "base_model": {"errors", "sampling", "conditioning", "images"},
    "pipeline": {"errors", "sampling", "conditioning", "images", "base_model"},
    "weights": {"errors", "request", "sampling"},
    "loras": {"errors", "sampling", "conditioning"},
    "cost": {"errors", "request", "sampling", "conditioning", "base_model", "pipeline"},
    "jobs": {
        *("request", "sampling", "conditioning", "images", "pipeline", "__version__"),
    },
    "quality": {"request", "sampling", "pipeline", "jobs"},
    "modes": {
        *("jobs", "quality"),
        *("errors", "request", "sampling", "conditioning", "images", "base_model", "pipeline"),
        *("cost", "limits", "weights", "loras", "__version__"),
    },
    "environment": {"errors", "weights", "cost", "modes"},
    "__init__": {"__version__", "errors", "request", "sampling", "images", "pipeline", "modes"},
    "__main__": {"errors", "request", "images", "weights", "environment"},
    "best_of": {"request", "images", "quality", "jobs", "modes"},
    "batch": {
        *("errors", "request", "sampling", "images", "weights", "jobs", "quality", "modes"),
        *("best_of", "environment"),
    },
    "worker": {"errors"},
    "predict": {"request", "images", "jobs", "modes", "environment", "worker"},
}
"""From a module or folder of the package to those that it may import, besides itself."""


def sources() -> dict[str, Path]:
    """Every module with its file."""
    found = {"predict": ROOT / "predict.py"}
    for path in (ROOT / "panorama").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def role(module: str) -> str:
    """Return the module or folder of the package that a module belongs to."""
    return (*module.split("."), "__init__")[1] if module != "predict" else module


def imports(module: str) -> set[str]:
    """Every module that one imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in SOURCES else node.module)
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module):
    imported = {role(name) for name in imports(module) & set(SOURCES)}
    assert imported <= MAY_IMPORT[role(module)] | {role(module)}


def test_the_table_has_the_roles_that_there_are():
    assert set(MAY_IMPORT) == {role(module) for module in SOURCES}


def test_there_are_no_cycles():
    left = {module: imports(module) & set(SOURCES) - {module} for module in SOURCES}
    while left:
        free = {module for module, needs in left.items() if not needs & set(left)}
        assert free, f"these import one another: {sorted(left)}"
        left = {module: needs for module, needs in left.items() if module not in free}


def importers(*packages: str) -> set[str]:
    """Return the modules that import one of some packages."""
    return {
        module
        for module in SOURCES
        if {name.partition(".")[0] for name in imports(module)} & set(packages)
    }


def test_only_predict_imports_cog():
    assert importers("cog", "coglet") == {"predict"}


def test_only_what_fetches_imports_clients_of_a_network():
    clients = importers("httpx", "httpx2", "huggingface_hub", "requests", "urllib")
    assert {role(module) for module in clients} == {"weights", "loras"}


def test_every_package_that_is_imported_is_required():
    """Pinned for the container, and named for pip."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["cog"]
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    names = {"pillow": "PIL", "pyequilib": "equilib"}
    for requirements in (pinned, project["dependencies"] + extra):
        required = {re.match(r"[\w-]*", line)[0] for line in requirements}
        packages = {names.get(name, name.replace("-", "_")) for name in required}
        for module in SOURCES:
            tops = {name.partition(".")[0] for name in imports(module)} - {"panorama", "predict"}
            assert tops - set(sys.stdlib_module_names) <= packages, module


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    "module",
    [
        "panorama",
        "panorama.request",
        "panorama.images.files",
        "panorama.images.__main__",
        "panorama.__main__",
        "panorama.weights.__main__",
    ],
)
def test_importing_the_edge_does_not_load_torch(module):
    result = run_python(
        f"import sys, {module}; print(*(n for n in ('torch', 'diffusers') if n in sys.modules))"
    )
    assert (result.stdout.strip(), result.stderr) == ("", "")


@pytest.mark.parametrize(
    "module", ["panorama.modes", "panorama.pipeline", "panorama.images.safety"]
)
def test_importing_a_module_prints_nothing(module):
    result = subprocess.run(
        [sys.executable, "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_public_names_can_be_imported():
    import panorama

    tree = ast.walk(ast.parse(SOURCES["panorama"].read_text()))
    aliases = [alias for node in tree if isinstance(node, ast.ImportFrom) for alias in node.names]
    typed = [alias.asname for alias in aliases if alias.asname]
    assert sorted([*typed, "__version__"]) == sorted(panorama.__all__)
    for name in panorama.__all__:
        assert getattr(panorama, name) is not None
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = panorama.nonesuch
