"""`script/attack`: a run of the smallest size, and what becomes of rows that go wrong."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.attack.__main__ import ROWS, Row, attack, missed, table
from benchmarks.goals import Goal

ROOT = Path(__file__).parents[2]
GOALS = {"bad": Goal(most=0)}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks.attack", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_row_of_the_smallest_size_is_reported_as_a_table():
    done = command("--rows", "injected", "--scale", "0.01")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("| | | found | goal |\n|---|---|---|---|\n| **injected** |")
    assert "| | errors | 1 |" in done.stdout
    assert "| | images that differ | 0 | at most 0: met |" in done.stdout


def test_an_unknown_row_is_refused():
    done = command("--rows", "injected,nothing")
    assert done.returncode == 2
    assert "unknown rows: nothing" in done.stderr


def test_a_row_without_time_is_skipped_and_counts_as_missed():
    done = command("--minutes", "0")
    assert done.returncode == 1
    assert done.stdout.count("skipped: takes") == len(ROWS)


def row(run: Any, minutes: float = 0) -> Row:
    return Row("a", "b | c", run, 10, minutes, GOALS)


@pytest.mark.parametrize(("bad", "expected"), [(0, []), (1, ["bad"])])
def test_a_goal_is_met_or_missed(bad: int, expected: list[str]):
    one = row(lambda count, seed: {"count": count, "seed": seed, "bad": bad})
    result = attack(one, 0.5, 7, 10)
    assert (result.status, result.figures["count"], result.figures["seed"]) == ("done", 5, 7)
    assert missed(one, result) == expected
    assert f"| | bad | {bad} | at most 0: {'missed' if bad else 'met'} |" in table({one: result})


def test_a_row_that_fails_says_why():
    def broken(count: int, seed: int) -> dict[str, Any]:
        raise ValueError("x | y")

    one = row(broken)
    result = attack(one, 1, 0, 10)
    assert missed(one, result) == ["failed: ValueError: x | y"]
    assert "x \\| y" in table({one: result})


def test_a_row_that_hangs_is_cut_short_whatever_it_catches():
    def stuck(count: int, seed: int) -> dict[str, Any]:
        while True:
            with suppress(Exception):
                time.sleep(60)

    started = time.monotonic()
    result = attack(row(stuck), 1, 0, 0.2)
    assert time.monotonic() - started < 10
    assert result.status.startswith("failed: CutShort")


def test_a_row_that_does_not_fit_is_skipped():
    result = attack(row(pytest.fail, minutes=2), 1, 0, 100)
    assert result.status == "skipped: takes 120 s, and 100 s are left"
