"""The manifest: every file that a family fetches, its sources, hash and licence."""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
BUNDLED = PACKAGE / "bundled" if (PACKAGE / "bundled").exists() else PACKAGE.parent / "weights"
"""The weights folder that comes with the package: inside a wheel, beside it in the repository."""


@dataclass(frozen=True)
class Source:
    """A repository on the hub, at a full commit hash, or at "main" where none is known."""

    repository: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.repository} at {self.revision}"


@dataclass(frozen=True)
class File:
    """A file to fetch.

    Attributes:
        name: Path inside its repository, or a URL.
        size: Bytes, for listings; the hashes alone decide whether a file is right.
        sha256: None if it is not known in advance. The hub's own hash is checked in any case.
    """

    name: str
    size: int | None = None
    sha256: str | None = None

    def variants(self) -> tuple["File", ...]:
        """Return this file, then its single-precision counterpart if it is in half precision."""
        single = self.name.replace(".fp16.", ".")
        return (self,) if single == self.name else (self, File(single))


@dataclass(frozen=True)
class Component:
    """Files that are loaded together, such as a UNet: all of them come from one source.

    Attributes:
        name: As in `panorama.weights.components`. A name with a suffix is that of a single file.
        base: The base model that it belongs to.
        modes: Modes that need it.
        sources: In the order in which they are tried.
        pickle: VGG16, which LPIPS is made from, named by its URL; None for all other components.
    """

    name: str
    base: str
    modes: tuple[str, ...]
    licence: str
    files: tuple[File, ...]
    sources: tuple[Source, ...]
    pickle: File | None = None

    @property
    def downloads(self) -> tuple[File, ...]:
        """The files that come over the network."""
        return (self.pickle,) if self.pickle else self.files

    @property
    def origin(self) -> str:
        """The places that its files come from, for people to read."""
        return self.pickle.name if self.pickle else ", or ".join(map(str, self.sources))


def read_manifest(path: Path) -> Mapping[str, tuple[Component, ...]]:
    """Read the components of every family that fetches any, keyed by family.

    Raises:
        ValueError: The file is not a manifest.
    """
    try:
        families = tomllib.loads(path.read_text())
        return {
            family: tuple(component for part in parts.values() for component in split(**part))
            for family, parts in families.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def split(
    *,
    modes: list[str],
    files: list[dict[str, Any]],
    sources: list[dict[str, str]] | None = None,
    component: str | None = None,
    pickle: dict[str, Any] | None = None,
    **shared: str,
) -> Iterator[Component]:
    """Split a part of the manifest into its components.

    A file belongs to the component that it names, or that its part names, or that its first
    folder is called.
    """
    if pickle:
        # The hub has no such repository: LPIPS is made here, and kept as if it came from one.
        sources = [{"repository": "panorama/lpips-vgg16", "revision": pickle["sha256"][:40]}]
    groups: dict[str, list[File]] = {}
    for entry in files:
        values = {"component": component or entry["name"].split("/")[0], **entry}
        groups.setdefault(values.pop("component"), []).append(File(**values))
    for name, group in groups.items():
        yield Component(
            name,
            modes=tuple(modes),
            files=tuple(group),
            sources=tuple(Source(**source) for source in sources or ()),
            pickle=File(**pickle) if pickle else None,
            **shared,
        )
