"""Where families are, and what they lack. Nothing here makes a request; see fetch.py."""

import filecmp
import json
import os
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from panorama.files import BadFileError, Known, put, sha256_of, size_of
from panorama.manifest import File, Part, Source, read

SHIPPED = Path(__file__).parent.parent / "weights"


class WeightsError(RuntimeError):
    """Weights are missing, or cannot be fetched."""


def root() -> Path:
    """The folder of the families: that of PANORAMA_WEIGHTS, or this repository's."""
    return Path(os.environ.get("PANORAMA_WEIGHTS") or SHIPPED).absolute()


def find(name: str) -> Path | None:
    """A file or folder of the weights folder, or else of this repository's."""
    places = (folder / name for folder in (root(), SHIPPED))
    return next((path for path in places if path.exists()), None)


def manifest() -> Mapping[str, tuple[Part, ...]]:
    """The parts of every family that has to be fetched, by the family's name."""
    return read(find("manifest.toml") or SHIPPED / "manifest.toml")


def family_file(family: str) -> Path:
    """The file that describes a family.

    Raises:
        FileNotFoundError: There is no such family.
    """
    path = find(f"{family}/family.toml")
    if path is None:
        found = (path for folder in (root(), SHIPPED) for path in folder.glob("*/family.toml"))
        families = ", ".join(sorted({path.parent.name for path in found}))
        raise FileNotFoundError(f"no model family {family!r} in {root()}; there is {families}")
    return path


def describe(family: str) -> Mapping[str, Mapping[str, Any]]:
    """What a family's file says of each mode that the family has.

    Raises:
        FileNotFoundError: There is no such family.
    """
    return tomllib.loads(family_file(family).read_text())


def home(family: str) -> Path:
    """The folder of a family's models."""
    return root() / family if family in manifest() else family_file(family).parent


def parts(family: str, modes: Sequence[str] | None = None) -> tuple[Part, ...]:
    """What a family's modes, None for all, need that has to be fetched."""
    every = manifest().get(family, ())
    return tuple(part for part in every if modes is None or set(modes) & set(part.modes))


@dataclass(frozen=True)
class Pin:
    """A file as it was first seen.

    Attributes:
        size: Bytes, as it is stored.
        sha256: As it is stored.
        source: The repository or URL that it came from.
        commit: Of the repository.
        made_from: The SHA-256 of what it was converted from; None if it is stored as it came.
    """

    size: int
    sha256: str
    source: str
    commit: str | None
    made_from: str | None = None

    def is_of(self, part: Part, file: File) -> bool:
        """Whether the manifest still asks for what was seen then."""
        if file.sha256:
            return file.sha256 == (self.made_from or self.sha256)
        return any(
            source.place == self.source and source.revision in (None, self.commit)
            for source in part.sources
        )


class Pins:
    """What was first seen of every file, kept in weights.lock beside them, by target."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "weights.lock"
        self._lock = Lock()
        try:
            stored = json.loads(self.path.read_bytes()) if self.path.exists() else {}
            self._pins = {target: Pin(**values) for target, values in stored.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise WeightsError(f"{self.path}: {error}; restore it, or delete it") from error

    def stored(self, part: Part, file: File) -> Known:
        """What a file has to be in its place: as first seen, if it still comes from there."""
        pin = self._pins.get(file.target)
        if pin is None or not pin.is_of(part, file):
            return Known(self.path.name)
        return Known(self.path.name, pin.size, pin.sha256)

    def arriving(self, part: Part, file: File) -> Known:
        """What a file has to be as it arrives: what the manifest says, or else as first seen."""
        # A hash of the manifest is the only one that is known of what will be converted.
        pinned = Known(self.path.name) if file.sha256 else self.stored(part, file)
        by = pinned.by if pinned.sha256 else "the manifest"
        return Known(by, file.size or pinned.size, file.sha256 or pinned.sha256)

    def commit(self, source: Source) -> str | None:
        """The commit that a repository's files were first taken from, if any were."""
        pins = list(self._pins.values())
        return next((pin.commit for pin in pins if pin.source == source.place), None)

    def add(self, target: str, pin: Pin, source: Source) -> None:
        """Adds a pin, on disk as well.

        Raises:
            BadFileError: Another file of the same source has come from another commit.
        """
        with self._lock:
            first = self.commit(source)
            if source.revision is None and first not in (None, pin.commit):
                raise BadFileError(f"moved from commit {first} to {pin.commit} meanwhile")
            self._pins[target] = pin
            pins = {name: asdict(self._pins[name]) for name in sorted(self._pins)}
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(json.dumps(pins, indent=2) + "\n")
            put(part, self.path)


@dataclass(frozen=True)
class Lack:
    """A file that is not there, or not whole."""

    part: Part
    file: File

    def __str__(self) -> str:
        return f"{self.file.target} of {self.part.name}, from {self.part.origin}"


def missing(
    family: str, modes: Sequence[str] | None = None, *, thorough: bool = False
) -> list[Lack]:
    """What a family's modes lack.

    Args:
        family: Its name.
        modes: None for all.
        thorough: Reads every file to its end; else names, sizes and pins have to do, since a
            file has its name only after it was verified.
    """
    needed = parts(family, modes)
    if not needed:
        return []
    folder = home(family)
    pins = Pins(folder)
    return [
        Lack(part, file)
        for part in needed
        for file in part.files
        if not is_whole(folder, part, file, pins, thorough)
    ]


def require(family: str, modes: Sequence[str] | None = None, *, thorough: bool = False) -> None:
    """Checks that all that modes need is there; see `missing`.

    Raises:
        WeightsError: Something is missing.
    """
    lacks = missing(family, modes, thorough=thorough)
    if lacks:
        options = ["--dir", str(root()), *(f"--mode={mode}" for mode in modes or ())]
        raise WeightsError(
            f"{home(family)} has no verified copy of{listed(lacks)}\n"
            f"script/fetch-weights {shlex.join(options)} fetches them; "
            "in a container it is python -m panorama.fetch, with the same options"
        )


def listed(lacks: Iterable[Lack]) -> str:
    """A line for each."""
    return "".join(f"\n  {lack}" for lack in lacks)


def is_whole(folder: Path, part: Part, file: File, pins: Pins, thorough: bool) -> bool:
    """Whether a file is in its place; one of which no hash is known never is."""
    path = folder / file.target
    if not path.is_file():
        return False
    if not part.sources:
        return filecmp.cmp(path, SHIPPED / folder.name / file.target, shallow=False)
    # What arrives is stored as it is, unless it is converted.
    known = pins.stored(part, file) if part.convert else pins.arriving(part, file)
    if known.sha256 is None or known.size not in (None, size_of(path)):
        return False
    return not thorough or sha256_of(path) == known.sha256
