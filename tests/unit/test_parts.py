"""Parts of a canvas: how much each window shows of each, and the anchor of each."""

import pytest
import torch

from panorama.sampling.canvas import Axis, Canvas, View
from panorama.sampling.parts import part_weights, split_anchors
from panorama.sampling.views import Sliding

# Three parts of 32 cells. By the middle of a window: what it shows of each part.
FLAT = {
    -4: (1, 0, 0),  # hangs over the end
    0: (1, 0, 0),
    16: (1, 0, 0),
    24: (1, 0, 0),
    28: (0.75, 0.25, 0),
    32: (0.5, 0.5, 0),
    34: (0.375, 0.625, 0),
    40: (0, 1, 0),
    56: (0, 1, 0),
    60: (0, 0.75, 0.25),
    72: (0, 0, 1),
    96: (0, 0, 1),
    100: (0, 0, 1),
}
RING = FLAT | {
    -4: (0.25, 0, 0.75),
    0: (0.5, 0, 0.5),
    6: (0.875, 0, 0.125),
    92: (0.25, 0, 0.75),
    96: (0.5, 0, 0.5),
    100: (0.75, 0, 0.25),
    112: (1, 0, 0),
}
CANVASES = {
    "wide": (Canvas(8, 96), FLAT),
    "wide, closed": (Canvas(8, 96, "x"), RING),
    "wide, closed along the shorter side": (Canvas(8, 96, "y"), FLAT),
    "tall": (Canvas(96, 8), FLAT),
    "tall, closed": (Canvas(96, 8, "y"), RING),
    "square": (Canvas(96, 96), FLAT),
}


def view_at(canvas: Canvas, middle: int) -> View:
    """Return a window of 8 cells, somewhere across the longer side."""
    if canvas.width >= canvas.height:
        return View(3, middle - 4, 8, 8)
    return View(middle - 4, 3, 8, 8)


@pytest.mark.parametrize("name", CANVASES)
def test_a_window_shows_the_parts_that_its_middle_is_in_or_between(name: str) -> None:
    canvas, expected = CANVASES[name]
    weights = part_weights(canvas, 3, [view_at(canvas, middle) for middle in expected])
    torch.testing.assert_close(weights, torch.tensor(list(expected.values())).float())


@pytest.mark.parametrize("closed", ["", "x"])
def test_a_single_part_is_all_there_is(closed: Axis) -> None:
    canvas = Canvas(8, 90, closed)
    views = [view_at(canvas, middle) for middle in range(-4, 100)]
    assert torch.equal(part_weights(canvas, 1, views), torch.ones(len(views), 1))


@pytest.mark.parametrize("parts", [2, 3, 5, 7])
@pytest.mark.parametrize("closed", ["", "x"])
def test_weights_add_up_and_change_evenly_from_one_part_to_the_next(
    closed: Axis, parts: int
) -> None:
    canvas = Canvas(8, 40 * parts, closed)
    views = [view_at(canvas, middle) for middle in range(40 * parts + 1)]
    weights = part_weights(canvas, parts, views)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(views)))
    assert (weights > 0).sum(1).max() == 2
    steps = weights.diff(dim=0).abs()
    torch.testing.assert_close(steps[steps > 1e-6].mean(), torch.tensor(1 / 20))  # half of 40 cells
    assert steps.max() < 1 / 20 + 1e-6


@pytest.mark.parametrize("stride", [None, 8])
@pytest.mark.parametrize("extra", [0, 1, 7])
@pytest.mark.parametrize("closed", ["", "x"])
def test_every_part_has_an_anchor_even_if_it_is_as_long_as_a_window(
    closed: Axis, extra: int, stride: int | None
) -> None:
    for parts in (1, 2, 3, 7):
        canvas = Canvas(16, 16 * parts + extra, closed)
        length = canvas.width / parts
        for views in Sliding(stride)(canvas, 16, 20):
            anchors, others = split_anchors(canvas, parts, views)
            assert sorted([*anchors, *others], key=repr) == sorted(views, key=repr)
            assert len(anchors) == parts
            for part, view in enumerate(anchors):
                middle = view.left + 8
                middle = middle % canvas.width if closed else min(max(middle, 0), canvas.width - 1)
                assert part * length <= middle < (part + 1) * length


def test_the_anchor_of_a_single_part_is_the_middle_window() -> None:
    canvas = Canvas(16, 80, "x")
    views = [View(0, left, 16, 16) for left in (70, 6, 22, 38, 54)]
    anchors, others = split_anchors(canvas, 1, views)
    assert anchors == [views[2]]
    assert others == [*views[:2], *views[3:]]
