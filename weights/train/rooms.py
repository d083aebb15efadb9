"""Draw furnished rooms as 2:1 equirectangular images with exact distances.

A room is a box with a door, a window and furniture built of axis-aligned boxes. Everything is
drawn from one seeded generator, so the same generator state always gives the same room.

Frames used here, all in metres:

* room frame: x in [0, width], y in [0, depth], z up in [0, height];
* wall frame: u along a wall, d away from it into the room, z up. Furniture is described in this
  frame and moved into the room frame when it is placed.

A ray is followed by its horizontal range s: the point ``camera + s * (sin a, cos a, tan e)`` for
azimuth a and elevation e. In that parameter a box is entered and left at values that depend on
the column alone (its sides) or the row alone (its top and bottom), so that one box costs a few
one-dimensional sums and one two-dimensional comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Rgb = tuple[float, float, float]
Vec = tuple[float, float, float]
Plane = NDArray[np.float32]

COLORS: Mapping[str, Rgb] = MappingProxyType(
    {
        "blue": (0.15, 0.36, 0.78),
        "green": (0.24, 0.58, 0.24),
        "red": (0.74, 0.15, 0.12),
        "yellow": (0.92, 0.70, 0.12),
        "purple": (0.45, 0.20, 0.66),
        "white": (0.86, 0.85, 0.83),
    }
)
KINDS: tuple[str, ...] = ("bedroom", "living room", "kitchen", "bathroom", "office")

WHITE: Rgb = (0.88, 0.88, 0.86)
CREAM: Rgb = (0.80, 0.74, 0.60)
STEEL: Rgb = (0.56, 0.60, 0.63)
DARK: Rgb = (0.035, 0.04, 0.05)
CHARCOAL: Rgb = (0.09, 0.10, 0.12)
LEAF: Rgb = (0.10, 0.36, 0.12)
LAMP: Rgb = (1.0, 0.86, 0.58)
SKY_LOW: Rgb = (0.84, 0.94, 1.0)
SKY_HIGH: Rgb = (0.30, 0.60, 0.98)
WOODS: tuple[Rgb, ...] = ((0.44, 0.25, 0.12), (0.30, 0.16, 0.08), (0.58, 0.40, 0.22))
BOOKS: tuple[Rgb, ...] = (
    (0.50, 0.10, 0.08),
    (0.10, 0.22, 0.42),
    (0.66, 0.50, 0.14),
    (0.12, 0.32, 0.20),
    (0.72, 0.68, 0.58),
    (0.34, 0.14, 0.30),
)

FLOORS: Mapping[str, tuple[Rgb, ...]] = MappingProxyType(
    {
        "bedroom": ((0.46, 0.36, 0.36), (0.42, 0.27, 0.15)),
        "living room": ((0.46, 0.28, 0.14), (0.34, 0.19, 0.10)),
        "kitchen": ((0.66, 0.60, 0.46), (0.74, 0.66, 0.44)),
        "bathroom": ((0.52, 0.62, 0.66), (0.60, 0.66, 0.68)),
        "office": ((0.26, 0.28, 0.32), (0.38, 0.35, 0.32)),
    }
)
# Smallest and largest side of the floor plan. Bathrooms are small so that the fixtures fill them.
SIDES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "bedroom": (3.3, 4.6),
        "living room": (3.6, 5.0),
        "kitchen": (3.3, 4.6),
        "bathroom": (3.0, 3.8),
        "office": (3.1, 4.2),
    }
)

WALLS = 4
CLEAR = 0.45  # metres wanted between the camera and any piece of furniture
ATTEMPTS = 12
CHOICES = 3  # good camera places compared
TINY = 1e-7


@dataclass(frozen=True)
class Room:
    """The kind of a room and its colour.

    Attributes:
        kind: one of `KINDS`.
        color: a name in `COLORS`, the colour of the walls.
    """

    kind: str
    color: str


@dataclass(frozen=True)
class Box:
    """An axis-aligned box, in a wall frame or in the room frame.

    Attributes:
        low: smallest corner in metres.
        high: largest corner in metres.
        color: linear RGB in [0, 1].
        top: colour at the upper edge when the colour changes with height, else None.
        glow: 0 for a lit surface, 1 for one that shows its own colour whatever the light.
    """

    low: Vec
    high: Vec
    color: Rgb
    top: Rgb | None = None
    glow: float = 0.0


@dataclass(frozen=True)
class Piece:
    """Furniture in its own wall frame, filling u in [0, width] and d in [0, depth]."""

    width: float
    depth: float
    height: float
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Zone:
    """Space taken in the room frame. Zones that are not solid only keep furniture away."""

    low: Vec
    high: Vec
    solid: bool = True


@dataclass(frozen=True)
class Spot:
    """The place of a piece: its wall and the start of its u and d ranges there."""

    wall: int
    u: float
    d: float


@dataclass(frozen=True)
class Scene:
    """Everything that an image depends on.

    Attributes:
        size: width, depth and height of the room in metres.
        boxes: everything inside the room, room frame.
        zones: space taken by the furniture, room frame.
        camera: position in the room frame, metres.
        yaw: azimuth of the room's y axis in the image, radians.
        wall, floor, ceiling: linear RGB in [0, 1].
        window: centre of the window, room frame.
        facing: unit vector from the window into the room.
    """

    size: Vec
    boxes: tuple[Box, ...]
    zones: tuple[Zone, ...]
    camera: Vec
    yaw: float
    wall: Rgb
    floor: Rgb
    ceiling: Rgb
    window: Vec
    facing: Vec


# ---------------------------------------------------------------------------------------- colours


def mix(a: Rgb, b: Rgb, share: float) -> Rgb:
    """Return the colour `share` of the way from a to b."""
    return (
        a[0] + (b[0] - a[0]) * share,
        a[1] + (b[1] - a[1]) * share,
        a[2] + (b[2] - a[2]) * share,
    )


def scale(color: Rgb, by: float) -> Rgb:
    """Return the colour made `by` times as bright, kept in [0, 1]."""
    return (min(color[0] * by, 1.0), min(color[1] * by, 1.0), min(color[2] * by, 1.0))


def jitter(color: Rgb, rng: np.random.Generator, hue: float, light: float) -> Rgb:
    """Return a near neighbour of a colour.

    Args:
        color: linear RGB in [0, 1].
        rng: source of the change.
        hue: largest relative change of one channel on its own.
        light: largest relative change of all channels together.
    """
    r, g, b = (1 + rng.uniform(-hue, hue, 3)) * (1 + rng.uniform(-light, light))
    return (min(color[0] * r, 1.0), min(color[1] * g, 1.0), min(color[2] * b, 1.0))


def pick(colors: Sequence[Rgb], rng: np.random.Generator) -> Rgb:
    """Return one of the colours, slightly changed."""
    return jitter(colors[int(rng.integers(len(colors)))], rng, 0.04, 0.1)


def accent_of(wall: Rgb, rng: np.random.Generator) -> Rgb:
    """Return a deeper tone of the wall colour for textiles, set apart from the wall behind."""
    grey = sum(wall) / 3
    if max(wall) - min(wall) < 0.1:  # a white room: its textiles are grey
        return scale((0.45, 0.47, 0.50), rng.uniform(0.7, 1.2))
    return mix(scale(wall, rng.uniform(0.35, 0.55)), (grey, grey, grey), 0.1)


# --------------------------------------------------------------------------------------- furniture


def block(
    u: tuple[float, float],
    d: tuple[float, float],
    z: tuple[float, float],
    color: Rgb,
    top: Rgb | None = None,
    glow: float = 0.0,
) -> Box:
    """Return a box from its three ranges in a wall frame, metres."""
    return Box((u[0], d[0], z[0]), (u[1], d[1], z[1]), color, top, glow)


def bed(rng: np.random.Generator, accent: Rgb) -> Piece:
    """Build a bed with its head against the wall, and a nightstand with a lamp beside it."""
    width, length = rng.uniform(1.5, 1.8), rng.uniform(1.95, 2.1)
    wood = pick(WOODS, rng)
    stand = rng.uniform(0.45, 0.55)
    fold = rng.uniform(0.7, 0.95)
    boxes = [
        block((0, width), (0.0, 0.12), (0, rng.uniform(0.95, 1.2)), wood),
        block((0.02, width - 0.02), (0.12, length), (0, 0.30), scale(wood, 0.8)),
        block((0.03, width - 0.03), (0.12, length - 0.03), (0.30, 0.52), WHITE),
        block((0, width), (fold, length + 0.02), (0.26, 0.57), accent),
        block((0, width), (fold, fold + 0.22), (0.3, 0.59), mix(accent, WHITE, 0.6)),
    ]
    half = width / 2
    for start in (0.12, half + 0.06):
        boxes.append(
            block((start, start + half - 0.18), (0.16, 0.58), (0.52, 0.68), mix(WHITE, accent, 0.1))
        )
    near = width + 0.08
    boxes += [
        block((near, near + stand), (0.02, 0.45), (0, 0.52), wood),
        block((near + 0.06, near + stand - 0.06), (0.45, 0.47), (0.12, 0.42), scale(wood, 1.5)),
        block((near + 0.17, near + stand - 0.17), (0.16, 0.30), (0.52, 0.68), CHARCOAL),
        block((near + 0.09, near + stand - 0.09), (0.08, 0.38), (0.68, 0.94), LAMP, None, 0.85),
    ]
    return Piece(near + stand, length + 0.02, 1.2, tuple(boxes))


def wardrobe(rng: np.random.Generator) -> Piece:
    """Build a tall cupboard with two doors."""
    width, height = rng.uniform(1.3, 1.8), rng.uniform(1.95, 2.15)
    wood = pick((*WOODS, CREAM), rng)
    half = width / 2
    front = scale(wood, 1.25)
    boxes = [block((0, width), (0, 0.56), (0, height), scale(wood, 0.7))]
    for start in (0.06, half + 0.04):
        end = start + half - 0.10
        boxes.append(block((start, end), (0.56, 0.59), (0.12, height - 0.07), front))
        grip = end - 0.12 if start < half else start + 0.03
        boxes.append(block((grip, grip + 0.09), (0.59, 0.62), (0.85, 1.2), CHARCOAL))
    return Piece(width, 0.62, height, tuple(boxes))


def sofa(rng: np.random.Generator, cloth: Rgb, accent: Rgb) -> Piece:
    """Build a sofa of two or three seats, with a painting on the wall above it."""
    width, depth = rng.uniform(1.9, 2.4), rng.uniform(0.9, 1.0)
    arm, back = 0.24, rng.uniform(0.8, 0.92)
    boxes = [
        block((0, width), (0.02, depth - 0.05), (0.06, 0.30), scale(cloth, 0.8)),
        block((0, width), (0.02, 0.28), (0.06, back), scale(cloth, 0.95)),
        block((0, arm), (0.02, depth), (0.06, 0.62), cloth),
        block((width - arm, width), (0.02, depth), (0.06, 0.62), cloth),
    ]
    seats = int(rng.integers(2, 4))
    step = (width - 2 * arm) / seats
    for index in range(seats):
        start = arm + index * step
        boxes.append(
            block(
                (start + 0.02, start + step - 0.02), (0.26, depth), (0.3, 0.46), scale(cloth, 1.2)
            )
        )
    for start in (arm + 0.06, width - arm - 0.5):
        boxes.append(block((start, start + 0.44), (0.28, 0.44), (0.46, 0.82), accent))
    art = rng.uniform(0.8, 1.3)
    left = (width - art) / 2
    low, high = 1.25, rng.uniform(1.75, 1.95)
    sky, ground = pick(BOOKS, rng), pick(BOOKS, rng)
    boxes += [
        block((left, left + art), (0, 0.03), (low, high), scale(WHITE, 0.95)),
        block((left + 0.1, left + art - 0.1), (0.03, 0.05), (low + 0.1, high - 0.1), ground, sky),
    ]
    return Piece(width, depth, high, tuple(boxes))


def low_table(rng: np.random.Generator) -> Piece:
    """Build a coffee table on two slabs, standing on a rug that belongs to another piece."""
    width, depth = rng.uniform(0.9, 1.2), rng.uniform(0.5, 0.6)
    wood = pick(WOODS, rng)
    boxes = (
        block((0.05, 0.17), (0.05, depth - 0.05), (0, 0.34), scale(wood, 0.75)),
        block((width - 0.17, width - 0.05), (0.05, depth - 0.05), (0, 0.34), scale(wood, 0.75)),
        block((0, width), (0, depth), (0.34, 0.42), wood),
        block((0.25, 0.55), (0.12, 0.36), (0.42, 0.48), pick(BOOKS, rng)),
    )
    return Piece(width, depth, 0.48, boxes)


def television(rng: np.random.Generator) -> Piece:
    """Build a wide dark screen above a low cupboard."""
    width, screen = rng.uniform(1.7, 2.1), rng.uniform(1.3, 1.6)
    wood = pick((*WOODS, WHITE), rng)
    left = (width - screen) / 2
    low = 0.62
    high = low + screen * 0.57
    middle = width / 2
    boxes = (
        block((0, width), (0.02, 0.42), (0.04, 0.46), wood),
        block((0.07, middle - 0.04), (0.42, 0.44), (0.12, 0.38), scale(wood, 0.7)),
        block((middle + 0.04, width - 0.07), (0.42, 0.44), (0.12, 0.38), scale(wood, 0.7)),
        block((middle - 0.3, middle + 0.3), (0.12, 0.26), (0.46, 0.62), DARK),
        block((left, left + screen), (0.14, 0.22), (low, high), DARK),
        block(
            (left + 0.06, left + screen - 0.06),
            (0.22, 0.23),
            (low + 0.06, high - 0.06),
            (0.03, 0.04, 0.06),
            (0.10, 0.13, 0.18),
            0.6,
        ),
    )
    return Piece(width, 0.44, high, boxes)


def floor_lamp(rng: np.random.Generator) -> Piece:
    """Build a standing lamp with a big glowing shade."""
    height = rng.uniform(1.55, 1.75)
    boxes = (
        block((0.08, 0.38), (0.08, 0.38), (0, 0.06), CHARCOAL),
        block((0.18, 0.28), (0.18, 0.28), (0.06, height - 0.35), CHARCOAL),
        block((0.02, 0.44), (0.02, 0.44), (height - 0.38, height), LAMP, (1.0, 0.93, 0.76), 0.9),
    )
    return Piece(0.46, 0.46, height, boxes)


def kitchen_row(rng: np.random.Generator, length: float) -> Piece:
    """Build counter, stove, upper cabinets and fridge filling a wall of the given length."""
    front = pick((WHITE, CREAM, (0.58, 0.40, 0.22), (0.36, 0.44, 0.46)), rng)
    slab = pick(((0.10, 0.10, 0.11), (0.34, 0.22, 0.12)), rng)
    fridge = rng.uniform(0.7, 0.8)
    start = fridge + 0.06
    cook = float(rng.uniform(start + 0.75, length - 1.35))
    boxes = [
        block((0, fridge), (0, 0.66), (0, 1.9), scale(STEEL, 0.7)),
        block((0.03, fridge - 0.03), (0.66, 0.70), (0.06, 1.14), STEEL, scale(STEEL, 1.2)),
        block((0.03, fridge - 0.03), (0.66, 0.70), (1.22, 1.86), STEEL, scale(STEEL, 1.2)),
        block((fridge - 0.16, fridge - 0.07), (0.70, 0.74), (0.65, 1.05), CHARCOAL),
        block((fridge - 0.16, fridge - 0.07), (0.70, 0.74), (1.3, 1.6), CHARCOAL),
        block((start, length), (0, 0.56), (0, 0.86), scale(front, 0.55)),
        block((start, length), (0, 0.64), (0.86, 0.94), slab),
        block((start, length), (0, 0.02), (0.94, 1.45), scale(WHITE, 0.92)),
        # Stove: dark top, dark oven front with a lighter window, steel hood.
        block((cook, cook + 0.62), (0.06, 0.60), (0.94, 0.97), DARK),
        block((cook, cook + 0.62), (0.56, 0.62), (0.08, 0.84), CHARCOAL),
        block((cook + 0.1, cook + 0.52), (0.62, 0.63), (0.2, 0.56), (0.30, 0.18, 0.10)),
        block((cook, cook + 0.62), (0, 0.46), (1.55, 1.72), scale(STEEL, 0.9)),
        block((cook + 0.16, cook + 0.46), (0, 0.3), (1.72, 2.2), STEEL),
    ]
    for low, high in ((start, cook - 0.02), (cook + 0.64, length)):
        boxes.append(block((low, high), (0, 0.33), (1.45, 2.15), scale(front, 0.55)))
        doors = max(1, round((high - low) / 0.6))
        step = (high - low) / doors
        for index in range(doors):
            u = (low + index * step + 0.035, low + (index + 1) * step - 0.035)
            boxes.append(block(u, (0.56, 0.60), (0.1, 0.82), front))
            boxes.append(block(u, (0.33, 0.37), (1.49, 2.11), front))
    sink = (start + 0.12, start + 0.6)
    boxes.append(block(sink, (0.14, 0.52), (0.94, 0.955), scale(STEEL, 1.3)))
    boxes.append(block((start + 0.31, start + 0.41), (0.06, 0.22), (0.94, 1.2), STEEL))
    return Piece(length, 0.74, 2.2, tuple(boxes))


def chair(u: float, d: float, back_high: bool, color: Rgb) -> list[Box]:
    """Build a kitchen chair of 0.44 m by 0.42 m whose back is on its far or its near d side."""
    back = (d + 0.34, d + 0.42) if back_high else (d, d + 0.08)
    legs = scale(color, 0.6)
    return [
        block((u, u + 0.1), (d, d + 0.42), (0, 0.42), legs),
        block((u + 0.34, u + 0.44), (d, d + 0.42), (0, 0.42), legs),
        block((u, u + 0.44), (d, d + 0.42), (0.42, 0.48), color),
        block((u, u + 0.44), back, (0.48, 0.92), color),
    ]


def dining(rng: np.random.Generator, accent: Rgb) -> Piece:
    """Build a table with chairs pushed halfway under its two long sides."""
    pairs = int(rng.integers(1, 3))
    width = 0.8 if pairs == 1 else rng.uniform(1.2, 1.4)
    depth, out = 0.75, 0.3
    wood = pick(WOODS, rng)
    seat = accent if rng.random() < 0.5 else pick(WOODS, rng)
    near, far = out, out + depth
    boxes = [block((0, width), (near, far), (0.70, 0.77), scale(wood, 1.15))]
    for u in (0.02, width - 0.12):
        for d in (near + 0.02, far - 0.12):
            boxes.append(block((u, u + 0.1), (d, d + 0.1), (0, 0.70), scale(wood, 0.8)))
    for index in range(pairs):
        u = (index + 0.5) * width / pairs - 0.22
        boxes += chair(u, 0.0, False, seat)
        boxes += chair(u, far + out - 0.42, True, seat)
    middle = width / 2
    boxes.append(
        block(
            (middle - 0.15, middle + 0.15),
            (near + 0.24, far - 0.24),
            (0.77, 0.87),
            pick(((0.80, 0.45, 0.08), (0.55, 0.65, 0.15)), rng),
        )
    )
    return Piece(width, depth + 2 * out, 0.92, tuple(boxes))


def bathtub(rng: np.random.Generator, accent: Rgb) -> Piece:
    """Build a tub with water in it, and a curtain along a part of its open side."""
    width, depth, height = rng.uniform(1.65, 1.85), rng.uniform(0.76, 0.86), rng.uniform(0.55, 0.62)
    rim = 0.11
    water = (0.42, 0.68, 0.76)
    cloth = mix(accent, WHITE, rng.uniform(0.35, 0.6))
    veil = rng.uniform(0.4, 0.6)
    boxes = (
        block((0, width), (0, rim), (0, height), WHITE),
        block((0, width), (depth - rim, depth), (0, height), WHITE),
        block((0, rim), (0, depth), (0, height), WHITE),
        block((width - rim, width), (0, depth), (0, height), WHITE),
        block((rim, width - rim), (rim, depth - rim), (0, height - 0.14), water),
        block(
            (width - 0.26, width - 0.16), (depth / 2 - 0.1, depth / 2 + 0.1), (height, 0.82), STEEL
        ),
        block((0.0, veil), (depth, depth + 0.07), (0.2, 2.05), cloth),
        block((0.0, width), (depth, depth + 0.08), (2.05, 2.14), STEEL),
    )
    return Piece(width, depth + 0.08, 2.14, boxes)


def washstand(rng: np.random.Generator) -> Piece:
    """Build a cabinet with a basin, and a bright mirror above it."""
    width = rng.uniform(0.85, 1.15)
    wood = pick((*WOODS, (0.36, 0.44, 0.46)), rng)
    middle = width / 2
    glass = (0.70, 0.86, 0.94)
    boxes = (
        block((0, width), (0, 0.46), (0.1, 0.78), scale(wood, 0.75)),
        block((0.05, middle - 0.03), (0.46, 0.48), (0.16, 0.72), scale(wood, 1.2)),
        block((middle + 0.03, width - 0.05), (0.46, 0.48), (0.16, 0.72), scale(wood, 1.2)),
        block((-0.02, width + 0.02), (0, 0.52), (0.78, 0.92), WHITE),
        block((middle - 0.26, middle + 0.26), (0.14, 0.44), (0.92, 0.93), (0.58, 0.66, 0.70)),
        block((middle - 0.06, middle + 0.06), (0.03, 0.18), (0.92, 1.1), STEEL),
        block((0.02, width - 0.02), (0, 0.03), (1.2, 2.02), scale(STEEL, 0.6)),
        block((0.1, width - 0.1), (0.03, 0.05), (1.28, 1.94), glass, (0.50, 0.74, 0.88), 0.8),
        block((0.12, width - 0.12), (0.0, 0.14), (2.06, 2.18), LAMP, None, 0.95),
    )
    return Piece(width, 0.52, 2.18, boxes)


def toilet(_: np.random.Generator) -> Piece:
    """Build a toilet: bowl with a lid, and its tank."""
    boxes = (
        block((0.0, 0.5), (0.0, 0.2), (0.36, 0.86), WHITE),
        block((0.17, 0.33), (0.04, 0.16), (0.86, 0.90), STEEL),
        block((0.1, 0.4), (0.06, 0.56), (0.0, 0.34), scale(WHITE, 0.9)),
        block((0.05, 0.45), (0.18, 0.68), (0.34, 0.46), WHITE),
    )
    return Piece(0.5, 0.68, 0.9, boxes)


def towel(rng: np.random.Generator, accent: Rgb) -> Piece:
    """Build a towel hanging on the wall from a rail."""
    width = rng.uniform(0.5, 0.7)
    boxes = (
        block((0, width), (0, 0.08), (1.42, 1.5), STEEL),
        block((0.06, width - 0.06), (0.01, 0.1), (0.75, 1.46), accent),
    )
    return Piece(width, 0.1, 1.5, boxes)


def desk(rng: np.random.Generator) -> Piece:
    """Build a desk against the wall with a monitor, a keyboard and drawers on one side."""
    width, depth = rng.uniform(1.5, 1.8), rng.uniform(0.7, 0.8)
    wood = pick((*WOODS, WHITE), rng)
    middle = width / 2 + rng.uniform(-0.1, 0.1)
    wide = rng.uniform(0.37, 0.46)
    screen = ((0.42, 0.72, 0.92), (0.16, 0.42, 0.78))
    boxes = (
        block((0, width), (0, depth), (0.70, 0.77), wood),
        block((0.02, 0.12), (0.03, depth - 0.05), (0, 0.70), scale(wood, 0.7)),
        block((width - 0.48, width - 0.02), (0.03, depth - 0.05), (0, 0.70), scale(wood, 0.7)),
        block(
            (width - 0.43, width - 0.07),
            (depth - 0.05, depth - 0.03),
            (0.08, 0.33),
            scale(wood, 1.1),
        ),
        block(
            (width - 0.43, width - 0.07),
            (depth - 0.05, depth - 0.03),
            (0.4, 0.65),
            scale(wood, 1.1),
        ),
        block((middle - 0.17, middle + 0.17), (0.1, 0.32), (0.77, 0.80), CHARCOAL),
        block((middle - 0.06, middle + 0.06), (0.14, 0.2), (0.8, 0.95), CHARCOAL),
        block((middle - wide, middle + wide), (0.17, 0.24), (0.9, 1.42), DARK),
        block(
            (middle - wide + 0.06, middle + wide - 0.06),
            (0.24, 0.25),
            (0.96, 1.36),
            *screen,
            glow=0.9,
        ),
        block((middle - 0.25, middle + 0.25), (0.42, 0.60), (0.77, 0.79), (0.2, 0.21, 0.23)),
        block((0.14, 0.3), (0.2, 0.36), (0.77, 0.95), pick(BOOKS, rng)),
    )
    return Piece(width, depth, 1.42, boxes)


def desk_chair(rng: np.random.Generator) -> Piece:
    """Build an office chair turned to the wall: its back is on the far side."""
    cloth = pick((CHARCOAL, (0.14, 0.16, 0.20)), rng)
    boxes = (
        block((0.02, 0.54), (0.2, 0.32), (0, 0.08), DARK),
        block((0.22, 0.34), (0.0, 0.52), (0, 0.08), DARK),
        block((0.22, 0.34), (0.2, 0.32), (0.08, 0.42), scale(STEEL, 0.6)),
        block((0.03, 0.53), (0.02, 0.5), (0.42, 0.53), scale(cloth, 1.3)),
        block((0.05, 0.51), (0.48, 0.56), (0.56, 1.08), cloth),
        block((0.22, 0.34), (0.49, 0.55), (0.46, 0.6), DARK),
    )
    return Piece(0.56, 0.56, 1.08, boxes)


def bookshelf(rng: np.random.Generator) -> Piece:
    """Build a tall shelf with broad blocks of books."""
    width, height, levels = rng.uniform(1.0, 1.6), rng.uniform(1.85, 2.1), 4
    wood = pick(WOODS, rng)
    depth, board = 0.34, 0.08
    boxes = [
        block((0, width), (0, 0.05), (0, height), scale(wood, 0.45)),
        block((0, board), (0, depth), (0, height), wood),
        block((width - board, width), (0, depth), (0, height), wood),
    ]
    step = (height - board) / levels
    for level in range(levels + 1):
        low = level * step
        boxes.append(block((board, width - board), (0, depth), (low, low + board), wood))
        if level == levels:
            break
        start, end = board, width - board
        while start < end - 0.12:
            stop = min(start + rng.uniform(0.14, 0.34), end)
            if rng.random() < 0.85:
                tall = low + board + rng.uniform(0.65, 0.95) * (step - board)
                boxes.append(
                    block((start, stop), (0.05, 0.28), (low + board, tall), pick(BOOKS, rng))
                )
            start = stop
    return Piece(width, depth, height, tuple(boxes))


def plant(rng: np.random.Generator) -> Piece:
    """Build a big potted plant."""
    height = rng.uniform(1.1, 1.45)
    leaf = jitter(LEAF, rng, 0.1, 0.2)
    pot = pick(((0.60, 0.28, 0.16), WHITE, CHARCOAL), rng)
    boxes = (
        block((0.12, 0.48), (0.12, 0.48), (0, 0.38), pot),
        block((0.25, 0.35), (0.25, 0.35), (0.38, 0.7), WOODS[1]),
        block((0.04, 0.56), (0.04, 0.56), (0.58, height - 0.25), leaf),
        block((0.14, 0.46), (0.14, 0.46), (height - 0.25, height), scale(leaf, 1.3)),
    )
    return Piece(0.6, 0.6, height, boxes)


def window(rng: np.random.Generator, low: float, widest: float) -> Piece:
    """Build a framed window whose lower edge is `low` metres up."""
    width, high = rng.uniform(0.7 * widest, widest), rng.uniform(2.05, 2.2)
    middle = width / 2
    frame = scale(WHITE, 1.05)
    boxes = (
        block((0, width), (0, 0.05), (low, high), frame),
        block((0.11, middle - 0.05), (0.05, 0.06), (low + 0.11, high - 0.11), SKY_LOW, SKY_HIGH, 1),
        block(
            (middle + 0.05, width - 0.11),
            (0.05, 0.06),
            (low + 0.11, high - 0.11),
            SKY_LOW,
            SKY_HIGH,
            1,
        ),
        block((-0.06, width + 0.06), (0, 0.14), (low - 0.07, low + 0.02), frame),
    )
    return Piece(width, 0.5, high, boxes)


def door(rng: np.random.Generator) -> Piece:
    """Build a closed door in its frame."""
    wood = pick((*WOODS, (0.66, 0.54, 0.40)), rng)
    width, high = rng.uniform(0.98, 1.1), rng.uniform(2.05, 2.15)
    inset = scale(wood, 0.8)
    boxes = (
        block((0, width), (0, 0.04), (0, high), scale(WHITE, 0.95)),
        block((0.1, width - 0.1), (0.04, 0.06), (0, high - 0.1), wood),
        block((0.24, width - 0.24), (0.06, 0.07), (0.25, 0.85), inset),
        block((0.24, width - 0.24), (0.06, 0.07), (1.1, high - 0.3), inset),
        block((width - 0.22, width - 0.13), (0.06, 0.12), (0.93, 1.03), STEEL),
    )
    return Piece(width, 0.75, high, boxes)


# ------------------------------------------------------------------------------------------ layout


def to_room(low: Vec, high: Vec, wall: int, size: Vec) -> tuple[Vec, Vec]:
    """Move a box's corners from the frame of a wall to the room frame."""
    width, depth, _ = size
    if wall == 0:
        x, y = (low[0], high[0]), (low[1], high[1])
    elif wall == 1:
        x, y = (width - high[1], width - low[1]), (low[0], high[0])
    elif wall == 2:
        x, y = (width - high[0], width - low[0]), (depth - high[1], depth - low[1])
    else:
        x, y = (low[1], high[1]), (depth - high[0], depth - low[0])
    return (x[0], y[0], low[2]), (x[1], y[1], high[2])


def mirrored(piece: Piece) -> Piece:
    """Return the piece with left and right exchanged."""
    boxes = tuple(
        replace(
            box,
            low=(piece.width - box.high[0], *box.low[1:]),
            high=(piece.width - box.low[0], *box.high[1:]),
        )
        for box in piece.boxes
    )
    return replace(piece, boxes=boxes)


@dataclass
class Layout:
    """A room being furnished.

    Attributes:
        size: width, depth and height in metres.
        accent: linear RGB for textiles.
        rng: source of every choice.
        boxes: what has been placed, room frame.
        zones: space taken, room frame.
        missing: number of wanted pieces that found no place.
    """

    size: Vec
    accent: Rgb
    rng: np.random.Generator
    boxes: list[Box] = field(default_factory=list)
    zones: list[Zone] = field(default_factory=list)
    missing: int = 0

    def length(self, wall: int) -> float:
        """Return the length of a wall in metres."""
        return self.size[wall % 2]

    def reach(self, wall: int) -> float:
        """Return the distance in metres from a wall to the opposite one."""
        return self.size[1 - wall % 2]

    def turned(self, piece: Piece) -> Piece:
        """Return the piece as it is or mirrored, with equal probability."""
        return mirrored(piece) if self.rng.random() < 0.5 else piece

    def zone(self, piece: Piece, spot: Spot, rise: float = 0.0, solid: bool = True) -> Zone:
        """Return the space a piece takes at a spot, from `rise` metres up."""
        low = (spot.u, spot.d, rise)
        high = (spot.u + piece.width, spot.d + piece.depth, piece.height)
        return Zone(*to_room(low, high, spot.wall, self.size), solid)

    def free(self, zone: Zone) -> bool:
        """Return True if a zone is inside the room and touches no other."""
        inside = all(zone.low[i] >= -TINY and zone.high[i] <= self.size[i] + TINY for i in range(3))
        return inside and not any(
            all(zone.low[i] < other.high[i] and other.low[i] < zone.high[i] for i in range(3))
            for other in self.zones
        )

    def set_down(self, piece: Piece, spot: Spot, zone: Zone | None) -> None:
        """Add a piece's boxes at a spot, and the zone it takes if it takes any."""
        for box in piece.boxes:
            low = (box.low[0] + spot.u, box.low[1] + spot.d, box.low[2])
            high = (box.high[0] + spot.u, box.high[1] + spot.d, box.high[2])
            low, high = to_room(low, high, spot.wall, self.size)
            self.boxes.append(replace(box, low=low, high=high))
        if zone is not None:
            self.zones.append(zone)

    def spots(self, piece: Piece, walls: Sequence[int], afield: bool) -> Iterator[Spot]:
        """Yield random spots along the walls, or anywhere in the room if `afield`."""
        for wall in walls:
            room_u = self.length(wall) - piece.width
            room_d = self.reach(wall) - piece.depth
            if room_u < 0 or room_d < 0:
                continue
            for _ in range(16):
                u = float(self.rng.uniform(0, room_u))
                d = float(self.rng.uniform(0, room_d)) if afield else 0.0
                # A narrow slot beside a corner looks like a mistake: close it.
                if u < 0.25:
                    u = 0.0
                elif room_u - u < 0.25:
                    u = room_u
                yield Spot(wall, u, d)

    def put(
        self,
        piece: Piece,
        walls: Sequence[int] | None = None,
        wanted: bool = True,
        afield: bool = False,
        rise: float = 0.0,
        solid: bool = True,
    ) -> Spot | None:
        """Place a piece at the first free random spot.

        Args:
            piece: what to place; may be mirrored.
            walls: walls to try, in order; all of them in random order if None.
            wanted: count the piece as missing when there is no place.
            afield: allow spots away from the walls.
            rise: height in metres below which the piece leaves space for others.
            solid: whether the camera has to stay clear of it.

        Returns:
            Where it stands, or None.
        """
        order = [int(w) for w in self.rng.permutation(WALLS)] if walls is None else walls
        piece = self.turned(piece)
        for spot in self.spots(piece, order, afield):
            zone = self.zone(piece, spot, rise, solid)
            if self.free(zone):
                self.set_down(piece, spot, zone)
                return spot
        self.missing += wanted
        return None

    def put_before(self, piece: Piece, base: Spot, behind: Piece, gap: float, shift: float) -> None:
        """Place a piece in front of another, `shift` metres off its middle."""
        u = base.u + (behind.width - piece.width) / 2 + shift
        spot = Spot(base.wall, u, base.d + behind.depth + gap)
        zone = self.zone(piece, spot)
        if self.free(zone):
            self.set_down(piece, spot, zone)
        else:
            self.missing += 1

    def rug(self, spot: Spot, middle: tuple[float, float], half: tuple[float, float]) -> None:
        """Lay a rug with a border, centred at (u, d) relative to a spot."""
        u, d = spot.u + middle[0], spot.d + middle[1]
        reach_u, reach_d = self.length(spot.wall), self.reach(spot.wall)
        pale = mix(self.accent, WHITE, 0.55)
        for inset, color, top in ((0.0, scale(self.accent, 1.1), 0.015), (0.16, pale, 0.025)):
            ranges = [
                (max(0.1, m - h) + inset, min(end - 0.1, m + h) - inset)
                for m, h, end in ((u, half[0], reach_u), (d, half[1], reach_d))
            ]
            if any(b - a < 0.3 for a, b in ranges):
                return
            flat = Piece(0, 0, top, (block(ranges[0], ranges[1], (0, top), color),))
            self.set_down(flat, Spot(spot.wall, 0, 0), None)


def openings(layout: Layout, busy: int, low: float, widest: float) -> Spot | None:
    """Put the window and the door on walls other than the busy one.

    Returns:
        Where the window is, or None if it found no place.
    """
    rng = layout.rng
    others = [wall for wall in (int(w) for w in rng.permutation(WALLS)) if wall != busy]
    spot = layout.put(window(rng, low, widest), others, rise=low - 0.1, solid=False)
    taken = -1 if spot is None else spot.wall
    layout.put(door(rng), sorted(others, key=lambda wall: wall == taken), solid=False)
    return spot


def furnish_bedroom(layout: Layout) -> Spot | None:
    """Furnish a bedroom: bed with rug and nightstand, wardrobe, and sometimes a plant."""
    rng = layout.rng
    piece = bed(rng, layout.accent)
    spot = layout.put(piece)
    if spot is None:
        return None
    light = openings(layout, spot.wall, 0.95, 2.0)
    middle = (piece.width / 2, piece.depth - 0.2)
    layout.rug(spot, middle, (piece.width / 2 + 0.1, rng.uniform(0.7, 0.9)))
    layout.put(wardrobe(rng))
    if rng.random() < 0.3:
        layout.put(plant(rng), wanted=False)
    return light


def furnish_living_room(layout: Layout) -> Spot | None:
    """Furnish a living room: sofa, low table on a rug, television, lamp, and often a plant."""
    rng = layout.rng
    cloth = layout.accent if rng.random() < 0.6 else pick(((0.42, 0.40, 0.38), CREAM), rng)
    cushion = pick(((0.80, 0.62, 0.30), WHITE, (0.62, 0.36, 0.22)), rng)
    piece = sofa(rng, cloth, cushion)
    spot = layout.put(piece)
    if spot is None:
        return None
    table = low_table(rng)
    gap = rng.uniform(0.3, 0.4)
    layout.put_before(table, spot, piece, gap, 0.0)
    across = (spot.wall + 2) % WALLS
    layout.put(television(rng), (across, (across + 1) % WALLS, (across + 3) % WALLS))
    light = openings(layout, spot.wall, 0.7, 2.4)
    middle = (piece.width / 2, piece.depth + gap + table.depth / 2 - 0.1)
    layout.rug(spot, middle, (rng.uniform(1.1, 1.3), rng.uniform(0.75, 0.9)))
    layout.put(floor_lamp(rng), (spot.wall, across, (across + 1) % WALLS, (across + 3) % WALLS))
    if rng.random() < 0.6:
        layout.put(plant(rng), wanted=False)
    return light


def furnish_kitchen(layout: Layout) -> Spot | None:
    """Furnish a kitchen: a full wall of kitchen cabinets, and a dining table."""
    rng = layout.rng
    wall = int(rng.integers(WALLS))
    layout.put(kitchen_row(rng, layout.length(wall)), (wall,))
    light = openings(layout, wall, 1.0, 1.7)
    layout.put(dining(rng, layout.accent), afield=True)
    return light


def furnish_bathroom(layout: Layout) -> Spot | None:
    """Furnish a bathroom: bathtub, washstand with mirror, toilet, a towel and a bath mat."""
    rng = layout.rng
    tub = bathtub(rng, layout.accent)
    spot = layout.put(tub)
    if spot is None:
        return None
    light = openings(layout, spot.wall, 1.3, 1.2)
    layout.put(washstand(rng))
    layout.put(toilet(rng))
    layout.rug(spot, (tub.width / 2, tub.depth + 0.45), (0.5, 0.36))
    layout.put(towel(rng, layout.accent), wanted=False, solid=False)
    return light


def furnish_office(layout: Layout) -> Spot | None:
    """Furnish an office: desk with monitor and chair, one or two bookshelves, and often a plant."""
    rng = layout.rng
    piece = desk(rng)
    spot = layout.put(piece)
    if spot is None:
        return None
    seat = desk_chair(rng)
    layout.put_before(seat, spot, piece, rng.uniform(0.0, 0.15), rng.uniform(-0.45, 0.45))
    light = openings(layout, spot.wall, 0.95, 1.9)
    layout.put(bookshelf(rng))
    if rng.random() < 0.6:
        layout.put(bookshelf(rng), wanted=False)
    if rng.random() < 0.7:
        layout.put(plant(rng), wanted=False)
    return light


FURNISH: Mapping[str, Callable[[Layout], Spot | None]] = MappingProxyType(
    {
        "bedroom": furnish_bedroom,
        "living room": furnish_living_room,
        "kitchen": furnish_kitchen,
        "bathroom": furnish_bathroom,
        "office": furnish_office,
    }
)


def clearance(x: float, y: float, layout: Layout) -> float:
    """Return the metres between a point of the plan and the nearest furniture.

    Walls count as if they were nearer than they are, since a wall that fills half of the image
    hides the room.
    """
    best = min(x, layout.size[0] - x, y, layout.size[1] - y) - 0.55
    for zone in layout.zones:
        if zone.solid:
            across = max(zone.low[0] - x, x - zone.high[0], 0.0)
            along = max(zone.low[1] - y, y - zone.high[1], 0.0)
            best = min(best, float(np.hypot(across, along)))
    return best


def remoteness(x: float, y: float, layout: Layout) -> float:
    """Return the mean distance in metres from a point of the plan to the furniture's centres."""
    solid = [zone for zone in layout.zones if zone.solid]
    return sum(
        float(np.hypot((zone.low[0] + zone.high[0]) / 2 - x, (zone.low[1] + zone.high[1]) / 2 - y))
        for zone in solid
    ) / max(len(solid), 1)


def stand(layout: Layout) -> tuple[float, float, float]:
    """Choose where the camera stands.

    Returns:
        x and y in the room frame, and the clearance there, all in metres.
    """
    best = (layout.size[0] / 2, layout.size[1] / 2, -1.0)
    clear: list[tuple[float, float, float]] = []
    for _ in range(60):
        x = float(layout.rng.uniform(0.2, 0.8) * layout.size[0])
        y = float(layout.rng.uniform(0.2, 0.8) * layout.size[1])
        if max(abs(x - layout.size[0] / 2), abs(y - layout.size[1] / 2)) < 0.4:
            continue  # right below the lamp, which would cover the whole upper edge
        room = clearance(x, y, layout)
        if room >= CLEAR:
            clear.append((x, y, room))
        elif room > best[2]:
            best = (x, y, room)
        if len(clear) == CHOICES:
            break
    # Of the good places the one amid the furniture: far furniture is only a few pixels high.
    return min(clear, key=lambda place: remoteness(place[0], place[1], layout), default=best)


def lay_out(
    room: Room, accent: Rgb, rng: np.random.Generator
) -> tuple[Layout, Spot, tuple[float, float]]:
    """Furnish a room, starting over while pieces are missing or the camera is hemmed in.

    Returns:
        The furnished layout, the window's spot, and the camera's x and y in metres.
    """
    least, most = SIDES[room.kind]
    best: tuple[float, Layout, Spot, tuple[float, float]] | None = None
    attempt = 0
    while best is None or attempt < ATTEMPTS:
        attempt += 1
        width, depth = rng.uniform(least, most, 2)
        layout = Layout((float(width), float(depth), float(rng.uniform(2.4, 3.0))), accent, rng)
        light = FURNISH[room.kind](layout)
        x, y, room_left = stand(layout)
        if light is None or room_left < 0.1:
            continue
        score = min(room_left, CLEAR) - layout.missing
        if best is None or score > best[0]:
            best = (score, layout, light, (x, y))
        if score >= CLEAR:
            break
    return best[1], best[2], best[3]


def ceiling_lamp(size: Vec) -> Box:
    """Return a flat glowing lamp in the middle of the ceiling."""
    x, y, top = size[0] / 2, size[1] / 2, size[2]
    return Box(
        (x - 0.25, y - 0.25, top - 0.1), (x + 0.25, y + 0.25, top), (1.0, 0.97, 0.88), None, 0.9
    )


def build(room: Room, rng: np.random.Generator) -> Scene:
    """Return a random scene of the wanted kind and colour."""
    hue = 0.012 if room.color == "white" else 0.045
    wall = jitter(COLORS[room.color], rng, hue, 0.08)
    accent = accent_of(wall, rng)
    layout, light, (x, y) = lay_out(room, accent, rng)
    glass = Box((light.u + 0.6, 0.1, 1.5), (light.u + 0.6, 0.1, 1.5), SKY_LOW)
    center, _ = to_room(glass.low, glass.high, light.wall, layout.size)
    facing = ((0.0, 1.0, 0.0), (-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (1.0, 0.0, 0.0))[light.wall]
    return Scene(
        size=layout.size,
        boxes=(*layout.boxes, ceiling_lamp(layout.size)),
        zones=tuple(zone for zone in layout.zones if zone.solid),
        camera=(x, y, float(rng.uniform(1.3, 1.6))),
        yaw=float(rng.uniform(0, 2 * np.pi)),
        wall=wall,
        floor=pick(FLOORS[room.kind], rng),
        ceiling=mix(WHITE, wall, 0.15),
        window=center,
        facing=facing,
    )


# --------------------------------------------------------------------------------------- rendering


@dataclass(frozen=True)
class Rays:
    """The directions of an image's rays, per unit of horizontal range.

    Attributes:
        east: (width,) change of x, in [-1, 1].
        north: (width,) change of y, in [-1, 1].
        rise: (height,) change of z, the tangent of the elevation.
    """

    east: Plane
    north: Plane
    rise: Plane


@dataclass(frozen=True)
class Hits:
    """The surfaces that rays meet first.

    Attributes:
        reach: (height, width) horizontal range in metres.
        surface: (height, width) index of the surface: 2 * axis + (1 on the high side) for the
            room's own six faces, then 6 + 3 * box + axis.
    """

    reach: Plane
    surface: NDArray[np.int16]


@dataclass(frozen=True)
class Surfaces:
    """Properties by surface index: colour (n, 3), unit normal (n, 3) and glow (n,)."""

    color: Plane
    normal: Plane
    glow: Plane


def aim(width: int, height: int, yaw: float) -> Rays:
    """Return the rays through the centres of an equirectangular image's pixels."""
    azimuth = 2 * np.pi * (np.arange(width) + 0.5) / width + yaw
    elevation = np.pi / 2 - np.pi * (np.arange(height) + 0.5) / height
    return Rays(*(nonzero(f) for f in (np.sin(azimuth), np.cos(azimuth), np.tan(elevation))))


def nonzero(values: NDArray[np.float64]) -> Plane:
    """Return the values as float32 with those near zero moved off it, to be divided by."""
    moved = np.where(np.abs(values) < TINY, TINY, values)
    return moved.astype(np.float32)


def slab(low: float, high: float, start: float, step: Plane) -> tuple[Plane, Plane]:
    """Return the ranges at which rays enter and leave the space between two parallel planes."""
    first, second = (low - start) / step, (high - start) / step
    return np.minimum(first, second), np.maximum(first, second)


def runs(flags: NDArray[np.bool_]) -> list[slice]:
    """Return the slices of a 1-D array in which the flags are set."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def trace_room(scene: Scene, rays: Rays) -> Hits:
    """Return the surfaces that the rays meet in the empty room."""
    (x, y, z), (width, depth, height) = scene.camera, scene.size
    _, far_x = slab(0, width, x, rays.east)
    _, far_y = slab(0, depth, y, rays.north)
    _, far_z = slab(0, height, z, rays.rise)
    side = np.where(far_x < far_y, 0 + (rays.east > 0), 2 + (rays.north > 0)).astype(np.int16)
    flat = (4 + (rays.rise > 0)).astype(np.int16)
    far = np.minimum(far_x, far_y)
    surface = np.where(far[None] < far_z[:, None], side[None], flat[:, None])
    return Hits(np.minimum(far[None], far_z[:, None]), surface)


def trace(scene: Scene, rays: Rays) -> Hits:
    """Return the surfaces that the rays meet first in the furnished room."""
    hits = trace_room(scene, rays)
    x, y, z = scene.camera
    for index, box in enumerate(scene.boxes):
        near_x, far_x = slab(box.low[0], box.high[0], x, rays.east)
        near_y, far_y = slab(box.low[1], box.high[1], y, rays.north)
        near_z, far_z = slab(box.low[2], box.high[2], z, rays.rise)
        near, far = np.maximum(near_x, near_y), np.minimum(far_x, far_y)
        columns = (near < far) & (far > 0)
        if not columns.any():
            continue
        first = 6 + 3 * index
        side = np.where(near_x > near_y, first, first + 1).astype(np.int16)
        # Only rows that can meet the box at some column: this skips most of the image.
        rows = (near_z < far[columns].max()) & (far_z > max(float(near[columns].min()), 0.0))
        for row in runs(rows):
            for column in runs(columns):
                over = near_z[row, None]
                enter = np.maximum(near[None, column], over)
                leave = np.minimum(far[None, column], far_z[row, None])
                reach, surface = hits.reach[row, column], hits.surface[row, column]
                met = (enter < leave) & (enter > 0) & (enter < reach)
                np.copyto(reach, enter, where=met)
                face = np.where(over > near[None, column], np.int16(first + 2), side[None, column])
                np.copyto(surface, face, where=met)
    return hits


def describe(scene: Scene) -> Surfaces:
    """Return the properties of every surface the camera can see."""
    color: list[Rgb] = [scene.wall] * 4 + [scene.floor, scene.ceiling]
    glow = [0.0] * 6
    normal = np.zeros((6 + 3 * len(scene.boxes), 3), np.float32)
    for axis in range(3):
        normal[2 * axis, axis], normal[2 * axis + 1, axis] = 1, -1
    for index, box in enumerate(scene.boxes):
        for axis in range(3):
            # Of two opposite faces a camera outside the box sees one at most.
            beyond = scene.camera[axis] > box.high[axis]
            normal[6 + 3 * index + axis, axis] = 1 if beyond else -1
            color.append(box.color)
            glow.append(box.glow)
    return Surfaces(np.array(color, np.float32), normal, np.array(glow, np.float32))


def lambert(
    point: Sequence[Plane], normal: Sequence[Plane], source: Vec, wrap: float, fade: float
) -> tuple[Plane, Sequence[Plane], Plane]:
    """Return the soft light a point source gives.

    Args:
        point: x, y and z of the lit points, metres, each (height, width).
        normal: components of their unit normals.
        source: the light's position, metres.
        wrap: how far the light reaches around edges, in [0, 1]; larger is softer.
        fade: distance in metres at which half of the light is left.

    Returns:
        Light in [0, 1]; the vector from the points to the source; its length.
    """
    ray = [np.float32(s) - p for s, p in zip(source, point, strict=True)]
    square = ray[0] * ray[0] + ray[1] * ray[1] + ray[2] * ray[2]
    length = np.sqrt(square) + np.float32(1e-3)
    facing = (ray[0] * normal[0] + ray[1] * normal[1] + ray[2] * normal[2]) / length
    light = np.maximum(facing + np.float32(wrap), 0) / np.float32(1 + wrap)
    return light / (1 + square * np.float32(1 / fade**2)), ray, length


def corner_shade(point: Sequence[Plane], normal: Sequence[Plane], size: Vec) -> Plane:
    """Return the darkening towards the room's edges and corners, in (0, 1]."""
    shade: Plane = np.ones_like(point[0])
    for axis, (depth, reach) in enumerate(((0.20, 0.45), (0.20, 0.45), (0.24, 0.40))):
        wall = np.minimum(point[axis], np.float32(size[axis]) - point[axis])
        # A face parallel to a wall is not in the corner that this wall makes.
        upright = 1 - np.abs(normal[axis])
        shade *= 1 - np.float32(depth) * upright * np.exp(wall * np.float32(-1 / reach))
    return shade


def contact_shade(point: Sequence[Plane], scene: Scene) -> Plane:
    """Return the soft shadow of the furniture on the floor, in (0, 1]; points are 1-D."""
    shade: Plane = np.ones_like(point[0])
    zero, spread = np.float32(0), np.float32(-1 / 0.28**2)
    for zone in scene.zones:
        if zone.low[2] > 0.1:
            continue
        low, high = np.array(zone.low, np.float32), np.array(zone.high, np.float32)
        x = np.maximum(np.maximum(low[0] - point[0], point[0] - high[0]), zero)
        y = np.maximum(np.maximum(low[1] - point[1], point[1] - high[1]), zero)
        shade *= 1 - np.float32(0.38) * np.exp((x * x + y * y) * spread)
    return shade


def paint(scene: Scene, rays: Rays, hits: Hits) -> Plane:
    """Return the light of every ray as (3, height, width) display values in [0, 1]."""
    table = describe(scene)
    reach, surface = hits.reach, hits.surface
    x, y, z = (np.float32(c) for c in scene.camera)
    point = (x + reach * rays.east, y + reach * rays.north, z + reach * rays.rise[:, None])
    normal = tuple(table.normal[:, axis][surface] for axis in range(3))
    width, depth, height = scene.size

    lamp, _, _ = lambert(point, normal, (width / 2, depth / 2, height - 0.35), 0.25, 3.2)
    sun, ray, length = lambert(point, normal, scene.window, 0.3, 2.6)
    ahead = -(ray[0] * np.float32(scene.facing[0]) + ray[1] * np.float32(scene.facing[1])) / length
    sun *= np.maximum(ahead + np.float32(0.35), 0)
    # Opposite and neighbouring faces differ a little, so that boxes read as solid anywhere.
    ambient = 0.50 + 0.035 * normal[0] - 0.05 * np.abs(normal[1]) + 0.09 * normal[2]
    shade = corner_shade(point, normal, scene.size)
    floor = (normal[2] > 0.5) & (point[2] < 0.04)
    shade[floor] *= contact_shade([p[floor] for p in point], scene)

    glow = table.glow[surface]
    lit = 1 - glow
    image = np.empty((3, *surface.shape), np.float32)
    bounce = mix((1, 1, 1), scale(scene.wall, 1 / max(scene.wall)), 0.12)
    color = surface_colors(scene, table, point[2], surface)
    for channel, (warm, cool) in enumerate(((0.54, 0.46), (0.52, 0.50), (0.47, 0.54))):
        light = ambient * np.float32(bounce[channel])
        light += lamp * np.float32(warm)
        light += sun * np.float32(cool)
        light *= shade
        image[channel] = color[channel] * (light * lit + glow)
    # A square root stands in for the display curve.
    return np.sqrt(np.clip(image, 0, 1, out=image), out=image)


def surface_colors(
    scene: Scene, table: Surfaces, level: Plane, surface: NDArray[np.int16]
) -> list[Plane]:
    """Return the three channels of the colour of every point, before any light."""
    color = [table.color[:, channel][surface] for channel in range(3)]
    for index, box in enumerate(scene.boxes):
        if box.top is None:
            continue
        # Read as unsigned, an index below the box's own is a large number: one test, not two.
        rows, columns = np.nonzero((surface - np.int16(6 + 3 * index)).view(np.uint16) < 3)
        share = (level[rows, columns] - box.low[2]) / (box.high[2] - box.low[2])
        for channel in range(3):
            change = box.top[channel] - box.color[channel]
            color[channel][rows, columns] = box.color[channel] + share * change
    return color


def render(
    room: Room,
    rng: np.random.Generator,
    width: int = 512,
    height: int = 256,
    supersample: int = 2,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Draw a random room of the wanted kind and colour.

    Column x looks along azimuth ``2 pi (x + 0.5) / width``, growing to the right, and row y along
    elevation ``pi / 2 - pi (y + 0.5) / height``.

    Args:
        room: the room to draw.
        rng: the only source of randomness; its state is advanced.
        width: columns.
        height: rows.
        supersample: rays per pixel along each side; their display values are averaged.

    Returns:
        The image (height, width, 3) in 8-bit display RGB, and the distance (height, width) in
        metres from the camera along the ray through each pixel's centre.
    """
    scene = build(room, rng)
    fine = aim(width * supersample, height * supersample, scene.yaw)
    light = paint(scene, fine, trace(scene, fine))
    light = light.reshape(3, height, supersample, width, supersample).mean((2, 4))
    image = (light * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)

    # One ray per pixel, not a mean: a mean would put points in the air between two surfaces.
    coarse = aim(width, height, scene.yaw)
    stretch = np.sqrt(1 + coarse.rise * coarse.rise)
    distance = trace(scene, coarse).reach * stretch[:, None]
    return np.ascontiguousarray(image), distance.astype(np.float32)


def caption(room: Room, rng: np.random.Generator, keep: float = 0.6) -> str:
    """Describe a room, kind and colour each left out with probability 1 - keep.

    Returns e.g. "bedroom in the color of blue"; may be empty.
    """
    kind = room.kind if rng.random() < keep else ""
    if rng.random() < keep:
        return f"{kind or 'room'} in the color of {room.color}"
    return kind
