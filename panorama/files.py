"""Weight files on disk: what is known of one, and whether it can be read."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open


class BadFileError(Exception):
    """A file is not what it should be."""


@dataclass(frozen=True)
class Known:
    """What is known of a file; None is not known.

    Attributes:
        by: Who says so.
        size: Bytes.
        sha256: Hex digits.
    """

    by: str
    size: int | None = None
    sha256: str | None = None


def size_of(path: Path) -> int:
    """Bytes; 0 if there is no such file."""
    return path.stat().st_size if path.exists() else 0


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(path: Path) -> Known:
    """The size and the SHA-256 of a file."""
    return Known(path.name, size_of(path), sha256_of(path))


def put(part: Path, path: Path) -> None:
    """Gives a whole file its name, all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def check_readable(path: Path, suffix: str) -> None:
    """Checks that a file is what a suffix says, and whole as far as that shows.

    Raises:
        BadFileError: It is not.
    """
    try:
        READERS[suffix](path)
    except (ValueError, SafetensorError) as error:
        raise BadFileError(f"is no {suffix} file: {error}") from error


def read_header(path: Path) -> None:
    """Reads the header of safetensors, which has to account for every byte."""
    with safe_open(path, framework="numpy"):
        pass


READERS: Mapping[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_bytes()),
    ".safetensors": read_header,
    ".txt": lambda path: path.read_text(encoding="utf-8"),
}
