"""A hub cache: find, fetch and verify the components of the manifest.

huggingface_hub transfers, retries, resumes and locks. It compares no hashes: that is done here.
"""

import hashlib
import logging
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import httpx2
from huggingface_hub import constants, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.sha import git_hash

from panorama.weights.manifest import BUNDLED, Component, File, Source

logger = logging.getLogger(__name__)

STALE = 600  # seconds without a write after which a partial file belongs to a killed process


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

    def find_all(self, component: Component, source: Source) -> list[tuple[Path, File]]:
        """Find every file of a component, or return an empty list if one is missing."""
        found = [self.find(source, file) for file in component.files]
        return [pair for pair in found if pair] if all(found) else []

    def locate(self, component: Component) -> list[tuple[Path, File]]:
        """Return the files of a component from the first source that the cache has entirely."""
        found = (self.find_all(component, source) for source in component.sources)
        return next(filter(None, found), [])

    def fetch(self, component: Component) -> None:
        """Verify a component, and fetch what is missing or wrong from the first source that has it.

        Raise WeightsError if no source has it, or if the hub cannot be reached.
        """
        failures = ""
        cached_first = sorted(component.sources, key=lambda s: not self.find_all(component, s))
        for source in cached_first:
            try:
                for file in component.files:
                    self._fetch_file(component, source, file)
                return
            except (httpx2.HTTPError, OSError, WeightsError) as error:
                hidden = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
                text = " ".join(str(hidden or error).split()) or type(hidden or error).__name__
                problem = text.partition(" For more information check")[0]
                if isinstance(hidden, httpx2.ConnectError | httpx2.TimeoutException):
                    raise WeightsError(
                        f"{constants.ENDPOINT} cannot be reached: {problem}\nconnect to it, or run "
                        f"script/fetch-weights where you can, and copy its cache to {self.folder}; "
                        "PANORAMA_FAMILY=tiny fetches nothing"
                    ) from error
                logger.warning("%s: %s: %s", component.name, source, problem)
                failures += f"\n  {source}: {problem}"
        raise WeightsError(f"{component.base}/{component.name}: no source has it{failures}")

    def _fetch_file(self, component: Component, source: Source, file: File) -> None:
        """Verify a file, and fetch it if it is missing, or wrong: that once more."""
        for _ in range(2):
            path, variant = self.find(source, file) or self._download(component, source, file)
            problem = mismatch(path, variant)
            if not problem:
                return
            logger.warning("%s", problem)
            path.resolve().unlink()
        raise WeightsError(problem)

    def _download(self, component: Component, source: Source, file: File) -> tuple[Path, File]:
        """Fetch a file, or its single-precision counterpart where the source lacks this one."""
        if component.pickle:
            return self._make_lpips(component.pickle, source) / file.name, file
        *others, last = file.variants()
        for variant in others:
            try:
                return self._call_hub(source, variant.name), variant
            except RemoteEntryNotFoundError:
                logger.info("there is none; taking single precision")
        return self._call_hub(source, last.name), last

    def _call_hub(self, source: Source, name: str) -> Path:
        """Fetch a file by its name, without the user's token once the hub has refused that."""
        logger.info("fetching %s from %s", name, source)
        remove_stale(self._repository(source) / "blobs")
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
            login = "HF_TOKEN" if os.environ.get("HF_TOKEN") else f"in {constants.HF_TOKEN_PATH}"
            logger.warning("%s refuses the token %s; trying without", constants.ENDPOINT, login)
            self._token = False
            return self._call_hub(source, name)
        return Path(path)

    def _repository(self, source: Source) -> Path:
        return self.folder / repo_folder_name(repo_id=source.repository, repo_type="model")

    def _make_lpips(self, pickle: File, source: Source) -> Path:
        """Make LPIPS from VGG16 as a repository's snapshot, and return its folder."""
        from torch import hub  # takes seconds

        from panorama.sampling.perceptual import save_lpips

        repository = self._repository(source)
        folder = repository / "snapshots" / source.revision
        for path in (repository / "blobs", folder):
            path.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as work:
            config = Path(work, "config.json")
            weights = Path(work, "diffusion_pytorch_model.safetensors")
            vgg16 = Path(hub.get_dir()) / "checkpoints" / pickle.name.rpartition("/")[2]
            if not vgg16.is_file() or sha256(vgg16) != pickle.sha256:
                vgg16 = Path(work) / vgg16.name
                logger.info("fetching %s", pickle.name)
                try:
                    hub.download_url_to_file(
                        pickle.name, str(vgg16), pickle.sha256, progress=sys.stderr.isatty()
                    )
                except RuntimeError as error:  # names both hashes; the file is not opened
                    raise WeightsError(f"{pickle.name}: {error}") from error
            save_lpips(vgg16, BUNDLED / "lpips_vgg_heads.safetensors", weights)
            shutil.copyfile(BUNDLED / "full" / "perceptual" / config.name, config)
            for path in (config, weights):
                blob, link = repository / "blobs" / sha256(path), folder / path.name
                shutil.move(path, blob)
                link.unlink(missing_ok=True)
                with suppress(FileExistsError):  # from another process, to the same blob
                    link.symlink_to(os.path.relpath(blob, folder))
        return folder


def mismatch(path: Path, file: File) -> str:
    """Describe the problem of a cached file with another hash than the manifest's, "" for none.

    Without a hash in the manifest, the hub's is in the name of the blob: SHA-256, or a git hash
    where git itself keeps the file. That name is lost on a file system without symbolic links, and
    some mirrors have others.
    """
    blob = path.readlink().name if path.is_symlink() else ""
    wanted, origin = (file.sha256, "the manifest") if file.sha256 else (blob, "the hub")
    found = git_hash(path.read_bytes()) if len(wanted) == 40 else sha256(path)
    if len(wanted) in (40, 64) and found != wanted:
        return f"{file.name}: has hash {found}, but {origin} says {wanted}"
    return ""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_stale(blobs: Path) -> None:
    """Delete partial files of killed processes, up to gigabytes: the hub client never does."""
    for path in blobs.glob("*.incomplete"):
        with suppress(FileNotFoundError):  # another process has finished it meanwhile
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()
