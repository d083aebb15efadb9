"""Flipped bytes in the files of a family: how many stop its loading, and name the file."""

import shutil
import tempfile
from pathlib import Path
from random import Random

from benchmarks.goals import Goal
from panorama.modes import load
from panorama.weights.lock import LOCK, files

GOALS = {"unnamed": Goal(most=0), "loaded": Goal(most=0)}
TINY = Path(__file__).parents[2] / "weights" / "tiny"


def run(count: int, seed: int) -> dict[str, int]:
    """Flip a byte at a random place of a random file of the tiny family, and load it.

    Args:
        count: flips, each in an otherwise whole family.
        seed: of the files, the places and the flips.

    Returns:
        How many flips `stopped` the loading with an error that names the file, stopped it
        `unnamed`, or were `loaded`.
    """
    chance, outcomes = Random(seed), {"stopped": 0, "unnamed": 0, "loaded": 0}
    with tempfile.TemporaryDirectory() as parent:
        family = Path(shutil.copytree(TINY, Path(parent, "tiny"), symlinks=True))
        names = [*files(family), LOCK]
        for _ in range(count):
            name = chance.choice(names)
            outcomes[outcome_of_flip(family, name, chance)] += 1
    return outcomes


def outcome_of_flip(family: Path, name: str, chance: Random) -> str:
    """Flip a byte of a file, load the family, and put the byte back."""
    path = family / name
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[chance.randrange(len(whole))] ^= chance.randrange(1, 256)
    path.write_bytes(flipped)
    try:
        load(str(family), device="cpu")
    except (ValueError, RuntimeError) as error:  # the first for a family.toml that is no TOML
        return "stopped" if Path(name).name in str(error) else "unnamed"
    finally:
        path.write_bytes(whole)
    return "loaded"
