"""The best of several seeds, for `script/batch --best-of`.

Until all seeds of an image are made, the finished ones are in a hidden folder beside its path. Each
records its own quality, so that a killed command can go on with the seeds that are missing.
"""

import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import DecompressionBombError

from panorama.images.files import is_whole, read_metadata
from panorama.request import SEED_BITS

if TYPE_CHECKING:
    from panorama.jobs import Job
    from panorama.modes import Models

Scores = Mapping[int, Mapping[str, float]]
"""The quality of images by their seeds."""


def make_best(
    models: "Models", job: "Job", count: int, path: Path, scores: Scores, *, writes: bool
) -> dict[str, Any]:
    """Make an image of each of several seeds that follow one another, and keep the best.

    A seed whose image the safety checker withholds loses.

    Args:
        models: the family.
        job: its seed is the first.
        count: the number of seeds.
        path: of the image that is kept.
        scores: of the images that are there already, from `read_scores`.
        writes: False to leave the files to another process.

    Returns:
        The `seed` and the `quality` of the best, and the `losers`: theirs, or a seed and its
        `error`.

    Raises:
        ImageWithheldError: all of them were withheld.
    """
    from panorama.images.safety import ImageWithheldError  # imports diffusers, as `quality` does
    from panorama.quality import badness

    found, withheld = {}, {}
    for index in range(count):
        seed = (job.request.seed + index) % 2**SEED_BITS
        if seed in scores:
            found[seed] = scores[seed]
            continue
        try:
            panorama = models.run(replace(job, request=replace(job.request, seed=seed)))
        except ImageWithheldError as error:
            withheld[seed] = error
            continue
        if writes:
            folder_of(path).mkdir(exist_ok=True)
            panorama.save(candidate(path, seed), job.request.output_quality)
        found[seed] = panorama.quality
    if not found:
        raise withheld[job.request.seed]
    best, *others = sorted(found, key=lambda seed: badness(found[seed]))
    if writes:
        candidate(path, best).replace(path)
    losers: list[dict[str, Any]] = [{"seed": seed, "quality": found[seed]} for seed in others]
    losers += [{"seed": seed, "error": str(error)} for seed, error in withheld.items()]
    return {"seed": best, "quality": found[best], "losers": losers}


def read_scores(path: Path, family: str) -> Scores:
    """Read the quality of the whole images that a family made on the way to a path's image."""
    found = {}
    for image in folder_of(path).glob(f"[0-9]*{path.suffix}"):
        with suppress(ValueError, DecompressionBombError):  # see `read_metadata`
            metadata = read_metadata(image) if is_whole(image) else {}
            if metadata.get("family") == Path(family).name:
                found[int(image.stem)] = metadata["quality"]
    return found


def remove_all(folder: Path, stems: str, keep: Collection[Path] = ()) -> None:
    """Remove what lies in a folder on the way to images whose stems match a pattern.

    Args:
        folder: of the images.
        stems: a pattern.
        keep: the paths of images that are still to be made.
    """
    kept = {folder_of(path) for path in keep}
    for place in folder.glob(f".{stems}"):
        if place not in kept:
            shutil.rmtree(place, ignore_errors=True)


def folder_of(path: Path) -> Path:
    """Return the hidden folder of the images that may become the one of a path."""
    return path.with_name(f".{path.stem}")


def candidate(path: Path, seed: int) -> Path:
    """Return the path of the image of a seed that may become the one of a path."""
    return folder_of(path) / f"{seed}{path.suffix}"
