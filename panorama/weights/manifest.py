"""The manifest: every file that a family fetches, its sources, hash and licence."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
BUNDLED = PACKAGE / "bundled" if (PACKAGE / "bundled").exists() else PACKAGE.parent / "weights"
"""The weights folder that comes with the package: inside a wheel, beside it in the repository."""


@dataclass(frozen=True)
class Source:
    """A repository on the hub."""

    repository: str
    revision: str  # a full commit hash
    url: str | None = None  # the web folder to fetch from, if the hub has no such repository

    def __str__(self) -> str:
        return self.url or f"{self.repository} at {self.revision}"


@dataclass(frozen=True)
class File:
    """A file to fetch."""

    name: str  # path inside its repository
    component: str  # what it belongs to, such as "unet", or what it is, such as "lora.safetensors"
    size: int | None = None  # bytes, for listings; the hashes alone decide if a file is right
    sha256: str | None = None  # None if not known in advance; the hub's own hash is checked anyway

    def variants(self) -> tuple["File", ...]:
        """Return this file, then its single-precision counterpart if it is in half precision."""
        single = self.name.replace(".fp16.", ".")
        return (self,) if single == self.name else (self, File(single, self.component))


@dataclass(frozen=True)
class Part:
    """Files of a base model that all come from one source."""

    base: str  # the base model that it belongs to
    modes: tuple[str, ...]  # the modes that need it
    licence: str
    files: tuple[File, ...]
    sources: tuple[Source, ...]  # in the order in which they are tried

    def __str__(self) -> str:
        return f"{self.base}, from {', or '.join(map(str, self.sources))}"


def read_manifest(path: Path) -> Mapping[str, tuple[Part, ...]]:
    """Read the parts that each family fetches; ValueError if the file is no manifest."""
    try:
        families = tomllib.loads(path.read_text())
        return {
            family: tuple(read_part(**part) for part in parts.values())
            for family, parts in families.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_part(
    modes: Sequence[str],
    files: Sequence[Mapping[str, Any]],
    sources: Sequence[Mapping[str, str]],
    component: str | None = None,
    **shared: str,
) -> Part:
    """Make a part from its table in the manifest.

    A file's component is the one that it or its part names, or else its first folder.
    """
    named = [{"component": component or file["name"].split("/")[0], **file} for file in files]
    return Part(
        modes=tuple(modes),
        files=tuple(File(**file) for file in named),
        sources=tuple(Source(**source) for source in sources),
        **shared,
    )
