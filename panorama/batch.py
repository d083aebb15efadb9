"""Many prompts, on one process or several: `script/batch prompts.jsonl -o images`.

Each line of the file is a JSON object of inputs, such as {"prompt": "night over the sea"}. Several
processes are started by torchrun or accelerate. Each makes the images of other lines; with
`--together` all of them share the windows of every image. `results.jsonl`, beside the images,
records each result, and the same command again makes the images that are missing.
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
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import distributed

from panorama.environment import family_name, hide_progress_bars
from panorama.errors import shorten
from panorama.request import INPUTS, Input, Request
from panorama.weights import WeightsError

if TYPE_CHECKING:
    from panorama.modes import Models

RESULTS = "results.jsonl"
PATIENCE = timedelta(days=7)  # for the slowest process, which may have many more lines to go


@dataclass(frozen=True)
class Line:
    """One line of the file of prompts, which keeps its image and seed wherever it moves."""

    number: int  # from 1
    inputs: Mapping[str, Any]
    file: str  # name of the image, from a hash of the inputs
    request: Request  # with a seed


@dataclass(frozen=True)
class Process:
    """One of the processes that work on a file of prompts."""

    rank: int  # from 0
    ranks: int  # the number of processes
    together: bool  # several processes share the windows of every image


def main(arguments: Sequence[str] | None = None) -> int:
    """Make every image that is not there yet.

    Returns:
        The exit code: 1 if some could not be made. Bad arguments and bad lines exit with 2.
    """
    parser = argparse.ArgumentParser(prog="panorama.batch", description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", type=Path, help="JSON Lines: an object of inputs on each line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the images")
    parser.add_argument("--family", help="defaults to the one that PANORAMA_FAMILY names")
    parser.add_argument("--together", action="store_true", help="share the windows of each image")
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
        if process.together:
            distributed.barrier()  # all have read the results before any adds to them
        else:
            lines = lines[process.rank :: process.ranks]
        missing = [line for line in lines if made.get(line.file) != models.family]
        outcomes = [make(line, models, process, options.output) for line in missing]
    return 0 if all(outcomes) else 1


def read_lines(path: Path) -> list[Line]:
    """Read a file of prompts, without its empty lines; ValueError has the number of a bad one."""
    lines: list[Line] = []
    occurrences: Counter[str] = Counter()
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            inputs = json.loads(text)
            content = json.dumps(inputs, sort_keys=True)
            occurrences[content] += 1  # so that a line that is repeated gives other images
            digest = hashlib.sha256(f"{content}#{occurrences[content]}".encode()).hexdigest()
            request = build_request(inputs, seed=int(digest[:8], 16))
            lines.append(Line(number, inputs, f"{digest[:12]}.png", request))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return lines


def build_request(inputs: object, seed: int) -> Request:
    """Build the request of a line, with a seed if it has none; ValueError if it is not legal."""
    if not isinstance(inputs, dict) or "prompt" not in inputs:
        raise ValueError(f'{shorten(inputs)}: must be an object of inputs; try {{"prompt": "sea"}}')
    if unknown := sorted(set(inputs) - set(INPUTS)):
        raise ValueError(f"{shorten(unknown[0])}: must be one of {', '.join(INPUTS)}")
    files = {name: str(inputs[name]) for name, rule in INPUTS.items() if takes_path(rule, inputs)}
    paths = {name: Path(text.removeprefix("@")) for name, text in files.items()}
    request = Request(**inputs | paths)
    return request if request.seed is not None else replace(request, seed=seed)


def takes_path(rule: Input, inputs: Mapping[str, Any]) -> bool:
    """Return True for an input that names a file: @FILE where it could be another text."""
    text = inputs.get(rule.name)
    at = isinstance(text, str) and (rule.kind is Path or text.startswith("@"))
    return rule.takes_file and at


def check_lines(lines: Sequence[Line], models: "Models", *, together: bool) -> None:
    """Raise ValueError, before any work, for a line that the models cannot make."""
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
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", rank) if torch.cuda.is_available() else None


@contextmanager
def join_processes(together: bool) -> Iterator[Process]:
    """Join the processes that torchrun or accelerate started. All of them leave at once."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield Process(rank, ranks, together=False)
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

    started, writes = time.monotonic(), not process.together or process.rank == 0
    result = {"line": line.number, "file": line.file, "family": models.family}
    result |= {"inputs": line.inputs, "seed": line.request.seed}
    try:
        with sharing_windows() if process.together else nullcontext():
            panorama = models.generate(line.request)
        if writes:
            panorama.save(folder / line.file)
    except Exception as error:
        if process.together and not isinstance(error, ImageWithheldError):
            raise  # the other processes wait for the share of this one
        result["error"] = f"{type(error).__name__}: {error}"
    if writes:
        add_result(folder, result | {"seconds": round(time.monotonic() - started, 3)})
        print(f"line {line.number}: {line.file}: {result.get('error', 'made')}", flush=True)
    return "error" not in result


def read_results(folder: Path) -> dict[str, str]:
    """Return the family that made each image that is there, by the image's name.

    An end without a newline is cut off: there a process was killed while it wrote. A line that is
    broken otherwise is a ValueError with its number.
    """
    path = folder / RESULTS
    if not path.exists():
        return {}
    with locked(path) as file:
        whole, newline, _ = file.read().rpartition(b"\n")
        file.truncate(len(whole + newline))
    made: dict[str, str] = {}
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
