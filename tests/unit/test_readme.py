"""README.md against the code."""

import re
from importlib import import_module
from math import inf
from pathlib import Path

from panorama import weights
from panorama.request import EVERY_MODE, INPUTS, Input

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def row(rule: Input) -> str:
    default = "required" if rule.required else "" if rule.default is None else f"`{rule.default!r}`"
    limits = [str(limit) for limit in (rule.minimum, rule.maximum) if abs(limit) != inf]
    allowed = " to ".join(limits) if len(limits) == 2 else "".join(f"from {x}" for x in limits)
    allowed = allowed or ", ".join(map(str, rule.choices))
    modes = "" if rule.modes == EVERY_MODE else ", ".join(rule.modes)
    cells = (f"`{rule.name}`", rule.kind.__name__, default, allowed, modes, rule.description)
    return f"| {' | '.join(cells)} |"


def table() -> str:
    head = ["| input | type | default | legal | only in | |", "|---|---|---|---|---|---|"]
    return "\n".join(head + [row(rule) for rule in INPUTS.values()])


def test_the_table_of_inputs_is_that_of_request():
    _, _, rest = README.read_text().partition("<!-- inputs -->\n")
    written = rest.partition("\n<!-- /inputs -->")[0]
    assert written == table(), f"between its markers, README.md must have:\n{table()}"


def test_link_targets_exist():
    pages = (ROOT / "docs" / "operate.md", ROOT / "docs" / "studio.md")
    for text in (README, ROOT / "weights" / "tiny" / "README.md", *pages):
        for target in re.findall(r"\]\(([^)#:]+)\)", text.read_text()):
            assert (text.parent / target).exists(), f"{text}: {target}"


def test_its_python_imports_names_that_exist():
    code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
    lines = re.findall(r"^from (panorama[\w.]*) import (.+)$", code, re.MULTILINE)
    names = [(module, name) for module, found in lines for name in found.split(", ")]
    assert names
    for module, name in names:
        assert hasattr(import_module(module), name), f"{module} has no {name}"


def test_the_family_that_it_adds_needs_no_code(tmp_path, monkeypatch):
    family, manifest = re.findall(r"```toml\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "sphere").mkdir()
    (tmp_path / "sphere" / "family.toml").write_text(family)
    (tmp_path / "manifest.toml").write_text(manifest)
    monkeypatch.setenv("PANORAMA_WEIGHTS", str(tmp_path))
    assert list(weights.describe("sphere")) == ["sdxl-360"]
    (part,) = weights.needed("sphere", ["sdxl-360"])
    assert (part.base, [file.component for file in part.files]) == ("sdxl", ["unet", "unet"])


def test_the_table_of_environment_variables_names_all_that_are_read():
    written = README.read_text().partition("<!-- environment -->")[2].partition("<!-- /env")[0]
    sources = [ROOT / "predict.py", *(ROOT / "panorama").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"PANORAMA_[A-Z_]+", path.read_text())}
    assert read == set(re.findall(r"^\| `(PANORAMA_[A-Z_]+)`", written, re.MULTILINE))
