"""Render the spheres that everything in `weights/train/` is trained and judged on.

Each set is rendered once, into memory-mapped arrays in the work folder. Sample i of a kind is
always the same image, drawn from its own generator, so a longer set begins with a shorter one.
"""

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from panorama.images.files import write_atomically
from weights.train import rooms, scenes
from weights.train.scenes import HEIGHT

Image = tuple[NDArray[np.uint8], NDArray[np.float32], dict[str, object]]
Subject = rooms.Room | scenes.Scene

COARSER = 2
"""Rows and columns of a distance map are this many times fewer than those of its image."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A set of spheres: what they show, and the number of images of each split."""

    subject: type[Subject]
    train: int
    test: int


KINDS: Mapping[str, Kind] = {
    "outdoors": Kind(scenes.Scene, train=1800, test=120),
    "rooms": Kind(rooms.Room, train=1000, test=120),
}
EMPTY = "empty rooms"
SETS: Mapping[str, Kind] = {**KINDS, EMPTY: Kind(rooms.EmptyRoom, train=100, test=10)}
"""The sets of images. Only the ControlNet learns from empty rooms."""
SPLITS = {"train": 0, "test": 1}


@dataclass(frozen=True)
class Images:
    """One split of one kind, memory-mapped from disk."""

    rgb: NDArray[np.uint8]  # (N, H, W, 3) in [0, 255]
    distance: NDArray[np.float16]  # (N, H / COARSER, W / COARSER) metres, inf for the sky
    attributes: list[dict[str, object]]  # N of them


def load(work: Path, kind: str, split: str) -> Images:
    """Open the files that `render` wrote."""
    folder = work / "images"
    return Images(
        np.load(folder / f"{kind}-{split}-rgb.npy", mmap_mode="c"),
        np.load(folder / f"{kind}-{split}-distance.npy", mmap_mode="c"),
        json.loads((folder / f"{kind}-{split}.json").read_text()),
    )


def render(work: Path) -> None:
    """Render every set that is missing."""
    for kind in SETS:
        for split in SPLITS:
            render_set(work, kind, split)


def render_set(work: Path, kind: str, split: str) -> None:
    """Render one split of one kind, if its attributes (written last) are missing."""
    folder = work / "images"
    done = folder / f"{kind}-{split}.json"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    count, size = getattr(SETS[kind], split), (HEIGHT, 2 * HEIGHT)
    coarse = tuple(side // COARSER for side in size)
    rgb = open_memmap(folder / f"{kind}-{split}-rgb.npy", "w+", np.uint8, (count, *size, 3))
    path = folder / f"{kind}-{split}-distance.npy"
    distance = open_memmap(path, "w+", np.float16, (count, *coarse))
    attributes = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = pool.map(partial(draw_one, kind, split), range(count), chunksize=4)
        for index, (image, meters, facts) in enumerate(drawn):
            rgb[index], distance[index] = image, meters[::COARSER, ::COARSER]
            attributes.append(facts)
            if index % 200 == 0:
                logger.info("%s %s: %d of %d", kind, split, index, count)
    write_atomically(done, json.dumps(attributes).encode())


def draw_one(kind: str, split: str, index: int) -> Image:
    """Draw sample `index` of a split, whose seed names kind, split and index."""
    rng = np.random.default_rng([list(SETS).index(kind), SPLITS[split], index])
    subject = SETS[kind].subject.draw(rng)
    return *subject.render(rng), asdict(subject)
