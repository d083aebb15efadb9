"""Layouts: where the windows of each denoising step lie on a canvas."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, gcd
from typing import ClassVar, Protocol, overload

from panorama.sampling.canvas import Canvas, View

MIN_SPACING = 8  # cells; the smallest stride, and the smallest spacing used for equal coverage


class Layout(Protocol):
    """Place windows on a canvas."""

    wraps: ClassVar[bool]  # views span the closed axis, so convolutions have to wrap around it

    def __call__(self, canvas: Canvas, window: int, steps: int) -> Sequence[Sequence[View]]:
        """Return the views of each step, of windows with the model's own side in latent cells.

        Raises:
            ValueError: the canvas cannot be covered.
        """
        ...


@dataclass(frozen=True)
class Spanning:
    """Cover the canvas with one view, as a stock pipeline does."""

    wraps: ClassVar[bool] = True

    def __call__(self, canvas: Canvas, window: int, steps: int) -> Sequence[Sequence[View]]:
        """Return the same single view for every step."""
        return [(View(0, 0, canvas.height, canvas.width),)] * steps


@dataclass(frozen=True)
class Fixed:
    """Cover the canvas with overlapping windows that stay where they are, as published.

    The UNet pads a window's edges with zeros, which leaves a faint line in the latents. Here every
    denoising step leaves it in the same place, so windows that are not synchronised show as panels.

    Attributes:
        stride: the widest distance between neighbouring windows, latent cells.
    """

    stride: int = 16
    wraps: ClassVar[bool] = False

    def __call__(self, canvas: Canvas, window: int, steps: int) -> Sequence[Sequence[View]]:
        """Return the same views for every step; see `sliding_views`."""
        return [sliding_views(canvas, window, self.stride)] * steps


@dataclass(frozen=True)
class Sliding:
    """Cover the canvas with windows that slide to another place at each step.

    Along both axes the edges of windows visit every cell, about equally often, and those of
    consecutive steps lie apart. Windows hang over the ends of a flat axis, so that the ends are no
    edges either. At the last step windows overlap by half at least and are feathered, because no
    later step smooths their edges.

    Attributes:
        stride: the widest distance between neighbouring windows, latent cells. None for windows
            that overlap as little as possible (cf. SpotDiffusion, arXiv 2407.15507).
    """

    stride: int | None = 16
    wraps: ClassVar[bool] = False

    def __call__(self, canvas: Canvas, window: int, steps: int) -> Sequence[Sequence[View]]:
        """Return the views of each step; see `Layout`."""
        rows = moving_starts(canvas.height, window, self.stride, steps, canvas.closed == "y")
        columns = moving_starts(canvas.width, window, self.stride, steps, canvas.closed == "x")
        return [
            Grid(tops, lefts, window, feathered=step == steps - 1)
            for step, (tops, lefts) in enumerate(zip(rows, columns, strict=True))
        ]


@dataclass(frozen=True)
class Grid(Sequence[View]):
    """Square windows in rows and columns, rows first, each made when it is asked for.

    A large canvas has tens of thousands in every step, which are counted before any is needed.
    """

    tops: Sequence[int]
    lefts: Sequence[int]
    window: int
    feathered: bool

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    @overload
    def __getitem__(self, index: int) -> View: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[View, ...]: ...
    def __getitem__(self, index: int | slice) -> View | tuple[View, ...]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return tuple(map(self._view, places))
        return self._view(places)

    def _view(self, place: int) -> View:
        row, column = divmod(place, len(self.lefts))
        return View(self.tops[row], self.lefts[column], self.window, self.window, self.feathered)


@dataclass(frozen=True)
class Feathered:
    """Cover a canvas that shows an image already, to refine it.

    Windows overlap by a quarter at least, count less towards their edges, and move from step to
    step. On a closed axis they start at even distances, see `ring_starts`.
    """

    wraps: ClassVar[bool] = False

    def __call__(self, canvas: Canvas, window: int, steps: int) -> Sequence[Sequence[View]]:
        """Return the views of each step; see `Layout`."""
        rows = refining_starts(canvas.height, window, steps, canvas.closed == "y")
        columns = refining_starts(canvas.width, window, steps, canvas.closed == "x")
        return [
            Grid(tops, lefts, window, feathered=True)
            for tops, lefts in zip(rows, columns, strict=True)
        ]


def refining_starts(length: int, window: int, steps: int, ring: bool) -> list[tuple[int, ...]]:
    """Return the starts of windows along one axis for each step, the same number for each."""
    stride = window * 3 // 4
    check_fit(length, window, stride)
    if ring:
        first = ring_starts(length, window, stride)
        room = ceil(length / len(first))
    else:
        least = window // 8 if length > window else 0  # room to move, so that no edge stays put
        count = ceil((length - window + least) / stride) + 1
        first = tuple(stride * index for index in range(count))
        room = first[-1] + window - length + 1  # by which they may hang over the first end
    offsets = golden_offsets(room, room // 2)
    sign = 1 if ring else -1
    moved = [tuple(start + sign * offset for start in first) for offset in offsets]
    return [moved[step % len(moved)] for step in range(steps)]


def sliding_views(canvas: Canvas, window: int, stride: int) -> tuple[View, ...]:
    """Cover a canvas with square windows, rows first.

    Args:
        canvas: at least one window high and wide.
        window: side of a window, latent cells.
        stride: the widest distance between neighbouring windows, 1 to `window` cells; less than
            `window` on a closed axis.

    Returns:
        The views. For a flat canvas whose sides are multiples of `stride`, they are the list of
        the published SyncDiffusion code (`get_views`), in its order.

    Raises:
        ValueError: a window does not fit, or the stride leaves gaps.
    """
    tops = starts(canvas.height, window, stride, ring=canvas.closed == "y")
    lefts = starts(canvas.width, window, stride, ring=canvas.closed == "x")
    return tuple(View(top, left, window, window) for top in tops for left in lefts)


def starts(length: int, window: int, stride: int, *, ring: bool) -> tuple[int, ...]:
    """Return the starts of windows along one axis, see `sliding_views`."""
    return (ring_starts if ring else flat_starts)(length, window, stride)


def flat_starts(length: int, window: int, stride: int) -> tuple[int, ...]:
    """Return the multiples of `stride` at which a window fits and, if needed, a last start."""
    check_fit(length, window, stride)
    found = list(range(0, length - window + 1, stride))
    if found[-1] != length - window:
        found.append(length - window)
    return tuple(found)


def ring_starts(length: int, window: int, stride: int) -> tuple[int, ...]:
    """Return starts spread evenly around a ring, at most `stride` apart.

    A spacing that divides both the ring and the window covers every cell equally often. The widest
    such spacing from 8 cells to `stride` is taken. If there is none, the gaps, and the number of
    windows over a cell, differ by at most one.
    """
    check_fit(length, window, stride)
    if stride >= window:
        raise ValueError(
            f"stride={stride}: must be less than the window's {window} latent cells on a ring, "
            f"or too few windows close it; try {window // 2}"
        )
    common = gcd(length, window)
    spacings = [d for d in range(MIN_SPACING, stride + 1) if common % d == 0]
    return even_starts(length, length // spacings[-1] if spacings else ceil(length / stride))


def moving_starts(
    length: int, window: int, stride: int | None, steps: int, ring: bool
) -> list[tuple[int, ...]]:
    """Return the starts of windows along one axis for each step, see `Sliding`."""
    check_fit(length, window, window if stride is None else stride)
    gap = spacing(length, window, stride, ring)
    # The first step, which synchronising moves most, has no edge at 0.
    offsets = golden_offsets(gap, gap // 2)
    moved = [moved_starts(length, window, stride, offset, ring) for offset in offsets]
    half = min(stride or window, max(window // 2, 1))
    last = moved_starts(length, window, half, last_offset(length, window, half, ring), ring)
    return [*(moved[step % len(moved)] for step in range(steps - 1)), last]


def last_offset(length: int, window: int, stride: int, ring: bool) -> int:
    """Return the offset of windows that hang over both ends alike; half a gap where none hangs."""
    if ring or length == window:
        return spacing(length, window, stride, ring) // 2
    return ((window - length - 2) % stride + 2) // 2


def spacing(length: int, window: int, stride: int | None, ring: bool) -> int:
    """Return the widest distance between the starts of neighbouring windows, 1 for one window."""
    if ring:
        return ceil(length / len(loop_starts(length, window, stride)))
    return (stride or window) if length > window else 1


def moved_starts(
    length: int, window: int, stride: int | None, offset: int, ring: bool
) -> tuple[int, ...]:
    """Return starts that cover an axis, moved by an offset less than their `spacing`."""
    if ring:
        return tuple(start + offset for start in loop_starts(length, window, stride))
    step = stride or window
    return tuple(range(-offset, length - window + step, step))


def loop_starts(length: int, window: int, stride: int | None) -> tuple[int, ...]:
    """Return the starts of windows around a ring, the fewest that cover it without a stride."""
    if stride is None:
        return even_starts(length, ceil(length / window))
    return ring_starts(length, window, stride)


def half_overlapping_starts(length: int, window: int, ring: bool) -> tuple[int, ...]:
    """Return evenly spread starts, within the ends, of windows that overlap by half or more."""
    half, last = window // 2, length - window
    if ring:
        return even_starts(length, ceil(length / half))
    return (*even_starts(last, ceil(last / half)), last)


def golden_offsets(gap: int, first: int = 0) -> tuple[int, ...]:
    """Return every offset below `gap` once, each about a golden section after the one before."""
    section = gap * (5**0.5 - 1) / 2
    step = min((n for n in range(gap) if gcd(n, gap) == 1), key=lambda n: abs(n - section))
    return tuple((first + index * step) % gap for index in range(gap))


def even_starts(length: int, count: int) -> tuple[int, ...]:
    """Return `count` starts around a ring whose gaps differ by at most one cell."""
    return tuple(index * length // count for index in range(count))


def check_fit(length: int, window: int, stride: int) -> None:
    """Raise ValueError unless windows of `window` cells can cover `length` cells at `stride`."""
    if length < window:
        raise ValueError(
            f"a canvas of {length} latent cells is smaller than a window; try {window} cells"
        )
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride={stride}: must be 1 to the window's {window} latent cells; try {window // 2}"
        )
