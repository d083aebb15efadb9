"""Report what a GPU has to show, most important rows first; a tiny dry run without one."""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers.utils.logging
import torch

from benchmarks.gpu import checks, levers, speed
from benchmarks.gpu.report import Report, Result, environment_of, show
from benchmarks.lab import Figures, Lab
from panorama.environment import hide_progress_bars


@dataclass(frozen=True)
class Row:
    """A part of the report."""

    name: str
    seconds: float  # on an H200; estimated for rows that have not run on one
    measure: Callable[[Lab], Figures]


ROWS = (
    Row("published", 50, speed.against_published),
    Row("diffusers", 25, speed.against_diffusers),
    Row("memory", 5, speed.memory),
    Row("outside", 12, speed.outside),
    Row("sdxl-360", 60, speed.whole_canvas),
    Row("syncdiffusion-xl", 12, speed.windowed_xl),
    Row("out of memory", 10, checks.out_of_memory),
    Row("failed step", 3, checks.failed_step),
    Row("many images", 20, checks.many_images),
    Row("decode", 5, checks.decoding),
    Row("embedded", 32, checks.embedded_family),
    Row("peak", 5, speed.share_of_peak),
    Row("load", 25, checks.loading),
    Row("graphs", 11, levers.graphs),
    Row("levers", 105, levers.levers),
    Row("LoRA", 8, speed.with_lora),
    Row("upscale", 60, speed.enlarging),
    Row("batches", 60, levers.batches),
    Row("profile", 10, speed.top_ten),  # may slow down what follows
    Row("compiled", 90, levers.compiled),
)
"""Most important first."""


def run(row: Row, lab: Lab, report: Report, left: float) -> None:
    """Measure a row and report each figure at once; note why there are no more."""
    result = report.rows[row.name] = Result()
    if row.seconds > left and not lab.dry:
        result.status = f"skipped: takes {row.seconds:.0f} s, and {max(left, 0):.0f} s are left"
        print(f"{row.name}: {result.status}", flush=True)
        return report.write()
    print(f"{row.name}:", flush=True)
    started = time.monotonic()
    try:
        for name, value in row.measure(lab):
            result.figures[name] = value
            result.seconds = time.monotonic() - started
            report.write()
            print(f"  {name:70} {show(value)}", flush=True)
        result.status = "done"
    except Exception as error:  # the other rows go on
        result.status = f"failed: {type(error).__name__}: {error}"
        print(f"  {result.status}", flush=True)
    result.seconds = time.monotonic() - started
    gc.collect()
    if lab.cuda:
        torch.cuda.empty_cache()
    report.write()


def main() -> int:
    """Run the rows that were asked for; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [row.name for row in ROWS]
    parser.add_argument(
        "--minutes", type=float, default=10, help="skip rows that would take longer"
    )
    parser.add_argument("--rows", default=",".join(names), help="by name; default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder")
    options = parser.parse_args()
    chosen = options.rows.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    hide_progress_bars()
    diffusers.utils.logging.set_verbosity_error()
    deadline = time.monotonic() + 60 * options.minutes
    cuda = torch.cuda.is_available()
    lab = Lab(torch.device("cuda" if cuda else "cpu"), dry=not cuda)
    report = Report(options.out, environment_of(lab))
    for row in ROWS:
        if row.name in chosen:
            run(row, lab, report, deadline - time.monotonic())
    return int(any(result.status.startswith("failed") for result in report.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
