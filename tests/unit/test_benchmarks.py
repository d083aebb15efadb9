"""`benchmarks/` stands apart from `script/` and the tests, and its operations are those counted."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.operations import Call, Networks, calls_of
from panorama.sampling.presets import EXACT, FAST, Preset

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "tests": {"script"},
    "script": {"tests"},
    "benchmarks": {"tests", "script"},
    "weights": {"tests", "script", "benchmarks"},
    "panorama": {"tests", "script", "benchmarks"},
}
"""From a folder to the packages that its modules must not import."""


def imported(path: Path) -> set[str]:
    """Return the top-level packages that a module imports, anywhere in its text."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_folders_do_not_import_one_another(folder: str) -> None:
    modules = list((ROOT / folder).rglob("*.py"))
    assert modules
    for module in modules:
        assert not imported(module) & FORBIDDEN[folder], module


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (
            None,
            {
                ("guided UNet", 64, False): 655,
                ("guided UNet", 64, True): 65,
                ("decoder", 64, False): 5,
                ("decoder", 64, True): 65,
                ("VGG16", 512, False): 65,
                ("VGG16", 512, True): 65,
            },
        ),
        (
            EXACT,
            {
                ("guided UNet", 64, False): 697,
                ("guided UNet", 64, True): 65,
                ("decoder", 64, False): 5,
                ("decoder", 64, True): 65,
                ("VGG16", 512, False): 5,
                ("VGG16", 512, True): 65,
            },
        ),
        (FAST, {("guided UNet", 64, False): 103}),
    ],
)
def test_calls_for_2048_x_512_are_those_of_docs_speed(
    preset: Preset | None, expected: dict[Call, int]
) -> None:
    assert calls_of(preset) == Counter(expected)


def test_taesd_takes_the_place_of_the_decoder_at_a_fraction_of_its_operations() -> None:
    calls, tiny = calls_of(EXACT), calls_of(EXACT, tiny_decoder=True)
    renamed = {name.replace("tiny ", ""): name for name, *_ in tiny if "tiny" in name}
    assert renamed == {"decoder": "tiny decoder"}
    assert tiny == Counter({(renamed.get(c[0], c[0]), *c[1:]): n for c, n in calls.items()})
    networks = Networks()
    costs = [networks.cost((name, 64, True)) / 1e12 for name in ("decoder", "tiny decoder")]
    assert costs == pytest.approx([5.06, 0.28], rel=0.02)
