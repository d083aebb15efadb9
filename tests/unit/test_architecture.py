"""Imports go downwards only. DESIGN in one table: roles from the top to the bottom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEVELS = (
    {"panorama.__main__", "panorama.batch"},
    {"predict"},
    {"panorama"},
    {"panorama.models", "panorama.fetch"},
    {"panorama.syncdiffusion", "panorama.sdxl", "panorama.safety"},
    {"panorama.sampler", "panorama.synchronize", "panorama.gradient", "panorama.decode"},
    {"panorama.circular", "panorama.share"},
    {"panorama.views", "panorama.perceptual", "panorama.prompts", "panorama.noise"},
    {"panorama.weights", "panorama.download"},
    {"panorama.files", "panorama.manifest"},
    {"panorama.picture"},
    {"panorama.request"},
    {"panorama.depth"},
    {"panorama.__version__", "panorama.quiet"},
)
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}


def sources() -> dict[str, Path]:
    found = {"predict": ROOT / "predict.py"}
    for path in (ROOT / "panorama").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imports(module: str) -> set[str]:
    """Every module that one imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in SOURCES else node.module)
    return found


def test_every_module_has_its_level():
    assert set(SOURCES) == set(LEVEL)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_downwards(module):
    for imported in imports(module) & set(SOURCES):
        assert LEVEL[imported] >= LEVEL[module], f"{module} imports {imported}, which is above it"


def test_there_are_no_cycles():
    left = {module: imports(module) & set(SOURCES) - {module} for module in SOURCES}
    while left:
        free = {module for module, needs in left.items() if not needs & set(left)}
        assert free, f"these import one another: {sorted(left)}"
        left = {module: needs for module, needs in left.items() if module not in free}


def test_only_predict_imports_cog():
    importers = {
        module
        for module in SOURCES
        if any(name.partition(".")[0] in ("cog", "coglet") for name in imports(module))
    }
    assert importers == {"predict"}


def test_only_what_fetches_imports_clients_of_a_network():
    clients = {"httpx2", "huggingface_hub"}
    importers = {
        module
        for module in SOURCES
        if {name.partition(".")[0] for name in imports(module)} & clients
    }
    assert importers == {"panorama.download", "panorama.fetch"}


def test_every_package_that_is_imported_is_pinned():
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    names = {"pillow": "PIL"}
    packages = {names.get(name, name.replace("-", "_")) for name in pinned}
    for module in SOURCES:
        tops = {name.partition(".")[0] for name in imports(module)} - {"panorama", "predict"}
        assert tops - set(sys.stdlib_module_names) <= packages, module


@pytest.mark.parametrize(
    "module", ["panorama", "panorama.request", "panorama.__main__", "panorama.fetch"]
)
def test_importing_the_edge_does_not_load_torch(module):
    code = f"import sys, {module}; print(*(n for n in ('torch', 'diffusers') if n in sys.modules))"
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("", "")


def test_public_names_can_be_imported():
    import panorama

    for name in panorama.__all__:
        assert getattr(panorama, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = panorama.nonesuch
