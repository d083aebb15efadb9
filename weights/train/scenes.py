"""Procedural landscapes on the whole sphere, seeded, with their captions and distances.

A scene is painted back to front in angles (azimuth and elevation as seen by the camera), as a 2:1
equirectangular image that closes left to right. Strips are rows of it, and `views.py` takes other
views. The look is that of an illustration: flat shapes, crisp silhouettes, nothing smaller than a
cell of the autoencoder's latents if it can be helped.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import cos, pi, radians, sin
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Color = tuple[float, float, float]

CAMERA_HEIGHT = 6.0  # metres above the ground plane
HEIGHT = 512  # pixels of a sphere, which is twice as wide
STRIP = slice(120, 376)  # its rows that a strip shows, 90 degrees
SUPERSAMPLE = 2  # rays per pixel and axis, averaged


@dataclass(frozen=True)
class Sky:
    """The light of a time of day; colours are display RGB in [0, 1]."""

    zenith: Color
    middle: Color
    horizon: Color
    haze: Color  # what distance fades into
    light: Color  # multiplies every colour on the ground
    cloud: Color
    disc: Color | None  # sun or moon
    disc_elevation: tuple[float, float] = (10, 30)  # degrees
    glow: float = 0.0
    stars: int = 0
    sun: float = 0.0  # azimuth of the disc, and of where light comes from


@dataclass(frozen=True)
class Land:
    """The material and the shapes of the ground; colours are display RGB under white light."""

    near: Color  # the ground at the viewer's feet
    far: Color  # the ground below the horizon
    ridge: Color
    mounts: tuple[str, int, float, float] | None  # a key of MOUNTS, their number, degrees of height
    hills: float = 0.0  # height of the rolling hills in front of them, degrees
    tree: str | None = None  # a key of TREES
    foliage: tuple[Color, ...] = ()


T = TypeVar("T", Sky, Land)

SKIES: Mapping[str, Sky] = {
    "noon": Sky(
        zenith=(0.16, 0.44, 0.86), middle=(0.36, 0.64, 0.93), horizon=(0.76, 0.90, 0.98),
        haze=(0.70, 0.84, 0.95), light=(1.0, 1.0, 0.98), cloud=(1.0, 1.0, 1.0),
        disc=(1.0, 0.98, 0.85), disc_elevation=(30, 42), glow=0.30,
    ),
    "sunset": Sky(
        zenith=(0.30, 0.17, 0.46), middle=(0.82, 0.33, 0.38), horizon=(1.0, 0.64, 0.26),
        haze=(0.93, 0.52, 0.33), light=(0.95, 0.68, 0.57), cloud=(0.98, 0.58, 0.45),
        disc=(1.0, 0.90, 0.58), disc_elevation=(8, 18), glow=0.55,
    ),
    "night": Sky(
        zenith=(0.02, 0.03, 0.11), middle=(0.05, 0.08, 0.21), horizon=(0.12, 0.17, 0.35),
        haze=(0.11, 0.15, 0.31), light=(0.34, 0.38, 0.55), cloud=(0.22, 0.26, 0.41),
        disc=(0.96, 0.95, 0.86), disc_elevation=(22, 40), glow=0.18, stars=70,
    ),
    "dawn": Sky(
        zenith=(0.47, 0.56, 0.82), middle=(0.78, 0.72, 0.88), horizon=(1.0, 0.82, 0.80),
        haze=(0.90, 0.78, 0.86), light=(0.86, 0.78, 0.86), cloud=(1.0, 0.88, 0.90),
        disc=(1.0, 0.95, 0.84), disc_elevation=(6, 14), glow=0.35,
    ),
    "overcast": Sky(
        zenith=(0.50, 0.53, 0.57), middle=(0.62, 0.64, 0.67), horizon=(0.78, 0.79, 0.80),
        haze=(0.71, 0.73, 0.75), light=(0.66, 0.68, 0.70), cloud=(0.86, 0.87, 0.88),
        disc=None,
    ),
}  # fmt: skip

LANDS: Mapping[str, Land] = {
    "green hills": Land(
        near=(0.32, 0.60, 0.20), far=(0.50, 0.72, 0.30), ridge=(0.29, 0.55, 0.26), mounts=None,
        hills=13, tree="conifer", foliage=((0.09, 0.34, 0.19), (0.13, 0.40, 0.20)),
    ),
    "desert": Land(
        near=(0.90, 0.72, 0.47), far=(0.95, 0.82, 0.60), ridge=(0.84, 0.46, 0.28),
        mounts=("mesa", 9, 9, 17), hills=3,
        tree="cactus", foliage=((0.28, 0.48, 0.26), (0.34, 0.52, 0.26)),
    ),
    "snowy mountains": Land(
        near=(0.84, 0.91, 1.0), far=(0.92, 0.96, 1.0), ridge=(0.36, 0.44, 0.60),
        mounts=("peak", 14, 13, 26), hills=0,
        tree="conifer", foliage=((0.10, 0.28, 0.28), (0.14, 0.33, 0.31)),
    ),
    "sea": Land(
        near=(0.04, 0.30, 0.46), far=(0.20, 0.52, 0.64), ridge=(0.24, 0.40, 0.38),
        mounts=("island", 6, 4, 9),
    ),
    "volcanic land": Land(
        near=(0.17, 0.14, 0.15), far=(0.27, 0.21, 0.21), ridge=(0.34, 0.24, 0.24),
        mounts=("cone", 6, 15, 24), hills=3, tree="dead", foliage=((0.10, 0.08, 0.09),),
    ),
    "autumn hills": Land(
        near=(0.62, 0.38, 0.12), far=(0.80, 0.52, 0.18), ridge=(0.80, 0.30, 0.10), mounts=None,
        hills=13, tree="round",
        foliage=((0.88, 0.34, 0.10), (0.95, 0.62, 0.13), (0.72, 0.17, 0.12)),
    ),
}  # fmt: skip

TIME_WORDS: Mapping[str, tuple[str, ...]] = {
    "noon": ("noon", "noon", "midday", "a clear day", "a sunny day"),
    "sunset": ("sunset", "sunset", "evening", "dusk"),
    "night": ("night", "night", "a starry night", "moonlight"),
    "dawn": ("dawn", "dawn", "sunrise", "early morning"),
    "overcast": ("overcast sky", "overcast sky", "an overcast day", "a cloudy day", "grey weather"),
}
LAND_WORDS: Mapping[str, tuple[str, ...]] = {
    "green hills": ("green hills", "green hills", "meadows", "grassland"),
    "desert": ("desert", "desert", "the desert", "a desert", "sand dunes"),
    "snowy mountains": ("snowy mountains", "snowy mountains", "snow", "mountains in winter"),
    "sea": ("the sea", "the sea", "the ocean", "a calm sea"),
    "volcanic land": ("volcanic land", "volcanic land", "a volcano", "volcanoes", "lava fields"),
    "autumn hills": ("autumn hills", "autumn hills", "autumn", "an autumn forest"),
}
FRAMES = ("", "", "", "a panorama of ", "a view of ", "an illustration of ")
KEEP = 0.6  # the probability that a caption of a training image names an attribute


@dataclass(frozen=True)
class Scene:
    """The attributes of an image, which captions name and classifiers read."""

    time: str  # a key of SKIES
    land: str  # a key of LANDS
    trees: bool
    clouds: bool

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        """Draw the attributes of one scene, times and lands evenly."""
        time = str(rng.choice(list(SKIES)))
        land = str(rng.choice(list(LANDS)))
        trees = LANDS[land].tree is not None and rng.random() < 0.55
        clouds = time == "overcast" or rng.random() < 0.5
        return cls(time, land, bool(trees), bool(clouds))

    def caption(self, rng: np.random.Generator, keep: float = KEEP) -> str:
        """Describe the scene, each attribute left out with probability 1 - keep.

        Returns e.g. "sunset over snowy mountains with trees"; may be empty.
        """
        time = rng.choice(TIME_WORDS[self.time]) if rng.random() < keep else ""
        land = rng.choice(LAND_WORDS[self.land]) if rng.random() < keep else ""
        trees = " with trees" if self.trees and rng.random() < keep else ""
        clouds = " under clouds" if self.clouds and rng.random() < keep else ""
        if time and land:
            form = rng.choice(["{time} over {land}{rest}", "{land}{rest} at {time}"], p=[0.7, 0.3])
            text = form.format(time=time, land=land, rest=trees + clouds)
        else:
            text = f"{time or land}{trees}{clouds}".strip()
        return f"{rng.choice(FRAMES)}{text}" if text else ""

    def render(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], Array]:
        """Paint the scene, and whatever it leaves open at random.

        Returns:
            The image (H, 2 H, 3) in [0, 255], and the distance (H, 2 H) of what it shows in metres,
            inf for the sky.
        """
        canvas = Canvas()
        sky, land = jitter(SKIES[self.time], rng), jitter(LANDS[self.land], rng)
        sky = replace(sky, sun=float(rng.uniform(0, 2 * pi)))
        paint_sky(canvas, self, sky, rng)
        paint_mounts(canvas, sky, land, rng)
        if self.land == "sea":
            paint_sea(canvas, sky, land, rng)
        else:
            paint_hills(canvas, sky, land, rng)
            paint_ground(canvas, sky, land, rng)
        if self.trees:
            plant(canvas, sky, land, rng)
        return average(canvas.rgb, canvas.distance)


Block = slice | tuple[slice, NDArray[np.intp]]
"""Rows of a canvas, or of some of its columns."""


class Canvas:
    """An image in progress: colours, distances, and the angles of every row and column."""

    def __init__(self) -> None:
        self.height, self.width = HEIGHT * SUPERSAMPLE, 2 * HEIGHT * SUPERSAMPLE
        self.pixel = pi / self.height
        rows = np.arange(self.height, dtype=np.float32) + 0.5
        self.elevation: Array = (pi / 2 - self.pixel * rows)[:, None]  # (H, 1)
        columns = np.arange(self.width, dtype=np.float32) + 0.5
        self.azimuth: Array = (self.pixel * columns)[None]  # (1, W)
        self.rgb: Array = np.zeros((self.height, self.width, 3), np.float32)
        self.distance: Array = np.full((self.height, self.width), np.inf, np.float32)

    def rows(self, low: float, high: float) -> slice:
        """Return the rows whose elevation lies in [low, high] radians."""
        inside = np.flatnonzero((self.elevation[:, 0] >= low) & (self.elevation[:, 0] <= high))
        return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)

    def block(
        self, low: float, high: float, azimuth: float, halfwidth: float
    ) -> tuple[Block, Array, Array]:
        """Find the rows between two elevations and the columns around an azimuth, in radians.

        Also return the angles (1, w) of the columns from the azimuth, and the rows' elevations.
        """
        reach = min(int(halfwidth / self.pixel) + 2, self.width // 2 - 1)
        middle = int(azimuth / self.pixel)
        rows = self.rows(low, high)
        columns = np.arange(middle - reach, middle + reach + 1) % self.width
        return (rows, columns), wrap(self.azimuth[:, columns] - azimuth), self.elevation[rows]

    def paint(
        self,
        alpha: Array,
        color: Array | Color,
        block: Block = slice(None),
        distance: float | Array | None = None,
    ) -> None:
        """Lay a colour over a block, alpha in [0, 1]; covering half a sample hides it."""
        self.rgb[block] += alpha[..., None] * (np.asarray(color, np.float32) - self.rgb[block])
        if distance is not None:
            self.distance[block] = np.where(alpha > 0.5, distance, self.distance[block])


def average(samples: Array, distance: Array) -> tuple[NDArray[np.uint8], Array]:
    """Average the samples (h, w, 3) of each pixel; its distance is that of the nearest."""
    shape = (HEIGHT, SUPERSAMPLE, 2 * HEIGHT, SUPERSAMPLE)
    image = samples.reshape(*shape, 3).mean((1, 3)).clip(0, 1)
    return (image * 255 + 0.5).astype(np.uint8), distance.reshape(shape).min((1, 3))


def paint_sky(canvas: Canvas, scene: Scene, sky: Sky, rng: np.random.Generator) -> None:
    """Paint gradient, glow, sun or moon, stars and clouds; mirrored below the horizon for water."""
    up = np.abs(canvas.elevation) / radians(50)
    lower = mix(sky.horizon, sky.middle, smoothstep(0, 0.55, up))
    canvas.rgb[:] = mix(lower, sky.zenith, smoothstep(0.30, 1.1, up))
    elevation = radians(rng.uniform(*sky.disc_elevation))
    if sky.disc is not None:
        cosine = np.cos(canvas.elevation) * cos(elevation) * np.cos(canvas.azimuth - sky.sun)
        cosine = np.sin(canvas.elevation) * sin(elevation) + cosine
        gap = np.arccos(np.clip(cosine, -1, 1)).astype(np.float32)  # radians
        canvas.paint(sky.glow * np.exp(-((gap / 0.42) ** 2)), sky.disc)
        canvas.paint(0.55 * np.exp(-((gap / 0.16) ** 2)) * min(1.0, sky.glow * 3), sky.disc)
    for _ in range(sky.stars):
        paint_star(canvas, rng)
    if sky.disc is not None:
        radius = radians(4)
        canvas.paint(edge(radius - gap, canvas.pixel), sky.disc)
    if scene.time == "overcast":
        paint_stratus(canvas, sky, rng)
    elif scene.clouds:
        for _ in range(int(rng.integers(9, 14))):
            paint_cumulus(canvas, sky, rng)


def paint_star(canvas: Canvas, rng: np.random.Generator) -> None:
    """Paint a soft dot, large enough for the autoencoder to keep."""
    center, azimuth = radians(rng.uniform(10, 85)), rng.uniform(0, 2 * pi)
    radius = radians(rng.uniform(0.5, 0.9))
    reach, squeeze = 4 * radius, cos(center)
    block, x, y = canvas.block(center - reach, center + reach, azimuth, reach / squeeze)
    gap2 = (x * squeeze) ** 2 + (y - center) ** 2
    alpha = rng.uniform(0.5, 0.95) * np.exp(-gap2 / radius**2)
    canvas.paint(alpha.astype(np.float32), (0.93, 0.95, 1.0), block)


def paint_stratus(canvas: Canvas, sky: Sky, rng: np.random.Generator) -> None:
    """Paint broad soft bands over the whole sky."""
    noise = waves(canvas.azimuth, 7.0 * np.abs(canvas.elevation), rng, 7, 9)
    fade = np.cos(canvas.elevation) * smoothstep(0.02, 0.25, np.abs(canvas.elevation))
    canvas.paint(0.45 * fade * smoothstep(-0.3, 1.3, noise), sky.cloud)
    canvas.paint(0.35 * fade * smoothstep(-0.3, 1.3, -noise), np.multiply(sky.zenith, 0.82))


def paint_cumulus(canvas: Canvas, sky: Sky, rng: np.random.Generator) -> None:
    """Paint a heap of discs on a flat base, bright above and shaded below."""
    azimuth, base = rng.uniform(0, 2 * pi), radians(rng.uniform(20, 50))
    width = radians(rng.uniform(9, 17))
    stretch = 1 / cos(base)
    top = 0.62 * width
    low, high = base - 0.12 * width, base + 1.2 * top
    block, x, y = canvas.block(low, high, azimuth, 1.3 * width * stretch)
    x, y = x / (stretch * width), (y - base) / width
    inside = np.full((y.shape[0], x.shape[1]), -1.0, np.float32)
    for center in np.linspace(-0.68, 0.68, 5):
        radius = (0.46 - 0.30 * center**2) * rng.uniform(0.8, 1.15)
        shift = center + rng.uniform(-0.06, 0.06)
        inside = np.maximum(inside, radius - np.hypot(x - shift, 0.9 * (y - 0.12)))
    inside = np.minimum(inside, 0.6 * (y + 0.04))
    alpha = 0.92 * smoothstep(-0.01, 0.07, inside)
    under = mix(sky.cloud, sky.middle, np.float32(0.42))
    shade = smoothstep(0.0, 0.5, y) * np.ones_like(x)
    canvas.paint(alpha, mix(under, sky.cloud, shade), block)


Mount = tuple[float, Callable[[Array], Array]]
"""Half a mount's width in units of its height, and its outline: the share of the height reached at
each place across it, from -1 to 1."""

MOUNTS: Mapping[str, Mount] = {
    "peak": (1.15, lambda x: 1 - np.abs(x) ** 0.9),
    "cone": (1.25, lambda x: np.minimum(1.16 * (1 - np.abs(x) ** 0.75), 0.84 + 0.6 * np.abs(x))),
    "mesa": (1.1, lambda x: smoothstep(1.0, 0.72, np.abs(x))),
    "island": (2.4, lambda x: 1 - x**2),
}


def paint_mounts(canvas: Canvas, sky: Sky, land: Land, rng: np.random.Generator) -> None:
    """Paint mounts all around, the highest, which are the farthest, first."""
    if land.mounts is None:
        return
    kind, count, low, high = land.mounts
    places = (np.arange(count) + rng.uniform(-0.3, 0.3, count)) / count + rng.uniform()
    heights = np.radians(rng.uniform(low, high, count))
    for index in np.argsort(-heights):
        share = float((heights[index] - radians(low)) / radians(high - low))
        haze = np.float32(0.08 + 0.22 * share)
        azimuth, height = float(places[index] % 1 * 2 * pi), float(heights[index])
        paint_mount(canvas, sky, land, kind, azimuth, height, haze, rng)


def paint_mount(
    canvas: Canvas, sky: Sky, land: Land, kind: str, azimuth: float, height: float,
    haze: np.float32, rng: np.random.Generator,
) -> None:  # fmt: skip
    """Paint a mount in two facets, one of them in the light, and what lies on top of it."""
    width, profile = MOUNTS[kind]
    half = width * height * rng.uniform(0.85, 1.25)
    reflected = kind == "island"
    low = -height if reflected else -0.02
    block, x, y = canvas.block(low, 1.1 * height, azimuth, half)
    x, y = x / half, y / height
    jags = 0.05 * waves(7 * x, 0 * x, rng, 3, 4) * (kind in ("peak", "cone"))
    outline = profile(x) + jags * (1 - np.abs(x))
    inside = (outline - np.abs(y)) * height
    alpha = edge(inside, canvas.pixel) * (1.0 if not reflected else np.where(y < 0, 0.45, 1.0))
    # The two facets meet along a line that runs down from the summit in a zigzag.
    side = 1.0 if sin(sky.sun - azimuth) > 0 else -1.0
    zigzag = 0.10 * np.sin(rng.uniform(9, 13) * y + rng.uniform(0, 6)) * (1 - y)
    line = side * (x - rng.uniform(-0.2, 0.2) * (1 - y) - zigzag)
    light = smoothstep(-0.03, 0.03, line)[..., None]
    if kind == "mesa":  # round rather than faceted
        light = 0.25 + 0.6 * smoothstep(-0.5, 0.5, line)[..., None]
    color = lit(land.ridge, sky) * (0.80 + 0.32 * light)
    if kind == "peak":
        foot = 0.50 + 0.10 * np.sin(rng.uniform(16, 22) * x) + 0.05 * np.sin(37 * x)
        snow = smoothstep(foot - 0.02, foot + 0.02, y)[..., None]
        color = color + snow * (lit((0.98, 0.99, 1.0), sky) * (0.78 + 0.24 * light) - color)
    if kind == "mesa":
        for level in (0.45, 0.75):
            band = smoothstep(0.07, 0.04, np.abs(y - level))[..., None]
            color = color * (1 - 0.14 * band)
    color = mix(color, sky.haze, haze + 0.25 * smoothstep(0.5, 0.0, y) * np.ones_like(x))
    meters = np.where(y < 0, np.inf, 300.0) if reflected else 400.0
    canvas.paint(alpha, color, block, meters)
    if kind == "cone":
        paint_lava(canvas, azimuth, height, half, rng)


def paint_lava(
    canvas: Canvas, azimuth: float, height: float, half: float, rng: np.random.Generator
) -> None:
    """Paint the glow of a crater, and lava that runs down from it."""
    block, x, y = canvas.block(-0.01, 1.5 * height, azimuth, half)
    x, y = x / half, y / height
    glow = 0.75 * np.exp(-((x / 0.34) ** 2) - ((y - 0.95) / 0.25) ** 2)
    canvas.paint(glow, (1.0, 0.45, 0.16), block)
    for side in (-1.0, 0.35, 1.0)[: int(rng.integers(1, 4))]:
        path = side * (0.10 + rng.uniform(0.3, 0.5) * np.clip(0.84 - y, 0, 1))
        path = path + 0.04 * np.sin(14 * y + rng.uniform(0, 6))
        wide = 0.045 + 0.07 * (0.84 - y)
        alpha = edge((wide - np.abs(x - path)) * half, canvas.pixel)
        alpha = alpha * edge((0.86 - y) * height, canvas.pixel) * edge(y * height, canvas.pixel)
        canvas.paint(alpha, (1.0, 0.50, 0.12), block)


def paint_hills(canvas: Canvas, sky: Sky, land: Land, rng: np.random.Generator) -> None:
    """Paint rolling hills, each row nearer, lower and less hazy than the one behind it."""
    woods = land.tree == "round"
    for scale, meters, haze in ((1.0, 300.0, 0.42), (0.66, 200.0, 0.22), (0.36, 110.0, 0.05)):
        if land.hills * scale < 1:
            continue
        profile = 0.62 + 0.38 * np.tanh(1.3 * waves(canvas.azimuth, 0 * canvas.azimuth, rng, 13, 7))
        if woods:
            profile = profile + 0.10 * np.sqrt(np.abs(np.sin(22 * canvas.azimuth)))
        height = radians(land.hills) * scale * profile  # (1, W)
        slope = (np.roll(height, -1, 1) - np.roll(height, 1, 1)) / (2 * canvas.pixel)
        rows = canvas.rows(-0.02, float(height.max()) + 2 * canvas.pixel)
        facing = np.tanh(6 * slope) * np.sin(canvas.azimuth - sky.sun) * (not woods)
        tone = 1 + 0.14 * facing + 0.10 * np.clip(canvas.elevation[rows] / height, 0, 1)
        color = mix(lit(land.ridge, sky) * tone[..., None], sky.haze, np.float32(haze))
        canvas.paint(edge(height - canvas.elevation[rows], canvas.pixel), color, rows, meters)


def paint_ground(canvas: Canvas, sky: Sky, land: Land, rng: np.random.Generator) -> None:
    """Paint the plane from the horizon to the nadir, in soft waves; volcanic land has lava."""
    rows = canvas.rows(-pi / 2, 0.012)
    down = np.maximum(-canvas.elevation[rows], 1e-3)
    horizon = 0.006 * waves(canvas.azimuth, np.zeros_like(canvas.azimuth), rng, 12, 5)
    alpha = edge(horizon - canvas.elevation[rows], canvas.pixel)
    color = mix(lit(land.far, sky), lit(land.near, sky), smoothstep(0.0, 0.65, down))
    noise = waves(canvas.azimuth, 2.2 * np.log(down + 0.04), rng, 9, 7)
    noise = noise * np.cos(canvas.elevation[rows]) * smoothstep(0.0, 0.12, down)
    color = color * (1 + 0.07 * noise[..., None])
    canvas.paint(alpha, color, rows, np.minimum(CAMERA_HEIGHT / np.sin(down), 110.0))
    if land.tree == "dead":
        cracks = waves(canvas.azimuth, 7 * np.log(down + 0.1), rng, 7, 6)
        glow = smoothstep(0.20, 0.14, np.abs(cracks)) * smoothstep(0.06, 0.14, down)
        glow = glow * smoothstep(0.0, 0.3, noise) * np.cos(canvas.elevation[rows])
        canvas.paint(glow * alpha, (1.0, 0.46, 0.10), rows)


def paint_sea(canvas: Canvas, sky: Sky, land: Land, rng: np.random.Generator) -> None:
    """Paint water over the mirror images of sky, islands and sun, with a swell that glitters."""
    rows = canvas.rows(-pi / 2, 0.0)
    down = -canvas.elevation[rows]
    depth = smoothstep(0.0, 0.8, down)
    water = mix(lit(land.far, sky), lit(land.near, sky), depth)
    canvas.paint(0.50 + 0.28 * depth * np.ones_like(canvas.azimuth), water, rows)
    swell = waves(canvas.azimuth, 12 * np.log(down + 0.08), rng, 6, 6)
    swell = swell * np.cos(down) * smoothstep(0.02, 0.2, down)
    canvas.rgb[rows] *= 1 + 0.06 * swell[..., None]
    crests = smoothstep(0.62, 0.72, swell) * smoothstep(1.2, 0.7, down)
    canvas.paint(0.30 * crests, sky.horizon, rows)
    if sky.disc is not None:
        across = wrap(canvas.azimuth - sky.sun) / (0.06 + 0.20 * down)
        path = np.exp(-(across**2)) * np.exp(-down / 0.6)
        canvas.paint(path * smoothstep(-0.35, -0.15, swell) * 0.7, sky.disc, rows)
    canvas.distance[rows] = np.minimum(CAMERA_HEIGHT / np.sin(np.maximum(down, 1e-3)), 300.0)


def plant(canvas: Canvas, sky: Sky, land: Land, rng: np.random.Generator) -> None:
    """Paint trees in groups all around, the far ones first.

    They stand on the plane: x across and y up, in units of a tree's height.
    """
    count = int(rng.integers(20, 34))
    groves = (np.arange(7) + rng.uniform(-0.3, 0.3, 7)) * 2 * pi / 7 + rng.uniform(0, 2 * pi)
    azimuths = (groves[rng.integers(0, 7, count)] + rng.normal(0, 0.20, count)) % (2 * pi)
    distances = np.sort(rng.uniform(11, 34, count))[::-1]
    for azimuth, distance in zip(azimuths.tolist(), distances.tolist(), strict=True):
        foliage = land.foliage[int(rng.integers(len(land.foliage)))]
        haze = np.float32(0.25 * (distance / 34) ** 1.5)
        top = rng.uniform(6.0, 9.0) - CAMERA_HEIGHT
        foot = -np.arctan(CAMERA_HEIGHT / distance)
        size = float(np.arctan(top / distance) - foot)
        block, x, y = canvas.block(foot - 0.1 * size, foot + 1.1 * size, azimuth, 0.6 * size)
        x, y = x / size, (y - foot) / size
        shade = (1 + 0.20 * np.clip(-x / 0.25, -1, 1) + 0.12 * (y - 0.5))[..., None]
        for inside, color in TREES[land.tree](x, y, rng):
            tone = mix(lit(color or foliage, sky), sky.haze, haze)
            canvas.paint(edge(inside, canvas.pixel / size), tone * shade, block, distance)


Part = tuple[Array, Color | None]  # None for the colour of the foliage
TRUNK = (0.32, 0.22, 0.16)


def conifer(x: Array, y: Array, rng: np.random.Generator) -> list[Part]:
    """Return three stacked skirts on a short trunk."""
    lean = rng.uniform(0.85, 1.15)
    crown = np.full(np.broadcast_shapes(x.shape, y.shape), -1.0, np.float32)
    for bottom, top, half in ((0.10, 0.58, 0.27), (0.34, 0.80, 0.21), (0.56, 1.0, 0.15)):
        skirt = half * lean * (top - y) / (top - bottom) - np.abs(x)
        crown = np.maximum(crown, np.minimum(skirt, y - bottom))
    return [(np.minimum(0.055 - np.abs(x), np.minimum(y, 0.2 - y)), TRUNK), (crown, None)]


def round_tree(x: Array, y: Array, rng: np.random.Generator) -> list[Part]:
    """Return an oval crown with a lobe on either side."""
    crown = 0.27 - np.hypot(x, 0.82 * (y - 0.66))
    for side in (-1, 1):
        lobe = 0.18 - np.hypot(x - side * rng.uniform(0.12, 0.2), y - rng.uniform(0.5, 0.6))
        crown = np.maximum(crown, lobe)
    return [(np.minimum(0.065 - np.abs(x), np.minimum(y, 0.5 - y)), TRUNK), (crown, None)]


def cactus(x: Array, y: Array, rng: np.random.Generator) -> list[Part]:
    """Return a column with two bent arms."""

    def bar(x0: float, y0: float, y1: float, half: float) -> Array:
        return half - np.hypot(x - x0, y - np.clip(y, y0, y1))

    body = bar(0.0, 0.0, 0.9, 0.085)
    for side in (-1.0, 1.0):
        low = rng.uniform(0.3, 0.48)
        elbow = 0.055 - np.hypot(x - np.clip(x, min(0, side * 0.2), max(0, side * 0.2)), y - low)
        body = np.maximum(body, np.maximum(elbow, bar(side * 0.2, low, low + 0.26, 0.06)))
    return [(np.minimum(body, y), None)]


def dead_tree(x: Array, y: Array, rng: np.random.Generator) -> list[Part]:
    """Return a bare trunk that forks."""
    wood = np.minimum(0.075 * (1.1 - y) - np.abs(x), np.minimum(y, 0.95 - y))
    for side in (-1.0, 1.0):
        fork = rng.uniform(0.35, 0.55)
        branch = 0.045 - np.abs(x - side * 0.6 * (y - fork))
        wood = np.maximum(wood, np.minimum(branch, np.minimum(y - fork, fork + 0.38 - y)))
    return [(wood, None)]


TREES: Mapping[str, Callable[[Array, Array, np.random.Generator], list[Part]]] = {
    "conifer": conifer,
    "round": round_tree,
    "cactus": cactus,
    "dead": dead_tree,
}


def waves(
    azimuth: Array, other: Array, rng: np.random.Generator, highest: int, terms: int
) -> Array:
    """Return smooth noise in about [-1.5, 1.5], a number of cosines.

    Their frequencies in azimuth (1, W) are whole, so they close; `highest` is the highest. The
    other coordinate is (H, 1) or (1, W).
    """
    frequencies = rng.integers(1, highest + 1, terms)
    total = np.zeros(np.broadcast_shapes(azimuth.shape, other.shape), np.float32)
    weight = 0.0
    for k in frequencies:
        amplitude = 1 / (1 + 3 * k / highest)
        total += amplitude * np.cos(
            k * azimuth + rng.uniform(-1.5, 1.5) * other + np.float32(rng.uniform(0, 2 * pi))
        )
        weight += amplitude**2
    return (total * (0.9 / np.sqrt(weight / 2)) / 1.4).astype(np.float32)


def jitter(thing: T, rng: np.random.Generator) -> T:
    """Return a copy of a sky or land, all its single colours scaled by the same random gains."""
    gain = rng.normal(1, 0.03) * rng.normal(1, 0.012, 3)
    colors = {name: value for name, value in vars(thing).items() if np.shape(value) == (3,)}
    return replace(thing, **{name: tuple(value * gain) for name, value in colors.items()})


def lit(color: Color, sky: Sky) -> Array:
    """Light a colour by the sky."""
    return np.asarray(color, np.float32) * np.asarray(sky.light, np.float32)


def mix(a: Array | Color, b: Array | Color, t: Array | np.float32) -> Array:
    """Return a where t is 0, b where t is 1; t gains a channel axis if it is an array."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    weight = t[..., None] if isinstance(t, np.ndarray) else t
    return a + weight * (b - a)


def smoothstep(low: float | Array, high: float | Array, value: Array) -> Array:
    """Return 0 at low, 1 at high (or the other way round), smooth between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)


def edge(inside: Array, pixel: float) -> Array:
    """Return a shape's coverage of a sample: inside > 0 in the shape, in the units of pixel."""
    return np.clip(inside / pixel + 0.5, 0, 1).astype(np.float32)


def wrap(angle: Array) -> Array:
    """Wrap an angle into [-pi, pi)."""
    return (angle + pi) % (2 * pi) - pi
