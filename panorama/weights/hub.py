"""A hub cache: find, fetch and verify the parts of the manifest.

huggingface_hub transfers, retries, resumes and locks. It compares no hashes: that is done here.
"""

import hashlib
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import httpx2
from huggingface_hub import constants, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.sha import git_hash

from panorama.weights.manifest import File, Part, Source

logger = logging.getLogger(__name__)

STALE = 600  # seconds without a write after which a partial file belongs to a killed process
VERIFIED = "panorama-verified"  # a file in the folder of a repository, see `Cache.verify`
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables whose token the hub client takes before that of the stored login."""


class WeightsError(RuntimeError):
    """Weights are missing or cannot be fetched."""


class Cache:
    """A folder in the layout of the hub client's own cache.

    By default it is PANORAMA_WEIGHTS, or the user's own hub cache where that is not set.
    """

    def __init__(self, folder: Path | None = None) -> None:
        chosen = folder or os.environ.get("PANORAMA_WEIGHTS") or constants.HF_HUB_CACHE
        self.folder = Path(chosen).expanduser().absolute()
        self._token: Literal[False] | None = None  # False once the hub has refused the user's

    def find(self, source: Source, file: File) -> tuple[Path, File] | None:
        """Return the path of a cached file and its variant, or None."""
        for variant in file.variants():
            path = try_to_load_from_cache(
                source.repository, variant.name, cache_dir=self.folder, revision=source.revision
            )
            if isinstance(path, str):
                return Path(path), variant
        return None

    def find_all(self, part: Part, source: Source) -> list[tuple[Path, File]]:
        """Return the files of a part that the cache has from a source."""
        return [pair for file in part.files if (pair := self.find(source, file))]

    def locate(self, part: Part) -> list[tuple[Path, File]]:
        """Return the files of a part from the first source that the cache has entirely."""
        found = (self.find_all(part, source) for source in part.sources)
        return next((pairs for pairs in found if len(pairs) == len(part.files)), [])

    def lacking(self, part: Part, thorough: bool) -> list[tuple[File, str]]:
        """List the files of a part that are missing or, if read, wrong, each with its problem."""
        if found := self.locate(part):
            read = [(file, mismatch(path, file)) for path, file in found if thorough]
            return [(file, problem) for file, problem in read if problem]
        absent = [file for file in part.files if not self.find(part.sources[0], file)]
        return [(file, f"{file.name} of {part}") for file in absent]

    def verify(self, part: Part) -> str:
        """Describe the first wrong file of a part that the cache has entirely, "" for none.

        Reading a file takes about as long as loading it. Verified files are not read again: their
        stamps are kept in `VERIFIED`, if the cache is writable.
        """
        found = self.locate(part)
        stamps = {stamp(path, file): (path, file) for path, file in found}
        record = self.folder / found[0][0].relative_to(self.folder).parts[0] / VERIFIED
        known = set(record.read_text().split("\n")) if record.is_file() else set()
        fresh = [each for each in stamps if each not in known]
        for each in fresh:
            if problem := mismatch(*stamps[each]):
                return problem
        if fresh:
            with suppress(OSError), record.open("a") as lines:
                lines.writelines(f"{each}\n" for each in fresh)
        return ""

    def fetch(self, part: Part) -> None:
        """Verify a part, and fetch what is missing or wrong from the first source that has it all.

        The source that the cache has most of comes first. Raise WeightsError if no source has the
        part, or if the hub cannot be reached.
        """
        failures = ""
        for source in sorted(part.sources, key=lambda each: -len(self.find_all(part, each))):
            try:
                for file in part.files:
                    self._fetch_file(source, file)
                return
            except (httpx2.HTTPError, OSError, RuntimeError) as error:  # Xet's and torch's the last
                hidden = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
                text = " ".join(str(hidden or error).split()) or type(hidden or error).__name__
                problem = text.partition(" For more information check")[0]
                if isinstance(hidden, httpx2.ConnectError | httpx2.TimeoutException):
                    raise WeightsError(
                        f"{constants.ENDPOINT} cannot be reached: {problem}\nconnect to it, or run "
                        f"script/fetch-weights where you can, and copy its cache to {self.folder}; "
                        "PANORAMA_FAMILY=tiny fetches nothing"
                    ) from error
                logger.warning("%s: %s", source, problem)
                failures += f"\n  {source}: {problem}"
        raise WeightsError(f"{part.base}: no source has all of it{failures}")

    def _fetch_file(self, source: Source, file: File) -> None:
        """Verify a file; fetch it if it is missing, and again if it is wrong."""
        for _ in range(2):
            path, variant = self.find(source, file) or self._download(source, file)
            problem = mismatch(path, variant)
            if not problem:
                return
            logger.warning("%s", problem)
            for place in {path.resolve(), path}:  # the blob, and the link to it
                place.unlink(missing_ok=True)
        raise WeightsError(problem)

    def _download(self, source: Source, file: File) -> tuple[Path, File]:
        """Fetch a file, or its single-precision counterpart where the source lacks this one."""
        remove_stale(self._repository(source))
        if source.url:
            return self._from_web(source, file), file
        *others, last = file.variants()
        for variant in others:
            try:
                return self._from_hub(source, variant.name), variant
            except RemoteEntryNotFoundError:
                logger.info("%s does not exist; taking single precision", variant.name)
        return self._from_hub(source, last.name), last

    def _from_hub(self, source: Source, name: str) -> Path:
        """Fetch a file by its name, without the user's token once the hub has refused that."""
        logger.info("fetching %s from %s", name, source)
        try:
            path = hf_hub_download(
                source.repository,
                name,
                revision=source.revision,
                cache_dir=self.folder,
                token=self._token,
            )
        except HfHubHTTPError as error:
            if error.response.status_code != 401 or self._token is False or not get_token():
                raise
            origin = next(filter(os.environ.get, TOKENS), constants.HF_TOKEN_PATH)
            logger.warning("%s refuses the token of %s; trying without", constants.ENDPOINT, origin)
            self._token = False
            return self._from_hub(source, name)
        return Path(path)

    def _from_web(self, source: Source, file: File) -> Path:
        """Fetch a file from a web folder, or from torch's own cache if that has it."""
        from torch import hub  # takes seconds

        known = Path(hub.get_dir(), "checkpoints", file.name)
        right = known.is_file() and sha256(known) == file.sha256
        url = known.as_uri() if right else f"{source.url}/{file.name}"
        path = self._repository(source) / "snapshots" / source.revision / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.info("fetching %s", url)
        hub.download_url_to_file(url, str(path), file.sha256, progress=sys.stderr.isatty())
        return path

    def _repository(self, source: Source) -> Path:
        return self.folder / repo_folder_name(repo_id=source.repository, repo_type="model")


def mismatch(path: Path, file: File) -> str:
    """Describe the problem of a cached file with another hash than the manifest's, "" for none.

    Without a hash in the manifest, the hub's is in the name of the blob: SHA-256, or a git hash
    where git itself keeps the file. That name is lost on a file system without symbolic links, and
    some mirrors have others.
    """
    wanted, origin = wanted_hash(path, file)
    found = git_hash(path.read_bytes()) if len(wanted) == 40 else sha256(path)
    if len(wanted) in (40, 64) and found != wanted:
        return f"{file.name}: has hash {found}, but {origin} says {wanted}"
    return ""


def wanted_hash(path: Path, file: File) -> tuple[str, str]:
    """Return the hash that a cached file should have, perhaps "", and who says so."""
    blob = path.readlink().name if path.is_symlink() else ""
    return (file.sha256, "the manifest") if file.sha256 else (blob, "the hub")


def stamp(path: Path, file: File) -> str:
    """Return a text that changes when a cached file, or the hash it should have, changes."""
    found = path.stat()
    return f"{wanted_hash(path, file)[0]} {found.st_size} {found.st_mtime_ns} {found.st_ino}"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_stale(repository: Path) -> None:
    """Delete partial files of killed processes, up to gigabytes: no client does."""
    partial = (path for path in repository.rglob("*") if path.suffix in (".incomplete", ".partial"))
    for path in partial:
        with suppress(FileNotFoundError):  # another process has finished it meanwhile
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()
