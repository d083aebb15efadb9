"""The manifest: every file that a family fetches, its sources, hash and licence."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
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
    """A file to fetch."""

    name: str  # path inside its repository, or a URL
    size: int | None = None  # bytes, for listings; the hashes alone decide if a file is right
    sha256: str | None = None  # None if not known in advance; the hub's own hash is checked anyway

    def variants(self) -> tuple["File", ...]:
        """Return this file, then its single-precision counterpart if it is in half precision."""
        single = self.name.replace(".fp16.", ".")
        return (self,) if single == self.name else (self, File(single))


@dataclass(frozen=True)
class Component:
    """Files that are loaded together, such as a UNet: all of them come from one source."""

    name: str  # as in `panorama.weights.components`; the name of a single file has a suffix
    base: str  # the base model that it belongs to
    modes: tuple[str, ...]  # the modes that need it
    licence: str
    files: tuple[File, ...]
    sources: tuple[Source, ...]  # in the order in which they are tried
    pickle: File | None = None  # VGG16 by its URL, which LPIPS is made from; None otherwise

    @property
    def downloads(self) -> tuple[File, ...]:
        """The files that come over the network."""
        return (self.pickle,) if self.pickle else self.files

    @property
    def origin(self) -> str:
        """The places that its files come from, for people to read."""
        return self.pickle.name if self.pickle else ", or ".join(map(str, self.sources))


def read_manifest(path: Path) -> Mapping[str, tuple[Component, ...]]:
    """Read the components that each family fetches; ValueError if the file is no manifest."""
    try:
        families = tomllib.loads(path.read_text())
        return {
            family: tuple(component for part in parts.values() for component in split(**part))
            for family, parts in families.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def split(
    modes: Sequence[str],
    files: Sequence[dict[str, Any]],
    sources: Sequence[dict[str, str]] = (),
    component: str | None = None,
    pickle: dict[str, Any] | None = None,
    **shared: str,
) -> Iterator[Component]:
    """Split a part of the manifest into its components.

    A file belongs to the component that it names, or its part names, or its first folder is called.
    """
    if pickle:
        # The hub has no such repository: LPIPS is made here, and kept as if it came from one.
        sources = [{"repository": "panorama/lpips-vgg16", "revision": pickle["sha256"][:40]}]
    groups: dict[str, list[File]] = {}
    for file in files:
        name = file.pop("component", component or file["name"].split("/")[0])
        groups.setdefault(name, []).append(File(**file))
    for name, group in groups.items():
        yield Component(
            name,
            modes=tuple(modes),
            files=tuple(group),
            sources=tuple(Source(**source) for source in sources),
            pickle=File(**pickle) if pickle else None,
            **shared,
        )
