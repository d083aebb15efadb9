"""`script/gpu-report`: a dry run of every row, and what a report says of rows that go wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import ROWS, Row, run
from benchmarks.gpu.report import GOALS, Report
from benchmarks.lab import Figures, Lab

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_a_dry_run_of_every_row_reports_every_figure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--minutes", "0", "--out", str(tmp_path)]
    # Also where there is a GPU: the dry run is what is tested.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["environment"]["dry run"] is True
    rows = report["rows"]
    assert {name: row["status"] for name, row in rows.items()} == {r.name: "done" for r in ROWS}
    of_a_card = {"UNet in fast: share of the data sheet"}
    for row, figure in GOALS:
        assert figure in rows[row]["figures"] or figure in of_a_card
    text = (tmp_path / "report.md").read_text()
    assert all(f"**{row.name}**" in text for row in ROWS)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "report", {"device": "none", "dry run": True})


def written(report: Report) -> dict[str, dict[str, object]]:
    rows: dict[str, dict[str, object]] = json.loads((report.folder / "report.json").read_text())[
        "rows"
    ]
    return rows


def test_figures_are_written_at_once_and_stay_when_a_row_fails(report: Report) -> None:
    def broken(lab: Lab) -> Figures:
        yield "first", 1.5
        assert written(report)["broken"]["figures"] == {"first": 1.5}
        assert written(report)["broken"]["status"] == "cut short"
        raise torch.OutOfMemoryError("too | large")

    def sound(lab: Lab) -> Figures:
        yield "second", "a | b"

    lab = Lab(torch.device("cpu"), dry=False)
    for name, measure in {"broken": broken, "sound": sound}.items():
        run(Row(name, 1, measure), lab, report, left=10)
    rows = written(report)
    assert rows["broken"]["figures"] == {"first": 1.5}
    assert rows["broken"]["status"] == "failed: OutOfMemoryError: too | large"
    assert rows["sound"]["status"] == "done"
    text = (report.folder / "report.md").read_text()
    assert "too \\| large" in text and "a \\| b" in text


@pytest.mark.parametrize("left", [9.0, -1.0])
def test_a_row_that_does_not_fit_is_skipped(report: Report, left: float) -> None:
    def never(lab: Lab) -> Figures:
        raise AssertionError
        yield

    run(Row("long", 10, never), Lab(torch.device("cpu"), dry=False), report, left)
    assert written(report)["long"]["status"] == (
        f"skipped: takes 10 s, and {max(left, 0):.0f} s are left"
    )
