"""Many prompts, on one process or several: `script/batch prompts.jsonl -o images`.

Each line of the file is a JSON object of inputs, such as {"prompt": "night over the sea"}. Several
processes are started by torchrun or accelerate. Each makes the images of other lines; with
`--together` all of them share the windows of every image. `results.jsonl`, beside the images, says
what was made, and the same command again makes what is missing.
"""

import argparse
import fcntl
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import distributed

from panorama.environment import family_name, hide_progress_bars
from panorama.errors import shorten
from panorama.request import INPUTS, Request
from panorama.weights import WeightsError

if TYPE_CHECKING:
    from panorama.modes import Models

RESULTS = "results.jsonl"
PATIENCE = timedelta(days=7)  # for the slowest process, which may have many more lines to go


@dataclass(frozen=True)
class Line:
    """One line of the file of prompts.

    Its digest names its image and seeds it, so that a line keeps both wherever it moves.
    """

    number: int  # from 1
    inputs: Mapping[str, Any]
    digest: str  # hash of the inputs, and of their occurrence where the file repeats them
    request: Request  # with a seed

    @property
    def file(self) -> str:
        """Return the name of the image."""
        return f"{self.digest[:12]}.png"


@dataclass(frozen=True)
class Process:
    """One of the processes that work on a file of prompts."""

    rank: int  # from 0
    ranks: int  # the number of processes
    together: bool  # all of them share the windows of every image

    @property
    def writes(self) -> bool:
        """Return True if this process saves the images that it works on."""
        return not self.together or self.rank == 0

    def choose(self, lines: Sequence[Line]) -> Sequence[Line]:
        """Return the lines that this process works on."""
        return lines if self.together else lines[self.rank :: self.ranks]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make every image that is not there yet.

    Returns:
        The exit code: 1 if some could not be made. Bad arguments and bad lines exit with 2.
    """
    parser = argparse.ArgumentParser(prog="panorama.batch", description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", type=Path, help="JSON Lines: an object of inputs on each line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the images")
    parser.add_argument("--family", help="defaults to the one that PANORAMA_FAMILY names")
    parser.add_argument(
        "--together", action="store_true", help="share the windows of each image among processes"
    )
    options = parser.parse_args(arguments)
    try:
        lines = read_lines(options.prompts)
        hide_progress_bars()
        from panorama.modes import load

        modes = dict.fromkeys(line.request.mode for line in lines)
        models = load(options.family or family_name(), modes=tuple(modes), device=own_device())
        check_lines(lines, models, together=options.together)
        options.output.mkdir(parents=True, exist_ok=True)
        made = read_results(options.output)
    except (ValueError, OSError, WeightsError) as error:
        parser.error(str(error))
    with join_processes(options.together) as process:
        if options.together and process.ranks > 1:
            distributed.barrier()  # all have read the results before any adds to them
        missing = [line for line in process.choose(lines) if made.get(line.file) != models.family]
        outcomes = [make(line, models, process, options.output) for line in missing]
    return 0 if all(outcomes) else 1


def read_lines(path: Path) -> list[Line]:
    """Read a file of prompts. Empty lines are left out.

    Raises:
        ValueError: a line is not an object of legal inputs; the message has its number.
    """
    lines: list[Line] = []
    occurrences: Counter[str] = Counter()
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            inputs = json.loads(text)
            content = json.dumps(inputs, sort_keys=True)
            occurrences[content] += 1
            digest = hashlib.sha256(f"{content}#{occurrences[content]}".encode()).hexdigest()
            seed = int(digest[:8], 16)
            lines.append(Line(number, inputs, digest, build_request(inputs, seed)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return lines


def build_request(inputs: object, seed: int) -> Request:
    """Build the request of a line. The path of a file starts at the working directory.

    Args:
        inputs: the object on the line.
        seed: replaces a seed that is left out.

    Raises:
        ValueError: the inputs are not legal.
    """
    if not isinstance(inputs, dict) or "prompt" not in inputs:
        raise ValueError(f'{shorten(inputs)}: must be an object of inputs; try {{"prompt": "sea"}}')
    if unknown := sorted(set(inputs) - set(INPUTS)):
        raise ValueError(f"{shorten(unknown[0])}: must be one of {', '.join(INPUTS)}")
    files = {
        name: Path(value)
        for name, value in inputs.items()
        if INPUTS[name].kind is Path and isinstance(value, str)
    }
    request = Request(**inputs | files)
    return request if request.seed is not None else Request(**request.inputs() | {"seed": seed})


def check_lines(lines: Sequence[Line], models: "Models", *, together: bool) -> None:
    """Check, before any work, that a family can make every line.

    Raises:
        ValueError: it cannot, or processes are to share a line's windows and it has none.
    """
    for line in lines:
        mode = line.request.mode
        try:
            models.prepare(line.request)
            if together and not models.settings(mode).window:
                rule = "have windows to share with --together, or be in a file of its own"
                raise INPUTS["mode"].refuse(mode, rule, INPUTS["mode"].default)
        except ValueError as error:
            raise ValueError(f"line {line.number}: {error}") from error


def own_device() -> torch.device | None:
    """Return this process's own GPU, None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def join_processes(together: bool) -> Iterator[Process]:
    """Join the processes that torchrun or accelerate started. All of them leave at once."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield Process(rank, ranks, together)
        return
    device = own_device() if together else None  # without it, they only wait for one another
    backend = "nccl" if device else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE, device_id=device)
    try:
        yield Process(rank, ranks, together)
        distributed.barrier()  # a launcher ends all processes when the first reports a failure
    finally:
        distributed.destroy_process_group()


def make(line: Line, models: "Models", process: Process, folder: Path) -> bool:
    """Make an image and add a line to the results. Return True if there is an image."""
    from panorama.images.safety import ImageWithheldError
    from panorama.sampling.ranks import sharing_windows

    started = time.monotonic()
    result = {"line": line.number, "file": line.file, "family": models.family}
    result |= {"inputs": line.inputs, "seed": line.request.seed}
    shared = process.together and process.ranks > 1
    try:
        with sharing_windows() if shared else nullcontext():
            panorama = models.generate(line.request)
        if process.writes:
            panorama.save(folder / line.file)
    except Exception as error:
        if shared and not isinstance(error, ImageWithheldError):
            raise  # the other processes wait for the share of this one
        result["error"] = f"{type(error).__name__}: {error}"
    if process.writes:
        add_result(folder, result | {"seconds": round(time.monotonic() - started, 3)})
        print(f"line {line.number}: {line.file}: {result.get('error', 'made')}", flush=True)
    return "error" not in result


def read_results(folder: Path) -> dict[str, str]:
    """Read the images that are there, each with the family that made it.

    An end without a newline is cut off: there a process was killed while it wrote.

    Raises:
        ValueError: a line is broken; the message has its number.
    """
    made: dict[str, str] = {}
    path = folder / RESULTS
    if not path.exists():
        return made
    with locked(path) as file:
        whole, newline, _ = file.read().rpartition(b"\n")
        file.truncate(len(whole + newline))
    for number, text in enumerate(whole.split(b"\n") if newline else [], start=1):
        try:
            result = json.loads(text)
            if "error" not in result and (folder / result["file"]).exists():
                made[result["file"]] = result["family"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: {error}; delete the line") from error
    return made


def add_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Add a line to the results."""
    with locked(folder / RESULTS) as file:
        file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read it from its start and to append to it, while no other process does."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


if __name__ == "__main__":
    sys.exit(main())
