"""Brings the families that this repository does not hold.

`python -m panorama.fetch` is the command line, also as script/fetch-weights.
"""

import argparse
import errno
import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Self
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from huggingface_hub import constants
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from panorama.download import FAILURES, UNREACHABLE, Offer, ask, summary, transfer, verify
from panorama.files import BadFileError, check_readable, measure, put, size_of
from panorama.manifest import File, Part
from panorama.weights import (
    SHIPPED,
    Lack,
    Pin,
    Pins,
    WeightsError,
    home,
    listed,
    manifest,
    missing,
    parts,
    require,
)

logger = logging.getLogger("panorama.fetch")  # also when it runs as the command

STAGING = ".fetch"
WORKERS = 4


@dataclass
class Job:
    """A file that has to be fetched, and how far that is.

    Attributes:
        part: That it belongs to.
        file: Itself.
        offers: Those of the servers that have not been asked yet, asked when they are needed.
        offer: That of the first server that has the file; None if none has.
        failures: What went wrong, server by server.
    """

    part: Part
    file: File
    offers: Iterator[Offer] = field(default_factory=lambda: iter(()))
    offer: Offer | None = None
    failures: list[str] = field(default_factory=list)

    def fail(self, place: str, error: Exception) -> None:
        """Writes down what went wrong."""
        self.failures.append(f"{place}: {summary(error)}")
        logger.warning("%s: %s", self.file.target, self.failures[-1])


class StoppedError(Exception):
    """Another file's transfer failed in a way that ends them all."""


class Progress:
    """A bar of bytes over all files, and the way to stop their transfers."""

    def __init__(self, total: int, already: int) -> None:
        self.stop = Event()
        self._bar = tqdm(total=total, initial=already, unit="B", unit_scale=True, disable=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, count: int) -> None:
        """Counts what came in."""
        if self.stop.is_set():
            raise StoppedError
        self._bar.update(count)


def fetch(family: str, modes: Sequence[str] | None = None) -> None:
    """Brings all that a family's modes need; what is there already is read and verified.

    Every file is verified before it gets its name, so a file in its place is never a bad one,
    whatever happens meanwhile. What came in of others stays for the next call to go on from.

    Args:
        family: Its name.
        modes: None for all.

    Raises:
        WeightsError: A file could not be had; the message says from where and why.
    """
    if not parts(family, modes):
        return
    folder = home(family)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            lacks = missing(family, modes, thorough=True)
            copy_shipped(folder, lacks)
            fetch_all(folder, [lack for lack in lacks if lack.part.sources])
            with suppress(OSError):  # parts of other modes' files are in it, for their own turn
                (folder / STAGING).rmdir()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        room = "make room there, or choose" if full else "choose"
        raise WeightsError(
            f"{folder}: {error}; {room} another folder with --dir or PANORAMA_WEIGHTS"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from fetching into a folder. A process that is killed lets go.

    Raises:
        OSError: The file system has no such locks; others would outlive a process.
    """
    lock = FileLock(folder / ".fetch.lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process fetches into %s; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def copy_shipped(folder: Path, lacks: Iterable[Lack]) -> None:
    """Puts files of this repository beside those that are fetched."""
    for lack in lacks:
        if not lack.part.sources:
            part = folder / STAGING / Path(lack.file.target).name
            part.parent.mkdir(exist_ok=True)
            shutil.copyfile(SHIPPED / folder.name / lack.file.target, part)
            put(part, folder / lack.file.target)


def fetch_all(folder: Path, lacks: Sequence[Lack]) -> None:
    """Fetches files side by side.

    Raises:
        WeightsError: Some are offered by nobody, or their transfers failed while others went on.
    """
    if not lacks:
        return
    if constants.is_offline_mode():
        raise WeightsError(f"offline, and {folder} lacks{listed(lacks)}")
    pins = Pins(folder)
    jobs = plan(lacks, pins)
    report(jobs, [job for job in jobs if job.offer is None])
    (folder / STAGING).mkdir(exist_ok=True)
    total, already = count_bytes(folder, jobs)
    check_space(folder, total - already)
    logger.info("%d files are to be fetched, %s", len(jobs), readable(total - already))
    with Progress(total, already) as progress:
        failed = run_all(lambda job: fetch_one(folder, job, pins, progress), jobs, progress.stop)
    report(jobs, failed)


def plan(lacks: Sequence[Lack], pins: Pins) -> list[Job]:
    """Finds the first server of each file."""
    jobs = [Job(lack.part, lack.file) for lack in lacks]
    unreachable: set[str] = set()

    def find(job: Job) -> bool:
        job.offers = offers(job, pins, unreachable)
        job.offer = next(job.offers, None)
        return job.offer is not None

    run_all(find, jobs, Event())
    return jobs


def offers(job: Job, pins: Pins, unreachable: set[str]) -> Iterator[Offer]:
    """What servers offer, in their order: a private mirror comes before all others.

    Args:
        job: a file.
        pins: what was first seen.
        unreachable: servers that no file need ask any more; those found so are added.
    """
    mirror = private_mirror()
    for base in (mirror, None) if mirror else (None,):
        for source in job.part.sources:
            revision = source.revision or pins.commit(source)
            server = base or source.url or constants.ENDPOINT
            try:
                if server in unreachable:
                    raise ConnectionError(f"{server} could not be reached before")
                known = pins.arriving(job.part, job.file)
                offer = ask(source, job.file.name, revision, base, known)
            except FAILURES as error:
                if isinstance(error, UNREACHABLE):
                    unreachable.add(server)
                job.fail(f"{base}, {source}" if base else str(source), error)
            else:
                yield offer


def private_mirror() -> str:
    """The server that PANORAMA_MIRROR names; "" if it names none.

    Raises:
        WeightsError: It is no URL, or holds a password.
    """
    url = os.environ.get("PANORAMA_MIRROR", "").rstrip("/")
    if url and not url.startswith(("http://", "https://")):
        raise WeightsError(f"PANORAMA_MIRROR={url!r}: must be a URL; https://{url} might do")
    if "@" in urlsplit(url).netloc:
        host = urlsplit(url).netloc.rpartition("@")[2]
        raise WeightsError(
            "PANORAMA_MIRROR: must have no user and no password, which logs would show; "
            f"https://{host} might do"
        )
    return url


def run_all(call: Callable[[Job], bool], jobs: Sequence[Job], stop: Event) -> list[Job]:
    """Calls for all jobs side by side; an exception sets `stop` and ends the rest.

    Returns:
        Those for which it returned False.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = {pool.submit(call, job): job for job in jobs}
        try:
            return [futures[future] for future in as_completed(futures) if not future.result()]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def report(jobs: Sequence[Job], failed: Sequence[Job]) -> None:
    """Raises WeightsError with all that went wrong, each thing once, if some jobs failed."""
    groups: dict[str, list[str]] = {}
    for job in failed:
        groups.setdefault("\n    ".join(job.failures), []).append(f"\n  {job.file.target}")
    if groups:
        lines = (f"{''.join(targets)}\n    {failures}" for failures, targets in groups.items())
        raise WeightsError(f"{len(failed)} of {len(jobs)} files cannot be had:{''.join(lines)}")


def count_bytes(folder: Path, jobs: Sequence[Job]) -> tuple[int, int]:
    """The bytes of all files, as far as servers say, and of what is there of them."""
    sizes = [job.offer.size or 0 for job in jobs if job.offer]
    return sum(sizes), sum(size_of(staged(folder, job, job.offer)) for job in jobs if job.offer)


def check_space(folder: Path, needed: int) -> None:
    """Raises WeightsError if a disk has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(
            f"{folder}: {readable(needed)} are to be fetched, but only {readable(free)} are "
            "free; make room there, or choose another folder with --dir or PANORAMA_WEIGHTS"
        )


def readable(size: int) -> str:
    """Bytes for people to read."""
    return str(tqdm.format_sizeof(size, "B"))


def staged(folder: Path, job: Job, offer: Offer) -> Path:
    """Where a file comes in; what came in of other bytes has another name."""
    key = hashlib.sha256(f"{offer.etag} {offer.size}".encode()).hexdigest()[:16]
    return folder / STAGING / f"{staged_name(job)}.{key}.part"


def staged_name(job: Job) -> str:
    """What the names begin with under which a file comes in."""
    return job.file.target.replace("/", ".")


def fetch_one(folder: Path, job: Job, pins: Pins, progress: Progress) -> bool:
    """Fetches one file from the first server that sends it whole; False if none does."""
    for offer in chain([job.offer], job.offers):
        if offer is None:
            break
        try:
            bring(folder, job, offer, pins, progress)
        except FAILURES as error:
            job.fail(offer.url, error)
        else:
            logger.info("%s came from %s", job.file.target, offer.url)
            return True
    return False


def bring(folder: Path, job: Job, offer: Offer, pins: Pins, progress: Progress) -> None:
    """Fetches, verifies, pins and puts in its place one file from one server.

    Raises:
        BadFileError: It is not the file.
        httpx2.HTTPError: The transfer failed.
    """
    part = staged(folder, job, offer)
    resumed = part.exists()
    transfer(offer, part, progress)
    try:
        seen = verify(part, offer, pins.arriving(job.part, job.file))
        made_from = None
        if job.part.convert:
            made_from = seen.sha256
            part = convert_vgg16(part)  # the only conversion there is
            seen = measure(part)
        check_readable(part, Path(job.file.target).suffix)
    except BadFileError:
        part.unlink()
        if resumed:  # what was there before may have been wrong, not what came now
            return bring(folder, job, offer, pins, progress)
        raise
    pin = Pin(seen.size or 0, seen.sha256 or "", offer.source.place, offer.commit, made_from)
    pins.add(job.file.target, pin, offer.source)
    put(part, folder / job.file.target)
    # A pickle that was converted, and what came in of a file that has changed meanwhile.
    for left in (folder / STAGING).glob(f"{staged_name(job)}.{'[0-9a-f]' * 16}.part"):
        left.unlink()


def convert_vgg16(weights: Path) -> Path:
    """LPIPS, beside a file with the weights of torchvision's VGG16."""
    from panorama.perceptual import save_lpips  # not above: torch takes seconds to load

    path = weights.with_suffix(".lpips")
    save_lpips(weights, SHIPPED / "lpips_vgg_heads.safetensors", path)
    return path


def listing(family: str, modes: Sequence[str] | None, offline: bool) -> Iterator[str]:
    """Lines that say what comes from where, how large, under which licence, or is here."""
    folder = home(family)
    yield f"{family}, in {folder}:"
    lacks = missing(family, modes)
    pins = Pins(folder)
    fetched = [lack for lack in lacks if lack.part.sources]
    offline = offline or constants.is_offline_mode()
    jobs = [Job(lack.part, lack.file) for lack in fetched] if offline else plan(fetched, pins)
    by_target = {job.file.target: job for job in jobs}
    lacking = {lack.file.target for lack in lacks}
    for part in parts(family, modes):
        yield f"{part.name} ({', '.join(part.modes)}): {part.licence}, from {part.origin}"
        for file in part.files:
            job = by_target.get(file.target)
            offer = job.offer if job else None
            here = file.target not in lacking
            size = offer.size if offer else size_of(folder / file.target) if here else file.size
            source = f"from {offer.url}" if offer else "to fetch" if job else "to copy"
            state = "here" if here else source
            yield f"  {readable(size) if size else '?':>9}  {file.target}  {state}"
    known = sum(job.offer.size or 0 for job in jobs if job.offer)
    yield f"{len(jobs)} files to fetch" + (f", {readable(known)}" if known else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        arguments: None for those of this process.

    Returns:
        The exit code: 0, or 1 when something could not be had. Bad arguments exit with 2.
    """
    parser = argparse.ArgumentParser(prog="fetch-weights", description=__doc__)
    parser.add_argument("--mode", action="append", dest="modes", help="only what this mode needs")
    parser.add_argument("--dir", type=Path, help="the weights folder; default: PANORAMA_WEIGHTS")
    parser.add_argument(
        "--offline", action="store_true", help="only verify: no request, nothing written"
    )
    parser.add_argument("--list", action="store_true", help="say what would be fetched")
    options = parser.parse_args(arguments)
    if options.dir:
        os.environ["PANORAMA_WEIGHTS"] = str(options.dir)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("panorama").setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm():
            for family in manifest():
                offered = sorted({mode for part in parts(family) for mode in part.modes})
                for mode in set(options.modes or ()) - set(offered):
                    parser.error(f"--mode {mode}: must be one of {', '.join(offered)}")
                if options.list:
                    print(*listing(family, options.modes, options.offline), sep="\n")
                else:
                    if options.offline:
                        require(family, options.modes, thorough=True)
                    else:
                        fetch(family, options.modes)
                    print(f"{home(family)} has all of {family} that was asked for, verified")
    except (WeightsError, ValueError) as error:
        print(f"fetch-weights: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
