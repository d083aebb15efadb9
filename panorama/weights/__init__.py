"""Model families: their modes, their base models, and the files to fetch.

A family is a folder with a family.toml and a folder for each base model, chosen by its name or its
path. The files that the manifest lists for a family are fetched from the hub instead, into a hub
cache.
"""

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from tqdm import tqdm

from panorama.weights.family import LIMITS, OTHERS, USUAL, read_family
from panorama.weights.hub import Cache
from panorama.weights.hub import WeightsError as WeightsError
from panorama.weights.lock import check_lock
from panorama.weights.manifest import BUNDLED as BUNDLED
from panorama.weights.manifest import Part, read_manifest

Modes = Sequence[str] | None  # names of modes; None for all that a family offers


def find(name: str) -> Path | None:
    """Return a file or folder in PANORAMA_WEIGHTS, in `BUNDLED`, or at this very path."""
    return next(iter(find_all(name)), None)


def find_all(name: str) -> list[Path]:
    """Return a file or folder from each of the places of `find` that has it."""
    own = os.environ.get("PANORAMA_WEIGHTS")
    places = (*([Path(own)] if own else []), BUNDLED, Path())
    return [place / name for place in places if (place / name).exists()]


def manifest() -> Mapping[str, tuple[Part, ...]]:
    """Read the manifest in PANORAMA_WEIGHTS, or else the bundled one."""
    return read_manifest(find("manifest.toml") or BUNDLED / "manifest.toml")


def describe(family: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the defaults of every mode that a family offers.

    Raises:
        FileNotFoundError: there is no such family.
        ValueError: its file is not legal, see `read_family`.
    """
    return {name: table for name, table in _family_file(family).items() if name not in OTHERS}


def limits(family: str) -> Mapping[str, Any] | None:
    """Return what a family says about its limits, None if it says nothing."""
    return _family_file(family).get(LIMITS)


def usual_ranges(family: str) -> Mapping[str, Any]:
    """Return the least and the greatest usual intra_lpips of the modes that a family gives them."""
    ranges: Mapping[str, Any] = _family_file(family).get(USUAL, {})
    return ranges


def _family_file(family: str) -> Mapping[str, Any]:
    """Read `family.toml`."""
    path = find(f"{family}/family.toml")
    if path is None:
        names = ", ".join(sorted(file.parent.name for file in BUNDLED.glob("*/family.toml")))
        raise FileNotFoundError(f"no model family {family!r}; there are {names}")
    return read_family(path)


def safety_checker(family: str) -> Path | None:
    """Return the folder of a family's safety checker, or None if it has none."""
    return find(f"{family}/safety_checker")


def components(family: str, base: str) -> Mapping[str, Path]:
    """Return the components of a base model, such as "sd2" or "perceptual".

    Returns:
        By name, folders such as "unet", and files such as "lora.safetensors"; "perceptual" is the
        only component of its base, or else "vgg16.pth". Where a folder has *.fp16.safetensors,
        these are the weights that were verified.

    Raises:
        WeightsError: a component is missing.
    """
    own, cache = find(f"{family}/{base}"), Cache()
    entries = () if own is None else (own,) if base == "perceptual" else sorted(own.iterdir())
    paths = {path.name: path for path in entries}
    for part in needed(family):
        if part.base == base:
            if not (found := cache.locate(part)):
                raise WeightsError(f"{cache.folder} lacks files of {part}")
            for path, file in found:
                is_file = bool(Path(file.component).suffix)
                paths[file.component] = path if is_file else path.parent
    return paths


def needed(family: str, modes: Modes = None) -> tuple[Part, ...]:
    """Return the parts of the manifest that modes need."""
    every = manifest().get(family, ())
    return tuple(each for each in every if modes is None or set(modes) & set(each.modes))


def require(
    family: str, modes: Modes = None, folder: Path | None = None, thorough: bool = False
) -> None:
    """Raise WeightsError if modes lack any file.

    Args:
        family: its name, or the path of its folder.
        modes: the modes to consider; None for all that the family offers.
        folder: the hub cache; None for the default of `Cache`.
        thorough: read and verify every file, instead of seeing that it is there.
    """
    cache = Cache(folder)
    lacking = [each for part in needed(family, modes) for each in cache.lacking(part, thorough)]
    if lacking:
        size = tqdm.format_sizeof(sum(file.size or 0 for file, _ in lacking), "B", 1000)
        options = shlex.join(["--dir", str(cache.folder), *(f"--mode={m}" for m in modes or ())])
        raise WeightsError(
            f"{cache.folder} lacks {len(lacking)} files of {family}, {size}, such as "
            f"{lacking[0][1]}\nscript/fetch-weights {options} fetches them; in a container it is "
            "python -m panorama.weights, with the same options"
        )


def verify(family: str, modes: Modes = None) -> None:
    """Verify every file that loading modes of a family reads, or raise WeightsError.

    Fetched files have the hashes of the manifest and of the hub. Those that were verified and have
    not changed are not read again, see `Cache.verify`. The folders of the family have a lock.
    """
    require(family, modes)
    cache = Cache()
    for part in needed(family, modes):
        if problem := cache.verify(part):
            raise WeightsError(f"{cache.folder}: {problem}\nscript/fetch-weights fetches it anew")
    for folder in {folder.resolve(): folder for folder in find_all(family)}.values():
        check_lock(folder)


def ensure_weights(
    family: str, modes: Modes = None, folder: Path | None = None, thorough: bool = False
) -> None:
    """Fetch and verify what modes lack, with the arguments of `require`, or raise WeightsError."""
    if constants.is_offline_mode():
        return require(family, modes, folder, thorough)
    # The hub client logs every retry, twice; the last failure is in the error.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    cache = Cache(folder)
    for part in needed(family, modes):
        if thorough or not cache.locate(part):
            cache.fetch(part)
