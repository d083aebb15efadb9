"""Measure loading a family's syncdiffusion, and a sync step and a plain step of it.

Each is measured in a process of its own, so that a peak is of this work alone:
`python -m tests.measure loading FAMILY`, `python -m tests.measure steps FAMILY HEIGHT WIDTH`,
where FAMILY is the path of its folder. Linux only.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.activations import Activations, weights_of
from panorama import modes
from panorama.base_model import BaseModel
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.synchronize import SyncSettings

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # tells the kernel to forget how large this process has been
PAGE = 4096  # bytes
ROUNDS = 3  # the fastest counts: other work on the machine can only slow one down


def drop_caches(folder: Path) -> None:
    """Make the next reader of the weights go to the disk."""
    gc.collect()  # of a file that is still mapped the pages would stay
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> None:
    """Read the weights plainly, for comparison with loading them."""
    buffer = bytearray(1 << 22)
    for path in folder.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load(folder: Path) -> BaseModel:
    """Load the base model and read one value of every page: a mapped file is not yet read."""
    base = modes.load(str(folder), device="cpu").bases["syncdiffusion"]
    for weight in weights_of(base):
        weight.flatten()[:: PAGE // weight.element_size()].sum()
    return base


def fastest(work: Callable[[Path], object], folder: Path) -> float:
    """Return the seconds that work takes with cold caches."""
    times = []
    for _ in range(ROUNDS):
        drop_caches(folder)
        started = time.perf_counter()
        work(folder)
        times.append(time.perf_counter() - started)
    return min(times)


def peak() -> int:
    """Return the most bytes in memory, with mapped files, since the peak was last reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure_loading(folder: Path) -> dict[str, Any]:
    CLEAR.write_text(RESET_PEAK)  # before all else: the process may keep freed memory
    weights = sum(weight.nbytes for weight in weights_of(load(folder)))
    return {
        "load_peak": peak(),
        "weights": weights,
        "files": sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
        "read_seconds": fastest(read, folder),
        "load_seconds": fastest(load, folder),
    }


def measure_steps(folder: Path, height: int, width: int) -> dict[str, Any]:
    base = load(folder)
    settings = Settings(
        prompt="sunset over snowy mountains",
        height=height,
        width=width,
        num_inference_steps=2,
        sync=SyncSettings(threshold=1),  # the first step is a sync step, the second is not
    )
    CLEAR.write_text(RESET_PEAK)
    started = time.perf_counter()
    with Activations(weights_of(base)) as activations:
        image = Pipeline(base)(settings, torch.Generator().manual_seed(0))
    return {
        "step_seconds": time.perf_counter() - started,
        "step_peak": peak(),
        "activations": activations.most,
        "shape": image.shape,
        "finite": bool(image.isfinite().all()),
    }


if __name__ == "__main__":
    kind, folder, *sizes = sys.argv[1:]
    measures = {"loading": measure_loading, "steps": measure_steps}
    measure = measures[kind]
    print(json.dumps(measure(Path(folder), *map(int, sizes))))
