"""Draw the figures of docs/how-it-works.md.

`script/python -m benchmarks.figures docs/figures` writes them. Windows are where the layouts of
`panorama.sampling.views` place them.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from math import pi
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from panorama.sampling.canvas import Canvas, View
from panorama.sampling.views import Feathered, Fixed, Sliding, Spanning

WINDOW = 64  # latent cells, of Stable Diffusion 2
STRIP = Canvas(WINDOW, 4 * WINDOW)  # 2048 x 512 pixels
RING = Canvas(WINDOW, 5 * WINDOW, "x")
STEPS = 10
SPHERES = (1, 2, 4)  # enlargements of 1024 x 512 pixels
SPHERE = Canvas(64, 128, "x")
LARGE_WINDOW = 128  # latent cells, of SDXL
TURNS = 3  # steps of the figure of a ring
BLUE, PALE, ORANGE, GREY = "#3a6ea5", "#9dbbd9", "#d9822b", "#888888"
STYLE = {"svg.hashsalt": "panorama", "font.size": 9, "axes.spines.top": False}
"""A fixed salt: the same figure is the same file."""


def draw_windows() -> Figure:
    """Draw the windows of the published method, one below the other, with their anchor."""
    (views, *_) = Fixed()(STRIP, WINDOW, 1)
    figure, axes = canvas_figure(3, STRIP, "windows")
    for row, view in enumerate(views):
        color = ORANGE if row == len(views) // 2 else BLUE
        add_bar(axes, view.left, row, view.width, color)
    axes.set_ylim(len(views) + 0.5, -1)
    axes.set_yticks([])
    return figure


def draw_sliding() -> Figure:
    """Draw the windows of every step of a strip, which slide from step to step."""
    figure, axes = canvas_figure(3.4, STRIP, "steps")
    for step, views in enumerate(Sliding(None)(STRIP, WINDOW, STEPS)):
        for index, view in enumerate(views):
            add_bar(axes, view.left, step, view.width, (BLUE, PALE)[index % 2])
    axes.set(xlim=(-WINDOW, STRIP.width + WINDOW), ylim=(STEPS - 0.3, -0.7))
    axes.set_yticks(range(STEPS), [str(step + 1) for step in range(STEPS)])
    for end in (0, STRIP.width):
        axes.axvline(end, color=GREY, linewidth=1, linestyle="--", zorder=3)
    return figure


def draw_ring() -> Figure:
    """Draw the windows of three steps around a ring, one circle for each."""
    figure = Figure(figsize=(3.8, 3.8), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    turn = 2 * pi / RING.width
    for step, views in enumerate(Sliding(None)(RING, WINDOW, STEPS)[:TURNS]):
        for index, view in enumerate(views):
            middle, width = turn * (view.left + view.width / 2), turn * view.width
            color = (BLUE, PALE)[index % 2] if index else ORANGE
            axes.bar(middle, 0.8, width, 4 + step, color=color, edgecolor="white", linewidth=1)
    axes.plot([0, 0], [3.6, 4 + TURNS], color="black", linewidth=1.5)
    axes.annotate("left edge = right edge", (0, 4 + TURNS + 0.3), ha="center")
    axes.set_ylim(0, 4 + TURNS + 0.6)
    axes.axis("off")
    return figure


def draw_stages() -> Figure:
    """Draw the first stage of a sphere and its doublings, to scale, with the windows of a step."""
    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    axes = figure.add_subplot()
    left = 0
    for factor in SPHERES:
        canvas = Canvas(factor * SPHERE.height, factor * SPHERE.width, "x")
        layout = Spanning() if factor == 1 else Feathered()
        views = layout(canvas, min(LARGE_WINDOW, canvas.height), 1)[0]
        draw_canvas(axes, canvas, views, left)
        pixels = f"{8 * canvas.width} x {8 * canvas.height}"
        windows = "one view" if factor == 1 else f"{len(views)} windows a step"
        axes.annotate(f"{pixels}\n{windows}", (left, canvas.height + 6), va="top")
        left += canvas.width + 60
    axes.set(xlim=(-4, left - 50), ylim=(SPHERE.height * max(SPHERES) + 66, -4), aspect="equal")
    axes.axis("off")
    return figure


def draw_canvas(axes: Axes, canvas: Canvas, views: Sequence[View], left: int) -> None:
    """Draw a canvas with the windows on it, each also where it wraps around."""
    frame = Rectangle((left, 0), canvas.width, canvas.height, fill=False, linewidth=1.2, zorder=3)
    axes.add_patch(frame)
    for view in views:
        for start in (view.left, view.left - canvas.width):
            window = Rectangle(
                (left + start, view.top), view.width, view.height, facecolor=BLUE, alpha=0.18
            )
            window.set_edgecolor(BLUE)
            axes.add_patch(window)
            window.set_clip_path(frame)


def canvas_figure(height: float, canvas: Canvas, rows: str) -> tuple[Figure, Axes]:
    """Return a figure with the columns of a canvas from left to right."""
    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, canvas.width), xlabel="column of the canvas, latent cells", ylabel=rows)
    axes.set_xticks(range(0, canvas.width + 1, WINDOW))
    axes.spines[["right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure, axes


def add_bar(axes: Axes, start: int, row: int, width: int, color: str) -> None:
    """Draw a window as a bar in a row."""
    axes.barh(row, width, 0.75, start, color=color, edgecolor="white", linewidth=1)


FIGURES: Mapping[str, Callable[[], Figure]] = {
    "windows": draw_windows,
    "sliding": draw_sliding,
    "ring": draw_ring,
    "stages": draw_stages,
}
"""The figures by the names of their files."""


def save(figure: Figure, path: Path) -> None:
    """Write a figure, an SVG without its date."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw every figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for the SVG files")
    folder = parser.parse_args(arguments).folder
    for name, draw in FIGURES.items():
        with rc_context(STYLE):
            save(draw(), folder / f"{name}.svg")


if __name__ == "__main__":
    main()
