"""The whole recipe, with a few images and steps."""

from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from shutil import copy
from types import ModuleType

import pytest

from panorama.modes import load
from panorama.request import Request
from weights.train import __main__ as recipe
from weights.train import dataset, export, sdxl, style
from weights.train.fit import Plan

STEPS = 2


def shortened(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Yield the plans of a module, and what has a plan, with few steps."""
    for name, value in vars(module).items():
        if isinstance(value, Plan):
            yield name, replace(value, steps=STEPS)
        elif is_dataclass(value) and isinstance(plan := getattr(value, "plan", None), Plan):
            yield name, replace(value, plan=replace(plan, steps=STEPS))


@pytest.mark.slow
def test_every_stage_runs_and_the_family_that_they_write_makes_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    copy(export.TINY / "family.toml", tiny)
    monkeypatch.setattr(export, "TINY", tiny)
    monkeypatch.setattr(export, "JUDGES", tmp_path / "judges")
    for module in [part for part in vars(recipe).values() if isinstance(part, ModuleType)]:
        for name, value in list(shortened(module)):
            monkeypatch.setattr(module, name, value)
    for kinds in (dataset.KINDS, dataset.SETS):
        for name, kind in list(kinds.items()):
            monkeypatch.setitem(kinds, name, replace(kind, train=4, test=1))
    monkeypatch.setattr(style, "CRISP", replace(style.CRISP, count=2))
    monkeypatch.setattr(sdxl, "LOOKS", [replace(look, count=2) for look in sdxl.LOOKS])
    monkeypatch.setattr("sys.argv", ["train", "--work", str(tmp_path / "work")])

    recipe.main()

    assert {path.stem for path in export.JUDGES.iterdir()} == {"windows", "spheres", "depths"}
    models = load(str(tiny))
    for mode in models.bases:
        request = Request(prompt="noon", mode=mode, num_inference_steps=1, seed=0)
        image = models.generate(request).image
        assert image.size == (models.settings(mode).width, models.settings(mode).height)
