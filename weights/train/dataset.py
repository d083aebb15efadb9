"""Render the images that everything in `weights/train/` is trained and judged on.

Each set is rendered once, into memory-mapped arrays in the work folder. Sample i of a kind is
always the same image, drawn from its own generator, so a longer set begins with a shorter one.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from weights.train import rooms, scenes

Image = tuple[NDArray[np.uint8], NDArray[np.float32], dict[str, object]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A set of images: its renderer, the size of each image, and how many each split has."""

    draw: Callable[[np.random.Generator], Image]
    width: int
    train: int
    test: int
    height: int = 256


def draw_strip(rng: np.random.Generator) -> Image:
    """Draw a landscape that spans 360 degrees horizontally and 90 degrees vertically."""
    scene = scenes.draw_scene(rng)
    return *scenes.render(scene, rng, scenes.STRIP), asdict(scene)


def draw_outdoors(rng: np.random.Generator) -> Image:
    """Draw a landscape on the whole sphere."""
    scene = scenes.draw_scene(rng)
    return *scenes.render(scene, rng, scenes.EQUIRECT), asdict(scene)


def draw_room(rng: np.random.Generator) -> Image:
    """Draw a room on the whole sphere."""
    room = rooms.Room(str(rng.choice(rooms.KINDS)), str(rng.choice(list(rooms.COLORS))))
    return *rooms.render(room, rng), asdict(room)


KINDS: Mapping[str, Kind] = {
    "strips": Kind(draw_strip, width=1024, train=3200, test=160),
    "outdoors": Kind(draw_outdoors, width=512, train=1600, test=80),
    "rooms": Kind(draw_room, width=512, train=1600, test=80),
}
SPLITS = {"train": 0, "test": 1}


@dataclass(frozen=True)
class Images:
    """One split of one kind, memory-mapped from disk."""

    rgb: NDArray[np.uint8]  # (N, H, W, 3) in [0, 255]
    distance: NDArray[np.float16]  # (N, H, W) metres, inf for the sky
    attributes: list[dict[str, object]]  # N of them


def load(work: Path, kind: str, split: str) -> Images:
    """Open the files that `render` wrote."""
    folder = work / "images"
    return Images(
        np.load(folder / f"{kind}-{split}-rgb.npy", mmap_mode="r"),
        np.load(folder / f"{kind}-{split}-distance.npy", mmap_mode="r"),
        json.loads((folder / f"{kind}-{split}.json").read_text()),
    )


def locate(sizes: Iterable[int], index: int) -> tuple[int, int]:
    """Return the number of an image's set, and its number in that set.

    Args:
        sizes: the sizes of the sets, in order.
        index: the image's number among all.
    """
    for chosen, size in enumerate(sizes):
        if index < size:
            return chosen, index
        index -= size
    raise IndexError(index)


def render(work: Path, workers: int = 2) -> None:
    """Render every set that is missing."""
    for kind in KINDS:
        for split in SPLITS:
            render_set(work, kind, split, workers)


def render_set(work: Path, kind: str, split: str, workers: int) -> None:
    """Render one split of one kind, if its attributes (written last) are missing."""
    folder = work / "images"
    done = folder / f"{kind}-{split}.json"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    spec = KINDS[kind]
    shape = (getattr(spec, split), spec.height, spec.width)
    rgb = open_memmap(folder / f"{kind}-{split}-rgb.npy", "w+", np.uint8, (*shape, 3))
    distance = open_memmap(folder / f"{kind}-{split}-distance.npy", "w+", np.float16, shape)
    attributes = []
    with ProcessPoolExecutor(workers) as pool:
        drawn = pool.map(partial(draw_one, kind, split), range(shape[0]), chunksize=8)
        for index, (image, meters, facts) in enumerate(drawn):
            rgb[index], distance[index] = image, meters
            attributes.append(facts)
            if index % 200 == 0:
                logger.info("%s %s: %d of %d", kind, split, index, shape[0])
    done.write_text(json.dumps(attributes))


def draw_one(kind: str, split: str, index: int) -> Image:
    """Draw sample `index` of a split, whose seed names kind, split and index."""
    seed = [list(KINDS).index(kind), SPLITS[split], index]
    return KINDS[kind].draw(np.random.default_rng(seed))
