"""Furnished rooms on the whole sphere, seeded, with their captions and distances.

A room is a box with a door, a window and furniture built of axis-aligned boxes. The direction of a
face decides how bright it is. Lengths are in metres. In the frame of a wall, u runs along it from
its middle, d away from it into the room, and z up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from weights.train.scenes import HEIGHT, SUPERSAMPLE, Array, Color, average

COLORS: Mapping[str, Color] = {
    "blue": (0.30, 0.50, 0.86), "green": (0.42, 0.70, 0.40), "red": (0.84, 0.32, 0.28),
    "yellow": (0.96, 0.82, 0.34), "purple": (0.60, 0.38, 0.78), "white": (0.92, 0.91, 0.89),
}  # fmt: skip
PAINTS: Mapping[str, Color] = {
    "white": (0.96, 0.96, 0.95), "cream": (0.90, 0.84, 0.72), "wood": (0.62, 0.42, 0.25),
    "dark wood": (0.42, 0.27, 0.17), "steel": (0.70, 0.73, 0.76), "dark": (0.14, 0.15, 0.18),
    "lamp": (1.00, 0.92, 0.68), "glass": (0.66, 0.86, 0.98), "water": (0.50, 0.78, 0.92),
    "mirror": (0.80, 0.90, 0.94), "leaf": (0.24, 0.52, 0.24), "clay": (0.74, 0.44, 0.30),
    "gold": (0.88, 0.68, 0.32),
}  # fmt: skip
"""Colours of things; "accent" is made from that of the walls."""
GLOWING = frozenset({"lamp", "glass"})

Range = tuple[float, float]
Part = tuple[Range, Range, Range, str]
"""A box: its ranges of u, d and z, and its paint."""


def shelf_of_books() -> tuple[Part, ...]:
    """Return a bookshelf with three rows of books."""
    paints = ("clay", "accent", "gold", "leaf", "cream", "dark")
    books = [
        ((-0.72 + 0.36 * k, -0.40 + 0.36 * k), (0.1, 0.36), (low, low + 0.42), paints[(k + r) % 6])
        for r, low in enumerate((0.2, 0.82, 1.44))
        for k in range(4)
    ]
    sides = [((x - 0.05, x + 0.05), (0.0, 0.4), (0.0, 2.05), "wood") for x in (-0.83, 0.83)]
    boards = [((-0.8, 0.8), (0.0, 0.4), (z, z + 0.08), "wood") for z in (0.1, 0.72, 1.34, 1.97)]
    return (((-0.8, 0.8), (0.0, 0.06), (0.0, 2.0), "dark wood"), *sides, *boards, *books)


PIECES: Mapping[str, tuple[Part, ...]] = {
    "bed": (
        ((-1.0, 1.0), (0.0, 0.14), (0.0, 1.25), "wood"),
        ((-0.95, 0.95), (0.14, 2.2), (0.0, 0.3), "dark wood"),
        ((-0.92, 0.92), (0.14, 2.18), (0.3, 0.55), "white"),
        ((-0.97, 0.97), (0.9, 2.24), (0.2, 0.62), "accent"),
        ((-0.78, -0.1), (0.2, 0.62), (0.55, 0.76), "cream"),
        ((0.1, 0.78), (0.2, 0.62), (0.55, 0.76), "cream"),
        ((1.1, 1.6), (0.0, 0.5), (0.0, 0.6), "wood"),
        ((1.2, 1.5), (0.1, 0.4), (0.6, 1.05), "lamp"),
    ),
    "wardrobe": (
        ((-0.95, 0.95), (0.0, 0.6), (0.0, 2.15), "dark wood"),
        ((-0.86, -0.05), (0.6, 0.64), (0.15, 2.05), "wood"),
        ((0.05, 0.86), (0.6, 0.64), (0.15, 2.05), "wood"),
    ),
    "sofa": (
        ((-1.35, 1.35), (0.0, 1.0), (0.05, 0.42), "accent"),
        ((-1.35, 1.35), (0.0, 0.32), (0.42, 0.98), "accent"),
        ((-1.35, -1.05), (0.0, 1.02), (0.05, 0.68), "accent"),
        ((1.05, 1.35), (0.0, 1.02), (0.05, 0.68), "accent"),
        ((-0.9, -0.35), (0.3, 0.46), (0.44, 0.86), "gold"),
        ((0.35, 0.9), (0.3, 0.46), (0.44, 0.86), "gold"),
        ((-0.7, 0.7), (0.0, 0.05), (1.3, 2.1), "dark wood"),
        ((-0.6, 0.6), (0.05, 0.07), (1.4, 2.0), "glass"),
        ((-0.6, 0.6), (0.07, 0.09), (1.4, 1.65), "leaf"),
        ((-0.6, 0.6), (1.45, 2.05), (0.3, 0.42), "wood"),
        ((-0.5, -0.38), (1.5, 2.0), (0.0, 0.3), "wood"),
        ((0.38, 0.5), (1.5, 2.0), (0.0, 0.3), "wood"),
    ),
    "television": (
        ((-1.2, 1.2), (0.0, 0.5), (0.0, 0.5), "wood"),
        ((-0.95, 0.95), (0.15, 0.25), (0.62, 1.7), "dark"),
    ),
    "plant": (
        ((-0.2, 0.2), (0.1, 0.5), (0.0, 0.45), "clay"),
        ((-0.38, 0.38), (0.02, 0.7), (0.6, 1.5), "leaf"),
        ((-0.06, 0.06), (0.24, 0.36), (0.45, 0.6), "leaf"),
    ),
    "kitchen": (
        ((-1.9, 1.2), (0.0, 0.62), (0.1, 0.88), "steel"),
        ((-1.92, 1.22), (0.0, 0.66), (0.88, 0.98), "dark wood"),
        ((-0.35, 0.35), (0.62, 0.65), (0.2, 0.76), "dark"),
        ((-1.9, -0.45), (0.0, 0.4), (1.5, 2.25), "steel"),
        ((0.45, 1.2), (0.0, 0.4), (1.5, 2.25), "steel"),
        ((-0.32, 0.32), (0.0, 0.5), (1.65, 2.4), "dark"),
        ((-1.85, 1.15), (0.0, 0.02), (0.98, 1.5), "cream"),
        ((1.28, 2.0), (0.0, 0.7), (0.0, 2.05), "white"),
        ((1.36, 1.44), (0.7, 0.76), (0.9, 1.6), "dark"),
    ),
    "dining": (
        ((-0.75, 0.75), (0.7, 1.6), (0.68, 0.78), "wood"),
        ((-0.12, 0.12), (1.0, 1.3), (0.0, 0.68), "wood"),
        ((-1.2, -0.8), (0.9, 1.35), (0.0, 0.46), "accent"),
        ((-1.25, -1.15), (0.9, 1.35), (0.46, 1.0), "accent"),
        ((0.8, 1.2), (0.9, 1.35), (0.0, 0.46), "accent"),
        ((1.15, 1.25), (0.9, 1.35), (0.46, 1.0), "accent"),
        ((-0.18, 0.18), (1.0, 1.3), (0.78, 0.92), "leaf"),
    ),
    "bathtub": (
        ((-1.0, 1.0), (0.0, 0.95), (0.0, 0.62), "white"),
        ((-0.86, 0.86), (0.12, 0.82), (0.62, 0.64), "water"),
        ((-0.08, 0.08), (0.02, 0.25), (0.64, 1.0), "steel"),
        ((1.25, 1.7), (0.0, 0.08), (0.7, 1.6), "accent"),
    ),
    "washstand": (
        ((-0.65, 0.65), (0.0, 0.5), (0.3, 0.85), "wood"),
        ((-0.7, 0.7), (0.0, 0.56), (0.85, 0.98), "white"),
        ((-0.65, 0.65), (0.0, 0.05), (1.2, 2.15), "steel"),
        ((-0.55, 0.55), (0.05, 0.07), (1.3, 2.05), "mirror"),
    ),
    "toilet": (
        ((-0.26, 0.26), (0.0, 0.24), (0.0, 1.0), "white"),
        ((-0.24, 0.24), (0.24, 0.8), (0.0, 0.45), "white"),
    ),
    "desk": (
        ((-1.0, 1.0), (0.0, 0.85), (0.70, 0.80), "wood"),
        ((-1.0, -0.55), (0.0, 0.8), (0.0, 0.70), "dark wood"),
        ((0.9, 1.0), (0.0, 0.8), (0.0, 0.70), "dark wood"),
        ((-0.5, 0.5), (0.2, 0.28), (0.95, 1.6), "dark"),
        ((-0.42, 0.42), (0.28, 0.30), (1.02, 1.53), "glass"),
        ((-0.1, 0.1), (0.2, 0.3), (0.80, 0.95), "dark"),
        ((-0.3, 0.3), (1.05, 1.6), (0.42, 0.52), "accent"),
        ((-0.3, 0.3), (1.5, 1.6), (0.6, 1.2), "accent"),
        ((-0.06, 0.06), (1.25, 1.37), (0.06, 0.42), "dark"),
        ((-0.3, 0.3), (1.05, 1.6), (0.0, 0.06), "dark"),
    ),
    "bookshelf": shelf_of_books(),
    "tiles": (((-9.0, 9.0), (0.0, 0.02), (0.0, 1.15), "mirror"),),
    "window": (
        ((-0.75, 0.75), (0.0, 0.06), (0.95, 2.15), "white"),
        ((-0.66, -0.05), (0.06, 0.08), (1.04, 2.06), "glass"),
        ((0.05, 0.66), (0.06, 0.08), (1.04, 2.06), "glass"),
    ),
    "door": (
        ((-0.52, 0.52), (0.0, 0.04), (0.0, 2.12), "white"),
        ((-0.44, 0.44), (0.04, 0.06), (0.0, 2.04), "wood"),
        ((0.26, 0.36), (0.06, 0.12), (0.95, 1.08), "dark"),
    ),
}
"""Furniture in the frame of a wall, centred on u = 0."""

Place = tuple[str, int, float]
"""A piece of furniture, the number of its wall, and its centre along it, from -1 to 1."""

KINDS: Mapping[str, tuple[Place, ...]] = {
    "bedroom": (("bed", 0, -0.1), ("wardrobe", 1, 0.1), ("window", 2, 0.3), ("door", 3, -0.3)),
    "living room": (
        ("sofa", 0, 0.0), ("television", 2, 0.0), ("window", 1, 0.0), ("door", 3, 0.3),
        ("plant", 3, -0.6),
    ),
    "kitchen": (("kitchen", 0, 0.0), ("dining", 2, 0.0), ("window", 1, 0.0), ("door", 3, 0.2)),
    "bathroom": (
        ("tiles", 0, 0.0), ("tiles", 1, 0.0), ("tiles", 2, 0.0), ("tiles", 3, 0.0),
        ("bathtub", 0, 0.0), ("washstand", 1, 0.1), ("toilet", 3, 0.2), ("door", 2, -0.3),
        ("window", 2, 0.5),
    ),
    "office": (
        ("desk", 0, 0.0), ("bookshelf", 1, -0.4), ("bookshelf", 1, 0.45), ("window", 2, 0.0),
        ("door", 3, 0.3), ("plant", 3, -0.6),
    ),
}  # fmt: skip
"""The furniture of each kind of room."""
FLOORS: Mapping[str, Color] = {
    "bedroom": (0.66, 0.52, 0.42), "living room": (0.60, 0.42, 0.28), "kitchen": (0.86, 0.78, 0.62),
    "bathroom": (0.74, 0.82, 0.86), "office": (0.52, 0.54, 0.58),
}  # fmt: skip
RUGS = frozenset({"bedroom", "living room"})
SIDES = (4.0, 4.8)  # metres


@dataclass(frozen=True)
class Room:
    """The kind of a room, a key of KINDS, and the colour of its walls, one of COLORS."""

    kind: str
    color: str
    furnished: ClassVar[bool] = True

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        """Draw the attributes of one room, kinds and colours evenly."""
        return cls(str(rng.choice(list(KINDS))), str(rng.choice(list(COLORS))))

    def caption(self, rng: np.random.Generator, keep: float) -> str:
        """Describe the room, kind and colour each left out with probability 1 - keep.

        Returns e.g. "bedroom in the color of blue"; may be empty.
        """
        kind = self.kind if rng.random() < keep else ""
        if rng.random() < keep:
            return f"{kind or 'room'} in the color of {self.color}"
        return kind

    def render(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], Array]:
        """Draw the room, and whatever it leaves open at random.

        Returns:
            The image (H, 2 H, 3) in [0, 255], and the distance (H, 2 H) of what it shows in metres.
        """
        size = vector(*rng.uniform(*SIDES, 2), rng.uniform(2.5, 2.9))
        wall = np.asarray(jitter(COLORS[self.color], rng), np.float32)
        accent = 0.62 * wall + (0.0 if self.color != "white" else -0.12)
        boxes = furnish(self, size, accent, rng) if self.furnished else []
        camera = size / 2 + vector(*rng.uniform(-0.35, 0.35, 2), 0)
        camera[2] = rng.uniform(1.4, 1.6)
        rays = directions(HEIGHT * SUPERSAMPLE, float(rng.uniform(0, 2 * pi)))
        distance, color = cast_on_walls(camera, rays, size, wall, FLOORS[self.kind])
        for box in boxes:
            cast_on_box(camera, rays, box, distance, color)
        return average(color.transpose(1, 2, 0), distance)


class EmptyRoom(Room):
    """A room without furniture, which a depth image can ask for and a caption cannot."""

    furnished = False


@dataclass(frozen=True)
class Box:
    """An axis-aligned box in the room."""

    low: Array  # (3,) its smallest corner
    high: Array  # (3,) its largest corner
    color: Array  # (3,)
    glowing: bool = False


def furnish(room: Room, size: Array, accent: Array, rng: np.random.Generator) -> list[Box]:
    """Return the boxes of a room's furniture, of its lamp and of its rug."""
    mirrored = -1.0 if rng.random() < 0.5 else 1.0
    first = int(rng.integers(4))
    paints = {name: np.asarray(jitter(color, rng), np.float32) for name, color in PAINTS.items()}
    paints["accent"] = accent
    floor, ceiling = (vector(*size[:2] / 2, z) for z in (0, size[2]))
    low, high = ceiling - vector(0.3, 0.3, 0.12), ceiling + vector(0.3, 0.3, 0)
    boxes = [Box(low, high, paints["lamp"], glowing=True)]
    if room.kind in RUGS:
        half = vector(1.2, 0.9, 0)
        boxes.append(Box(floor - half, floor + half + [0, 0, 0.02], 0.5 * accent + 0.45))
    for piece, turn, center in KINDS[room.kind]:
        wall = int(first + mirrored * turn) % 4
        axis, sign = wall % 2, 1 if wall < 2 else -1
        half = float(size[axis]) / 2
        center = mirrored * center * half + rng.uniform(-0.12, 0.12)
        for u, d, z, paint in PIECES[piece]:
            along = half + sign * np.clip(center + mirrored * np.array(u), -half, half)
            away = [end if wall in (0, 3) else size[1 - axis] - end for end in d]
            ends = np.array([away, along, z] if axis else [along, away, z], np.float32)
            boxes.append(Box(ends.min(1), ends.max(1), paints[paint], paint in GLOWING))
    return boxes


def directions(height: int, yaw: float) -> Array:
    """Return the unit vectors (3, H, 2 H) of the rays of a sphere."""
    elevation = (pi / 2 - pi * (np.arange(height) + 0.5) / height)[:, None]
    azimuth = (pi * (np.arange(2 * height) + 0.5) / height + yaw)[None]
    east, north = np.cos(elevation) * np.sin(azimuth), np.cos(elevation) * np.cos(azimuth)
    rays = np.stack([east, north, np.sin(elevation) + 0 * azimuth]).astype(np.float32)
    return np.where(np.abs(rays) < 1e-6, np.float32(1e-6), rays)


def vector(x: float, y: float, z: float) -> Array:
    """Return (3,) in single precision."""
    return np.array([x, y, z], np.float32)


def column(values: Array) -> Array:
    """Return (3,) as (3, 1, 1)."""
    return values[:, None, None]


LIGHT = vector(0.90, 0.80, 1.0)
"""The brightness of faces across x, across y and of those that look up or down."""


def cast_on_walls(
    camera: Array, rays: Array, size: Array, wall: Array, floor: Color
) -> tuple[Array, Array]:
    """Return the distance (H, W) and the colour (3, H, W) of the empty room."""
    reach = np.where(rays > 0, column(size - camera), column(-camera)) / rays  # to walls
    distance = reach.min(0)
    axis = np.where(reach[2] == distance, 2, np.where(reach[1] == distance, 1, 0))
    point = column(camera) + distance * rays
    gaps = np.minimum(point, column(size) - point)
    middle = gaps.sum(0) - gaps.min(0) - gaps.max(0)  # to the nearest edge of the face
    light = LIGHT[axis] * (1 - np.float32(0.22) * np.exp(middle / np.float32(-0.35)))
    ceiling = 0.85 * np.asarray(PAINTS["white"], np.float32) + 0.15 * wall
    table = np.stack([wall, wall, np.asarray(floor, np.float32), ceiling])
    faces = table[axis + (reach[2] == distance) * (rays[2] > 0)]  # (H, W, 3)
    return distance, faces.transpose(2, 0, 1) * light


def cast_on_box(camera: Array, rays: Array, box: Box, distance: Array, color: Array) -> None:
    """Draw a box where it is nearer than what is drawn already, in place."""
    low, high = column(box.low - camera), column(box.high - camera)
    level = rays[:2, rays.shape[1] // 2][:, None]  # what columns see from above, (2, 1, W)
    ends = np.sort([(low[:2] - 0.02) / level, (high[:2] + 0.02) / level], 0)
    seen = np.flatnonzero(ends[1].min(0) > ends[0].max(0).clip(0))  # columns that may show it
    first, second = low / rays[..., seen], high / rays[..., seen]
    enters = np.minimum(first, second)
    enter, leave = enters.max(0), np.maximum(first, second).min(0)
    rows, places = np.nonzero((enter < leave) & (enter > 0) & (enter < distance[:, seen]))
    columns = seen[places]
    distance[rows, columns] = enter[rows, places]
    light = LIGHT[enters[:, rows, places].argmax(0)]
    color[:, rows, columns] = box.color[:, None] * (1 if box.glowing else light)


def jitter(color: Sequence[float], rng: np.random.Generator) -> Color:
    """Return a near neighbour of a colour."""
    r, g, b = np.clip(np.asarray(color) * rng.normal(1, 0.03) * rng.normal(1, 0.015, 3), 0, 1)
    return float(r), float(g), float(b)
