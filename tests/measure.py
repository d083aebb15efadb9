"""What it takes to load a family's SyncDiffusion, and to take a sync step and a plain step.

Each is measured in a process of its own, so that a peak is of this work alone:
`python -m tests.measure loading FAMILY`, `python -m tests.measure steps FAMILY HEIGHT WIDTH`,
where FAMILY is the path of its folder. Linux only.
"""

import gc
import json
import os
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from panorama import models

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what the kernel takes for "forget how large this process has been"
PAGE = 4096  # bytes
ROUNDS = 3  # the fastest counts: what else the machine does can only slow one down


def drop_caches(folder: Path) -> None:
    """Whoever reads the weights next has to go to the disk."""
    gc.collect()  # of a file that is still mapped the pages would stay
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> None:
    """A plain read of the weights, by which loading them is judged."""
    buffer = bytearray(1 << 22)
    for path in folder.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load(folder: Path) -> Any:
    """The pipeline by the real path, and one value of every page: a mapped file is not yet read."""
    pipe = models.load(str(folder), device="cpu").pipelines["syncdiffusion"]
    for weight in weights_of(pipe):
        weight.flatten()[:: PAGE // weight.element_size()].sum()
    return pipe


def weights_of(pipe: Any) -> list[Tensor]:
    modules = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.perceptual)
    return [parameter.detach() for module in modules for parameter in module.parameters()]


def fastest(work: Callable[[Path], object], folder: Path) -> float:
    """Seconds that it takes with cold caches."""
    times = []
    for _ in range(ROUNDS):
        drop_caches(folder)
        started = time.perf_counter()
        work(folder)
        times.append(time.perf_counter() - started)
    return min(times)


def peak() -> int:
    """Bytes in memory at most, mapped files among them, since the peak was last reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Activations(TorchDispatchMode):
    """Counts the tensors that are alive at once, each storage once and weights not at all.

    Fake tensors too, which have a storage and no values.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = {weight.untyped_storage()._cdata for weight in weights}
        self.alive: set[int] = set()
        self.bytes = self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if size and place not in self.weights and place not in self.alive:
            self.alive.add(place)
            self.bytes += size
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self.remove, place, size)

    def remove(self, place: int, size: int) -> None:
        self.alive.remove(place)
        self.bytes -= size


def measure_loading(folder: Path) -> dict[str, Any]:
    CLEAR.write_text(RESET_PEAK)  # and before all else: what was freed may stay the process's
    weights = sum(weight.nbytes for weight in weights_of(load(folder)))
    return {
        "load_peak": peak(),
        "weights": weights,
        "files": sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
        "read_seconds": fastest(read, folder),
        "load_seconds": fastest(load, folder),
    }


def measure_steps(folder: Path, height: int, width: int) -> dict[str, Any]:
    pipe = load(folder)
    CLEAR.write_text(RESET_PEAK)
    started = time.perf_counter()
    with Activations(weights_of(pipe)) as activations:
        picture = pipe(
            "sunset over snowy mountains",
            height,
            width,
            num_inference_steps=2,
            sync_threshold=1,  # the first step is a sync step, the second is not
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
    return {
        "step_seconds": time.perf_counter() - started,
        "step_peak": peak(),
        "activations": activations.most,
        "shape": picture.shape,
        "finite": bool(picture.isfinite().all()),
    }


if __name__ == "__main__":
    kind, folder, *sizes = sys.argv[1:]
    measures = {"loading": measure_loading, "steps": measure_steps}
    measure = measures[kind]
    print(json.dumps(measure(Path(folder), *map(int, sizes))))
