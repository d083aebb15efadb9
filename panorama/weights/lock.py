"""The lock of a family's folder: the SHA-256 of every file in it that loading reads."""

import logging
from collections.abc import Mapping, Sequence
from glob import iglob
from pathlib import Path

from panorama.errors import shorten
from panorama.weights.hub import WeightsError, sha256

LOCK = "SHA256SUMS"  # in the format of sha256sum, which can verify it too
WRITE = "python -m panorama.weights --lock"

OWN = ("licences", "safety_checker")
"""Folders that a deployer may add to a family; verified if the lock names their files."""

logger = logging.getLogger(__name__)


def write_lock(folder: Path) -> Path:
    """Write the lock of a family's folder, and return its path."""
    digests, path = hashes(folder, files(folder)), folder / LOCK
    path.write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    return path


def check_lock(folder: Path) -> None:
    """Verify a family's folder by its lock; without one, log that nothing is verified.

    Raises:
        WeightsError: a file is missing, wrong, or not in the lock.
    """
    if not (folder / LOCK).is_file():
        logger.info("%s has no %s, so its files are not verified; see %s", folder, LOCK, WRITE)
        return
    locked, present = read_lock(folder / LOCK), files(folder)
    if own := {top(name) for name in present if name not in locked} & set(OWN):
        names = ", ".join(sorted(own))
        logger.info("%s: files in %s that %s does not list are not verified", folder, names, LOCK)
    found = hashes(folder, [n for n in present if n in locked or top(n) not in OWN])
    for name in sorted(locked.keys() | found.keys()):
        if problem := compare(locked.get(name), found.get(name)):
            raise WeightsError(
                f"{folder}: {shorten(name)} {problem}; restore the folder, or if it is meant to be "
                f"as it is, run {WRITE} {folder}"
            )


def compare(locked: str | None, found: str | None) -> str:
    """Describe the problem of a file, given its hash in the lock and its own, "" for none."""
    if locked is None:
        return f"is not in {LOCK}"
    if found is None:
        return f"is missing, but {LOCK} has it"
    return "" if found == locked else f"has hash {found}, but {LOCK} says {shorten(locked)}"


def files(folder: Path) -> list[str]:
    """Return the names of family.toml and of every file in the subfolders, links followed.

    Hidden files are left out.
    """
    names = iglob("**", root_dir=folder, recursive=True)
    read = (name for name in names if top(name) != name or name == "family.toml")
    return sorted(name for name in read if (folder / name).is_file())


def hashes(folder: Path, names: Sequence[str]) -> Mapping[str, str]:
    """Return the SHA-256 of files by their names. One that several links lead to is read once."""
    paths = {name: (folder / name).resolve() for name in names}
    digests = {path: sha256(path) for path in set(paths.values())}
    return {name: digests[path] for name, path in paths.items()}


def read_lock(path: Path) -> Mapping[str, str]:
    """Read hashes by the names of their files."""
    lines = path.read_text(errors="replace").removesuffix("\n").split("\n")
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def top(name: str) -> str:
    """Return the first part of a path."""
    return name.partition("/")[0]
