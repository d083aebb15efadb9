"""Model families: what they offer, where their models are, and what has to be fetched.

A family is a folder with a family.toml and a folder for each base model. What the manifest names
of a family comes from the hub instead, through a hub cache.
"""

import logging
import os
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from tqdm import tqdm

from panorama.weights.hub import Cache, mismatch
from panorama.weights.hub import WeightsError as WeightsError
from panorama.weights.manifest import BUNDLED as BUNDLED
from panorama.weights.manifest import Component, File, read_manifest

Modes = Sequence[str] | None
"""Names of modes; None for all that a family offers."""


def find(name: str) -> Path | None:
    """Return a file or folder in PANORAMA_WEIGHTS, in `BUNDLED`, or at this very path."""
    own = os.environ.get("PANORAMA_WEIGHTS")
    places = (*([Path(own)] if own else []), BUNDLED, Path())
    return next((place / name for place in places if (place / name).exists()), None)


def manifest() -> Mapping[str, tuple[Component, ...]]:
    """Read the manifest in PANORAMA_WEIGHTS, or else the bundled one."""
    return read_manifest(find("manifest.toml") or BUNDLED / "manifest.toml")


def describe(family: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the defaults of every mode that a family offers.

    Args:
        family: Its name, or the path of its folder.

    Raises:
        FileNotFoundError: There is no such family.
    """
    path = find(f"{family}/family.toml")
    if path is None:
        names = ", ".join(sorted(file.parent.name for file in BUNDLED.glob("*/family.toml")))
        raise FileNotFoundError(f"no model family {family!r}; there are {names}")
    return tomllib.loads(path.read_text())


def safety_checker(family: str) -> Path | None:
    """Return the folder of a family's safety checker, or None if it has none."""
    return find(f"{family}/safety_checker")


def components(family: str, base: str) -> Mapping[str, Path]:
    """Return the paths of a base model's components.

    Args:
        family: Its name, or the path of its folder.
        base: "sd2", "sdxl", or "perceptual", whose only component is "perceptual".

    Returns:
        Folders, such as that of "unet", and single files, such as "lora.safetensors". Where a
        folder has *.fp16.safetensors, these are the weights that were verified.

    Raises:
        WeightsError: A component is missing.
    """
    own, cache = find(f"{family}/{base}"), Cache()
    entries = () if own is None else (own,) if base == "perceptual" else sorted(own.iterdir())
    paths = {path.name: path for path in entries}
    for component in needed(family):
        if component.base == base:
            files = cache.locate(component)
            if not files:
                raise WeightsError(f"{cache.folder} has no {base}/{component.name} of {family}")
            first = files[0][0]
            paths[component.name] = first if Path(component.name).suffix else first.parent
    return paths


def needed(family: str, modes: Modes = None) -> tuple[Component, ...]:
    """Return the components of the manifest that modes need."""
    every = manifest().get(family, ())
    return tuple(each for each in every if modes is None or set(modes) & set(each.modes))


@dataclass(frozen=True)
class MissingFile:
    """A file that is not in the cache, or has the wrong bytes."""

    component: Component
    file: File
    problem: str = ""

    def __str__(self) -> str:
        return (
            self.problem
            or f"{self.file.name} of {self.component.base}, from {self.component.origin}"
        )


def missing(
    family: str, modes: Modes = None, folder: Path | None = None, thorough: bool = False
) -> list[MissingFile]:
    """List the files that modes lack.

    Args:
        family: Its name, or the path of its folder.
        modes: Those to consider.
        folder: The hub cache; None for the default of `Cache`.
        thorough: Read and verify every file, instead of seeing that it is there.
    """
    cache = Cache(folder)
    lacking = []
    for component in needed(family, modes):
        found = cache.locate(component)
        if not found:
            source = component.sources[0]
            files = [file for file in component.downloads if not cache.find(source, file)]
            lacking += [MissingFile(component, file) for file in files]
        elif thorough:
            problems = [(file, mismatch(path, file)) for path, file in found]
            lacking += [MissingFile(component, *pair) for pair in problems if pair[1]]
    return lacking


def require(
    family: str, modes: Modes = None, folder: Path | None = None, thorough: bool = False
) -> None:
    """Check that modes lack nothing, with the arguments of `missing`.

    Raises:
        WeightsError: Something is missing or wrong.
    """
    files = missing(family, modes, folder, thorough)
    if files:
        place = Cache(folder).folder
        size = tqdm.format_sizeof(sum(each.file.size or 0 for each in files), "B", 1000)
        options = shlex.join(["--dir", str(place), *(f"--mode={mode}" for mode in modes or ())])
        raise WeightsError(
            f"{place} lacks {len(files)} files of {family}, {size}, such as {files[0]}\n"
            f"script/fetch-weights {options} fetches them; in a container it is python -m "
            "panorama.weights, with the same options"
        )


def ensure_weights(
    family: str, modes: Modes = None, folder: Path | None = None, thorough: bool = False
) -> None:
    """Fetch and verify what modes lack, with the arguments of `missing`.

    Raises:
        WeightsError: A file cannot be fetched; the message has the cause.
    """
    if constants.is_offline_mode():
        return require(family, modes, folder, thorough)
    # The hub client logs every retry, twice; the last failure is in the error.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    cache = Cache(folder)
    for component in needed(family, modes):
        if thorough or not cache.locate(component):
            cache.fetch(component)
