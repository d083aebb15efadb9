"""Many prompts, on one process or several: `script/batch prompts.jsonl -o images`.

Each line of the file is a JSON object of inputs, such as {"prompt": "night over the sea"}. The
variable PROCESSES starts several processes, and so do torchrun and accelerate. Each takes a
share of the lines; with `--together` all of them share the windows of every image.
`results.jsonl`, beside the images, records each result. The same command again makes the images
that are missing, broken or unrecorded. One command at a time may work on a folder. With
`--best-of N` the image of a line is the best of N seeds: the line's own and those that follow it.
"""

import argparse
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import distributed

from panorama import weights
from panorama.best_of import make_best, read_scores, remove_all
from panorama.environment import family_name, hide_progress_bars, max_cost
from panorama.errors import shorten
from panorama.images.files import is_whole, remove_parts
from panorama.request import INPUTS, Input, Request
from panorama.weights import WeightsError

if TYPE_CHECKING:
    from panorama.jobs import Job
    from panorama.modes import Models

RESULTS = "results.jsonl"
LOCK = ".lock"  # holds the name of the process that works on the folder
STEMS = "[0-9a-f]" * 12  # of the names of images
FULL = (errno.ENOSPC, errno.EDQUOT)
PATIENCE = timedelta(days=7)  # for the slowest process, which may have many more lines to go


@dataclass(frozen=True)
class Line:
    """One line of the file of prompts, which keeps its image and seed wherever it moves."""

    number: int  # from 1
    inputs: Mapping[str, Any] | None  # as the line has them, None if they cannot be read
    file: str  # name of the image, from a hash of the inputs
    request: Request | ValueError  # with a seed; an error if the line is not legal


@dataclass(frozen=True)
class Process:
    """One of the processes that work on a file of prompts."""

    rank: int  # from 0
    ranks: int  # the number of processes
    together: bool  # several processes share the windows of every image
    best_of: int = 1  # the number of seeds of each line

    @property
    def writes(self) -> bool:
        """True if it writes the images that it makes, False if it leaves that to the first."""
        return not self.together or self.rank == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Make every image that is not there yet.

    Returns:
        The exit code: 1 if some could not be made. Bad arguments exit with 2.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="panorama.batch", description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", type=Path, help="JSON Lines: an object of inputs on each line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the images")
    parser.add_argument("--family", help="defaults to the one that PANORAMA_FAMILY names")
    parser.add_argument("--together", action="store_true", help="share the windows of each image")
    parser.add_argument("--best-of", metavar="N", default="1", help="keep the best of N seeds")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        try:
            lines, family = read_lines(options.prompts), options.family or family_name()
            offered, processes = weights.describe(family), process_count()
            best_of = parse_count("--best-of", options.best_of)
            options.output.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(locked_folder(options.output))
            done = whole_images(lines, family, options.output)
            missing = [line for line in lines if line.file not in done]
            if rank() == 0:
                going_on = [options.output / line.file for line in missing if best_of > 1]
                remove_all(options.output, STEMS, keep=going_on)
            modes = [mode for mode in offered if mode in modes_of(missing)]
            weights.require(family, modes)
            if missing and processes > 1:
                stack.close()  # the first of the processes locks the folder
                return launch(processes, arguments)
            if done and rank() == 0:
                print(f"{len(done)} already made", flush=True)
            if not missing:
                return 0
            hide_progress_bars()
            from panorama.modes import load

            models = load(family, modes=modes, device=own_device(), max_cost=max_cost())
        except (ValueError, OSError, WeightsError) as error:
            parser.error(str(error))
        process = stack.enter_context(join_processes(options.together, best_of))
        fcntl.flock(lock, fcntl.LOCK_SH)  # each process holds it, should one outlive the first
        if process.together:
            distributed.barrier()  # all have read the results before any adds to them
        else:
            lines = lines[process.rank :: process.ranks]
        missing = [line for line in lines if line.file not in done]
        return 0 if make_all(missing, models, process, options.output) else 1


def rank() -> int:
    """Return this process's rank, 0 if there is one process."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return the number of processes to start, 1 in one that was started; ValueError if bad."""
    processes = parse_count("PROCESSES", os.environ.get("PROCESSES", "1"))
    return 1 if "RANK" in os.environ else processes


def parse_count(name: str, text: str) -> int:
    """Return the positive integer that a text is; ValueError if it is none."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name}={shorten(text)}: must be an integer, at least 1; try 2")
    return int(text)


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run this command in several processes by torchrun, and return the exit code."""
    logging.disable(logging.ERROR)  # its own report would bury what the processes say
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    command = ["--standalone", f"--nproc-per-node={processes}", "-m", "panorama.batch"]
    try:
        torchrun([*command, *arguments])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return max(failure.exitcode, 1)  # negative for a signal
    return 0


def modes_of(lines: Sequence[Line]) -> set[str]:
    """Return the modes of the lines that are legal."""
    return {line.request.mode for line in lines if isinstance(line.request, Request)}


def read_lines(path: Path) -> list[Line]:
    """Read a file of prompts, without its empty lines."""
    occurrences: Counter[str] = Counter()
    texts = enumerate(path.read_bytes().split(b"\n"), start=1)
    return [read_line(number, text, occurrences) for number, text in texts if text.strip()]


def read_line(number: int, text: bytes, occurrences: Counter[str]) -> Line:
    """Read a line and count it, so that one that is repeated gives another image."""
    found: Mapping[str, Any] | ValueError
    try:
        found = read_inputs(text)
        content = json.dumps(found, sort_keys=True)
    except ValueError as error:
        found, content = error, repr(text)
    occurrences[content] += 1
    digest = hashlib.sha256(f"{content}#{occurrences[content]}".encode()).hexdigest()
    if isinstance(found, ValueError):
        return Line(number, None, f"{digest[:12]}.png", found)
    request = build_request(found, seed=int(digest[:8], 16))
    suffix = request.output_format if isinstance(request, Request) else "png"
    return Line(number, found, f"{digest[:12]}.{suffix}", request)


def read_inputs(text: bytes) -> Mapping[str, Any]:
    """Return the inputs of a line as they are; ValueError if it has none."""
    shown = shorten(text.decode(errors="replace"))
    try:
        inputs = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown}: must be JSON in UTF-8 ({error})") from error
    if not isinstance(inputs, dict) or "prompt" not in inputs:
        raise ValueError(f'{shown}: must be an object of inputs; try {{"prompt": "sea"}}')
    for name, value in inputs.items():
        if isinstance(value, dict | list):  # nested to any depth
            raise ValueError(f"{shorten(name)}: must be a text, a number, true, false or null")
    return inputs


def build_request(inputs: Mapping[str, Any], seed: int) -> Request | ValueError:
    """Return the request of a line, with a seed if it has none, or why it is not legal."""
    if unknown := sorted(set(inputs) - set(INPUTS)):
        return ValueError(f"{shorten(unknown[0])}: must be one of {', '.join(INPUTS)}")
    files = {name: str(inputs[name]) for name, rule in INPUTS.items() if takes_path(rule, inputs)}
    paths = {name: Path(text.removeprefix("@")) for name, text in files.items()}
    try:
        request = Request(**{**inputs, **paths})
    except ValueError as error:
        return error
    return request if request.seed is not None else replace(request, seed=seed)


def takes_path(rule: Input, inputs: Mapping[str, Any]) -> bool:
    """Return True for an input that names a file: @FILE where it could be another text."""
    text = inputs.get(rule.name)
    at = isinstance(text, str) and (rule.kind is Path or text.startswith("@"))
    return rule.takes_file and at


def own_device() -> torch.device | None:
    """Return this process's own GPU, None without one."""
    index = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", index) if torch.cuda.is_available() else None


@contextmanager
def join_processes(together: bool, best_of: int) -> Iterator[Process]:
    """Join the processes that torchrun or accelerate started. All of them leave at once."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield Process(rank(), ranks, together=False, best_of=best_of)
        return
    device = own_device() if together else None  # without it, they only wait for one another
    if device:
        torch.cuda.set_device(device)  # where nccl gathers objects
    backend = "nccl" if device else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE, device_id=device)
    try:
        yield Process(rank(), ranks, together, best_of)
        distributed.barrier()  # a launcher ends all processes when the first reports a failure
    finally:
        distributed.destroy_process_group()


def make_all(lines: Sequence[Line], models: "Models", process: Process, folder: Path) -> bool:
    """Make images until the disk is full. Return True if every line has one."""
    outcomes: list[bool] = []
    for line in lines:
        try:
            outcomes.append(make(line, models, process, folder))
        except OSError as error:
            if error.errno not in FULL:
                raise
            left = f"{len(lines) - sum(outcomes)} of {len(lines)} images"
            if process.ranks > 1 and not process.together:
                left += f" of process {process.rank + 1}"
            print(
                f"line {line.number}: {error.strerror}: {left} are left; make room, and run the "
                "same command again",
                file=sys.stderr,
                flush=True,
            )
            if process.together:
                raise SystemExit(1) from error  # the others wait for the share of this one
            return False
    return all(outcomes)


def make(line: Line, models: "Models", process: Process, folder: Path) -> bool:
    """Make an image and add a line to the results. Return True if there is an image.

    Raises:
        OSError: the disk is full.
    """
    from panorama.images.safety import ImageWithheldError
    from panorama.sampling.ranks import sharing_windows

    started = time.monotonic()
    result = {"line": line.number, "file": line.file, "family": models.family}
    result |= {"inputs": line.inputs}
    try:
        request = legal_request(line, models, together=process.together)
        result["seed"] = request.seed
        job = prepare(request, models, together=process.together)
        with sharing_windows() if process.together else nullcontext():
            result |= make_image(job, models, process, folder / line.file)
    except Exception as error:
        if getattr(error, "errno", None) in FULL:
            raise
        if process.together and not isinstance(error, ValueError | ImageWithheldError):
            raise  # the other processes wait for the share of this one
        result["error"] = f"{type(error).__name__}: {error}"
    if process.writes:
        add_result(folder, result | {"seconds": round(time.monotonic() - started, 3)})
        if "error" not in result:
            remove_all(folder, line.file.partition(".")[0])
        print(f"line {line.number}: {line.file}: {result.get('error', 'made')}", flush=True)
    return "error" not in result


def make_image(job: "Job", models: "Models", process: Process, path: Path) -> dict[str, Any]:
    """Make the image of a path, and return its results.

    Returns:
        Its `quality`; if it is the best of several, its `seed` and the `losers` too.

    Raises:
        ValueError: it is to be the best, and there is nothing to compare images by.
    """
    if process.best_of == 1:
        panorama = models.run(job)
        if process.writes:
            panorama.save(path, job.request.output_quality)
        return {"quality": panorama.quality}
    from panorama.quality import can_compare

    if not can_compare(job.request, models.settings(job.request.mode)):
        raise ValueError(
            f"--best-of={process.best_of}: must be 1 for an image that has neither a seam nor room "
            "for two windows; try --best-of=1"
        )
    scores = read_scores(path, models.family)
    if process.together:
        distributed.barrier()  # all have read them before any adds to them
    return make_best(models, job, process.best_of, path, scores, writes=process.writes)


def legal_request(line: Line, models: "Models", *, together: bool) -> Request:
    """Return the request of a line; ValueError, in every process, if it cannot be made."""
    from panorama.modes import check_mode

    if isinstance(line.request, ValueError):
        raise line.request
    mode = line.request.mode
    check_mode(mode, models.family, models.defaults)  # of which only the modes in use are loaded
    if together and not models.settings(mode).window:
        rule = "have windows to share with --together, or be in a file of its own"
        raise INPUTS["mode"].refuse(mode, rule, INPUTS["mode"].default)
    return line.request


def prepare(request: Request, models: "Models", *, together: bool) -> "Job":
    """Prepare a request. Processes that work together all do so, or all raise ValueError.

    A LoRA or a file may be out of reach for one of them alone, and the others would wait for it.
    Any other error ends its process, and the launcher then ends the others.
    """
    error: ValueError | None = None
    try:
        job = models.prepare(request)
    except ValueError as caught:
        error = caught
    if together:
        found: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, str(error) if error else None)
        others = [f"process {rank + 1}: {text}" for rank, text in enumerate(found) if text]
        error = error or (ValueError(others[0]) if others else None)
    if error:
        raise error
    return job


def whole_images(lines: Sequence[Line], family: str, folder: Path) -> set[str]:
    """Return the names of the lines' images that this family made and that can be read."""
    made = read_results(folder)
    files = (line.file for line in lines)
    return {file for file in files if made.get(file) == family and is_whole(folder / file)}


def read_results(folder: Path) -> dict[str, str]:
    """Return the family that made each image, by the image's name.

    Raises:
        ValueError: a line is broken, and not the end of what a killed process wrote.
    """
    path = folder / RESULTS
    if not path.exists():
        return {}
    with locked(path) as file:
        texts = file.read().split(b"\n")[:-1]
    made: dict[str, str] = {}
    for number, text in enumerate(texts, start=1):
        try:
            result = json.loads(text)
            if "error" not in result:
                made[result["file"]] = result["family"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: {error}; delete the line") from error
    return made


def add_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Add a line to the results, in ASCII, where nothing else can end a line."""
    with locked(folder / RESULTS) as file:
        file.write(json.dumps(result).encode() + b"\n")


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file of lines to read it and to append to it, while no other process does.

    An end without a newline is cut off: there a process was killed, or the disk was full.
    """
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole, newline, torn = file.read().rpartition(b"\n")
        if torn:
            file.truncate(len(whole + newline))
        file.seek(0)
        yield file


@contextmanager
def locked_folder(folder: Path) -> Iterator[BinaryIO]:
    """Let no other command work on a folder, and remove what killed ones left there.

    The first of several processes locks it, and the others open the same lock.

    Raises:
        ValueError: another command works on it.
    """
    with (folder / LOCK).open("a+b") as lock:
        if rank() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                holder = lock.read().decode(errors="replace")
                raise ValueError(
                    f"{folder}: must be a folder that no other command works on, as {holder} does; "
                    "wait for it to end, or try another folder"
                ) from error
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}".encode())
            lock.flush()
            remove_parts(folder, f"{STEMS}.*")
        yield lock


if __name__ == "__main__":
    sys.exit(main())
