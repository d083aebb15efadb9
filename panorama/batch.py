"""Many prompts, on one process or several: `script/batch prompts.jsonl -o pictures`.

Each line of the file is a JSON object of inputs, such as {"prompt": "night over the sea"}. Several
processes are started by torchrun or accelerate; each makes other lines' pictures, or with
`--together` all of them make every picture, each a share of its windows. What was made is in
`results.jsonl` beside the pictures, and the same command again makes what is missing.
"""

import argparse
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from panorama.picture import save
from panorama.quiet import hush_libraries
from panorama.request import INPUTS, Request, ResolvedRequest
from panorama.safety import PictureWithheldError
from panorama.share import ALONE, Share
from panorama.weights import WeightsError

if TYPE_CHECKING:
    from panorama.models import Models

RESULTS = "results.jsonl"
PATIENCE = timedelta(days=7)
"""How long a process waits for the slowest, which may have many more lines to go."""


@dataclass(frozen=True)
class Job:
    """One line of the file of prompts."""

    line: int  # from 1
    inputs: Mapping[str, Any]
    request: Request

    @property
    def file(self) -> str:
        """The name of its picture."""
        return f"{self.line:05d}.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes every picture that is not there yet.

    Returns:
        The exit code: 1 if some could not be made. Bad arguments and bad lines exit with 2.
    """
    parser = argparse.ArgumentParser(prog="panorama.batch", description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", type=Path, help="JSON Lines: an object of inputs on each line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--family", help="if left out, what PANORAMA_FAMILY names")
    parser.add_argument(
        "--together", action="store_true", help="all processes share the windows of each picture"
    )
    options = parser.parse_args(arguments)
    try:
        jobs = read_jobs(options.prompts)
        check_together(jobs if options.together else [])
        hush_libraries()
        from panorama import models as loading  # not above: this is what has to be hushed

        modes = dict.fromkeys(job.request.mode for job in jobs)
        family = options.family or os.environ.get("PANORAMA_FAMILY", loading.DEFAULT_FAMILY)
        models = loading.load(family, modes=tuple(modes), device=own_device())
        resolved = {job.line: resolve(job, models) for job in jobs}
        options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, WeightsError) as error:
        parser.error(str(error))
    with processes(options.together) as share:
        mine = jobs if options.together else share.of(jobs)
        done = read_results(options.output)
        missing = [job for job in mine if done.get(job.file) != (family, job.inputs)]
        if options.together and share.ranks > 1:
            distributed.barrier()  # all have read what is done before any adds to it
        windows = share if options.together else ALONE
        made = [make(job, models, resolved[job.line], windows, options.output) for job in missing]
    return 0 if all(made) else 1


def read_jobs(path: Path) -> list[Job]:
    """What a file of prompts asks for, line by line; empty lines are left out.

    Raises:
        ValueError: a line that is no object of legal inputs, by its number.
    """
    jobs = []
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            inputs = json.loads(text)
            jobs.append(Job(line, inputs, build_request(inputs)))
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
    return jobs


def build_request(inputs: object) -> Request:
    """The request of a line; a file is a path from the working directory.

    Raises:
        ValueError: they are not legal.
    """
    if not isinstance(inputs, dict) or "prompt" not in inputs:
        raise ValueError(f'{inputs!r}: must be an object of inputs; {{"prompt": "sea"}} would do')
    if unknown := sorted(set(inputs) - set(INPUTS)):
        raise ValueError(f"{unknown[0]}: no such input; there are {', '.join(INPUTS)}")
    files = {
        name: Path(value)
        for name, value in inputs.items()
        if INPUTS[name].kind is Path and isinstance(value, str)
    }
    return Request(**inputs | files)


def check_together(jobs: Sequence[Job]) -> None:
    """Raises ValueError for pictures that several processes can't make together."""
    for job in jobs:
        if job.request.mode != "syncdiffusion":
            raise ValueError(
                f"line {job.line}: mode={job.request.mode!r}: has no windows to share; "
                "'syncdiffusion' would do, or the line in a file for a run without --together"
            )


def resolve(job: Job, models: "Models") -> ResolvedRequest:
    """What a line asks of a family; a seed that is left open is the line's number.

    So all processes have one seed, and the same file makes the same pictures.

    Raises:
        ValueError: it is not legal, by the line's number.
    """
    try:
        settings = models.settings(job.request.mode)
        seed = job.line if job.request.seed is None else job.request.seed
        return Request(**job.request.inputs() | {"seed": seed}).resolve(settings)
    except ValueError as error:
        raise ValueError(f"line {job.line}: {error}") from error


def own_device() -> torch.device | None:
    """This process's own GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def processes(together: bool) -> Iterator[Share]:
    """This process's share, as torchrun and accelerate tell it.

    All of them end together.

    Args:
        together: whether the processes have to add up what they make.
    """
    share = Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if share.ranks == 1:
        yield share
        return
    device = own_device() if together else None
    backend = "nccl" if device else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE, device_id=device)
    try:
        yield share
        distributed.barrier()  # or the launcher ends those at work when one has told of a failure
    finally:
        distributed.destroy_process_group()


def read_results(folder: Path) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """From each picture that is there to its family and the inputs of its line."""
    path = folder / RESULTS
    if not path.exists():
        return {}
    results = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    made = {r["file"]: (r["family"], r["inputs"]) for r in results if "error" not in r}
    return {file: source for file, source in made.items() if (folder / file).exists()}


def make(
    job: Job, models: "Models", request: ResolvedRequest, windows: Share, folder: Path
) -> bool:
    """Makes a picture and adds a line to the results; tells whether there is one."""
    started = time.monotonic()
    result = {"line": job.line, "file": job.file, "family": models.family}
    result |= {"inputs": job.inputs, "seed": request.seed}
    try:
        image = models.generate(request, share=windows)
        if windows.first:
            save(image, folder / job.file, request, models.family)
    except Exception as error:
        if windows.ranks > 1 and not isinstance(error, PictureWithheldError):
            raise  # the others wait for what this one will not give
        result["error"] = f"{type(error).__name__}: {error}"
    if windows.first:
        add_result(folder, result | {"seconds": round(time.monotonic() - started, 3)})
        print(f"{job.file}: {result.get('error', 'made')}", flush=True)
    return "error" not in result


def add_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Adds a line to the results, which several processes may write to."""
    with (folder / RESULTS).open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(result, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
