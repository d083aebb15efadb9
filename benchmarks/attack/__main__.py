"""Attack the service, row by row, and print a table of what was found."""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.attack import (
    batch_runs,
    depth_files,
    errors,
    predictions,
    proxy,
    schema,
    weight_files,
)
from benchmarks.goals import Goal
from benchmarks.gpu.report import cell, show


class CutShort(BaseException):
    """A row took longer than the time that was left; not an error that a row may expect."""


@dataclass(frozen=True, eq=False)
class Row:
    """An attack."""

    name: str
    what: str
    run: Callable[[int, int], Mapping[str, Any]]  # a count and a seed -> figures
    count: int
    minutes: float  # guessed, for this count on two cores
    goals: Mapping[str, Goal]  # of figures by name


ROWS = (
    Row("nginx", "attacks on deploy/nginx.conf", proxy.run, 5, 2, proxy.GOALS),
    Row(
        "worst", "the largest legal request, cancelled", predictions.worst, 3, 1, predictions.WORST
    ),
    Row("injected", "errors at random lines", errors.run, 100, 2, errors.GOALS),
    Row(
        "weights",
        "bytes flipped in the files of a family",
        weight_files.run,
        200,
        0.3,
        weight_files.GOALS,
    ),
    Row("depth", "corrupt depth images", depth_files.figures, 500, 0.2, depth_files.GOALS),
    Row("batch", "kills of script/batch", batch_runs.run, 50, 6, batch_runs.GOALS),
    Row("memory", "predictions in a row", predictions.memory, 1000, 4, predictions.MEMORY),
    Row("schemathesis", "requests by schema", schema.run, 5000, 6, schema.GOALS),
)


@dataclass
class Result:
    """The result of a row."""

    status: str
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise CutShort in the block once the time is up."""

    def expire(*_: object) -> None:
        raise CutShort(f"cut short after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attack(row: Row, scale: float, seed: int, left: float) -> Result:
    """Run a row in the time that is left."""
    count = max(1, round(scale * row.count))
    needed = 60 * row.minutes * scale
    if needed > left:
        return Result(f"skipped: takes {needed:.0f} s, and {max(left, 0):.0f} s are left")
    started = time.monotonic()
    try:
        with limited(left):
            result = Result("done", figures=row.run(count, seed))
    except (Exception, CutShort) as error:  # the other rows go on
        result = Result(f"failed: {type(error).__name__}: {error}")
    result.seconds = time.monotonic() - started
    return result


def missed(row: Row, result: Result) -> list[str]:
    """Return the goals of a row that were missed, or its status if it was not done."""
    if result.status != "done":
        return [result.status]
    figures = result.figures
    return [name for name, goal in row.goals.items() if not goal.met(figures[name])]


def table(results: Mapping[Row, Result]) -> str:
    """Return a Markdown table of all figures beside their goals."""
    lines = ["| | | found | goal |", "|---|---|---|---|"]
    for row, result in results.items():
        lines.append(
            f"| **{row.name}** | {row.what} | {cell(result.status)} in {result.seconds:.0f} s | |"
        )
        for name, value in result.figures.items():
            goal = row.goals.get(name)
            note = f"{goal}: {'met' if goal.met(value) else 'missed'}" if goal else ""
            lines.append(f"| | {cell(name)} | {cell(show(value))} | {note} |")
    return "\n".join(lines)


def main() -> int:
    """Run the rows that were asked for; return 1 if a goal was missed or a row was not done."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [row.name for row in ROWS]
    parser.add_argument("--minutes", type=float, default=20, help="for all rows together")
    parser.add_argument("--rows", default=",".join(names), help="by name; default: all")
    parser.add_argument("--scale", type=float, default=1, help="share of every row's count")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = options.rows.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    deadline = time.monotonic() + 60 * options.minutes
    results = {}
    for row in ROWS:
        if row.name in chosen:
            print(f"{row.name}: {row.what}", file=sys.stderr, flush=True)
            left = deadline - time.monotonic()
            results[row] = attack(row, options.scale, options.seed, left)
    print(table(results))
    return int(any(missed(row, result) for row, result in results.items()))


if __name__ == "__main__":
    sys.exit(main())
