"""The manifest: every file that a family has to fetch, where it is and under which licence."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

SUFFIXES = (".json", ".safetensors", ".txt")
"""What a stored file may be: nothing that runs code when it is opened."""
CONVERSIONS = ("lpips",)
"""What a pickle may be turned into on arrival, and never stored."""


@dataclass(frozen=True)
class Source:
    """Where files can be had: from a repository of the hub, or below a URL.

    Attributes:
        repository: `owner/name`, or None for a URL.
        revision: A full commit of the repository, or None if none is known.
        url: A folder on a server, or None for a repository.
    """

    repository: str | None = None
    revision: str | None = None
    url: str | None = None

    def __post_init__(self) -> None:
        if (self.repository is None) == (self.url is None):
            raise ValueError("a source must have either a repository or a url")
        if self.repository is not None:
            check("repository", self.repository, r"[\w.-]+/[\w.-]+", "owner/name")
        if self.url is not None:
            check("url", self.url, r"https://[^\s?#]+[^/\s?#]", "https://host/folder")
        if self.revision is not None:
            check("revision", self.revision, "[0-9a-f]{40}", "all 40 hex digits of a commit")

    @property
    def place(self) -> str:
        """Itself, of whatever revision."""
        return self.repository or self.url or ""

    def __str__(self) -> str:
        at = f" at {self.revision}" if self.revision else ""
        return f"{self.place}{at}"


@dataclass(frozen=True)
class File:
    """A file of a part.

    Attributes:
        name: Below its source.
        target: Below the family's folder.
        size: In bytes, as it arrives; None if not known.
        sha256: As it arrives; None if not known.
    """

    name: str
    target: str
    size: int | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        for path in (self.name, self.target):
            if PurePosixPath(path).is_absolute() or ".." in path.split("/"):
                raise ValueError(f"{path!r}: must be a path below a folder; unet/config.json is")
        if PurePosixPath(self.target).suffix not in SUFFIXES:
            raise ValueError(f"{self.target}: must end in {', '.join(SUFFIXES)}; convert it")
        if self.sha256 is not None:
            check("sha256", self.sha256, "[0-9a-f]{64}", "64 hex digits")
        if self.size is not None and self.size <= 0:
            raise ValueError(f"size={self.size}: must be the bytes of a file, at least 1")


@dataclass(frozen=True)
class Part:
    """Files that come from the same place and belong to the same modes.

    Attributes:
        name: Of the part.
        modes: Those that need it.
        licence: Of its files, or where it stands.
        files: At least one.
        sources: In the order in which they are tried; () if the files are in this repository.
        convert: What the files are turned into on arrival, one of `CONVERSIONS`, or None.
    """

    name: str
    modes: tuple[str, ...]
    licence: str
    files: tuple[File, ...]
    sources: tuple[Source, ...] = ()
    convert: str | None = None

    def __post_init__(self) -> None:
        if not self.modes or not self.files:
            raise ValueError(f"{self.name}: must have modes and files")
        if not self.licence:
            raise ValueError(f"{self.name}: licence must say something; MIT is one")
        if self.convert not in (None, *CONVERSIONS):
            raise ValueError(f"{self.name}: convert must be one of {', '.join(CONVERSIONS)}")
        for file in self.files:
            stored = PurePosixPath(file.name).suffix != ".pth"
            if stored == (self.convert is not None) or (not stored and file.sha256 is None):
                raise ValueError(
                    f"{self.name}: {file.name}: a .pth, and nothing else, must be converted, and "
                    "have a sha256 that it is held to before it is opened"
                )

    @property
    def origin(self) -> str:
        """Where its files come from."""
        return ", or ".join(map(str, self.sources)) or "this repository"


def read(path: Path) -> Mapping[str, tuple[Part, ...]]:
    """The parts of every family that has to be fetched, by the family's name.

    Raises:
        ValueError: The file breaks a rule.
    """
    try:
        families = tomllib.loads(path.read_text())
        return {family: tuple(parts(tables)) for family, tables in families.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parts(tables: Mapping[str, Any]) -> Iterator[Part]:
    """The parts of one family, out of its table."""
    targets: set[str] = set()
    for name, table in tables.items():
        try:
            part = make_part(name, **table)
        except TypeError as error:  # a field that is missing, or unknown
            raise ValueError(f"{name}: {error}") from error
        for stored in part.files:
            if stored.target in targets:
                raise ValueError(f"{name}: {stored.target} is there twice")
            targets.add(stored.target)
        yield part


def make_part(name: str, *, modes: Any, files: Any, sources: Any = (), **table: Any) -> Part:
    """One part, out of its table."""
    pattern = table.pop("as", "{}")
    return Part(
        name,
        modes=tuple(modes),
        files=tuple(make_file(pattern, **values) for values in files),
        sources=tuple(Source(**values) for values in sources),
        **table,
    )


def make_file(pattern: str, name: str, **values: Any) -> File:
    """One file, whose target follows its part's pattern unless it says another."""
    return File(name, values.pop("as", pattern.format(name)), **values)


def check(field: str, value: str, pattern: str, rule: str) -> None:
    """Raises ValueError for a value that does not match a pattern as a whole."""
    if not re.fullmatch(pattern, value):
        raise ValueError(f"{field}={value!r}: must be {rule}")
