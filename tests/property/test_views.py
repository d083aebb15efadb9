"""The laws that windows and sampling keep, whatever the sizes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from math import ceil, prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from panorama.sampling.canvas import Axis, Canvas, Fusion, View, crop
from panorama.sampling.solver import SCHEDULERS
from panorama.sampling.synchronize import SyncSettings
from panorama.sampling.views import (
    Fixed,
    Sliding,
    Spanning,
    flat_starts,
    golden_offsets,
    ring_starts,
    sliding_views,
)
from tests.small import STEPS, Networks, draw_noise

lengths = st.integers(8, 40)
Layout = tuple[Canvas, int, int]
"""A canvas, a window and a stride."""


def fuse(
    values: torch.Tensor, views: Sequence[View], canvas: torch.Tensor, closed: Axis = ""
) -> torch.Tensor:
    fusion = Fusion(canvas, views, closed)
    fusion.add(values, views)
    return fusion.mean()


def sides(canvas: Canvas) -> tuple[tuple[int, bool], tuple[int, bool]]:
    """Return the length of each side, and True if it closes."""
    return (canvas.height, canvas.closed == "y"), (canvas.width, canvas.closed == "x")


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Draw a canvas, a window and a stride."""
    window, more = draw(lengths), st.integers(0, 60)
    closed = draw(st.sampled_from(["", "x", "y"])) if window > 8 else ""
    canvas = Canvas(window + draw(more), window + draw(more), closed=closed)
    return canvas, window, draw(st.integers(8, window - 1 if closed else window))


@given(layouts())
@settings(deadline=None)
def test_every_cell_is_covered_and_fuse_undoes_crop(layout: Layout) -> None:
    canvas, window, stride = layout
    views = sliding_views(canvas, window, stride)
    values = torch.randn(1, 2, canvas.height, canvas.width, dtype=torch.float64)
    assert Fusion(values, views, canvas.closed).weight.min() >= 1
    windows = crop(values, views, canvas.closed)
    torch.testing.assert_close(fuse(windows, views, values, canvas.closed), values)


@given(layouts(), st.integers(0, 19), st.booleans())
@settings(deadline=None, max_examples=50)
def test_moving_windows_cover_every_cell_at_every_step_and_fuse_undoes_crop(
    layout: Layout, step: int, strided: bool
) -> None:
    """Though they hang over flat ends, by less than the distance between them."""
    canvas, window, stride = layout
    views = Sliding(stride if strided else None)(canvas, window, 20)[step]
    values = torch.randn(1, 2, canvas.height, canvas.width, dtype=torch.float64)
    even = [replace(view, feathered=False) for view in views]
    assert Fusion(values, even, canvas.closed).weight.min() >= 1
    windows = crop(values, views, canvas.closed)
    assert windows.shape == (len(views), 2, window, window)
    torch.testing.assert_close(fuse(windows, views, values, canvas.closed), values)
    gap = stride if strided else window
    for (side, ring), places in zip(
        sides(canvas), zip(*map(place, views), strict=True), strict=True
    ):
        if not ring:
            assert -gap < min(places) and max(places) + window - side < gap


def place(view: View) -> tuple[int, int]:
    return view.top, view.left


@given(layouts(), st.integers(0, 18), st.sampled_from([0, -1]), st.booleans())
@settings(deadline=None, max_examples=30)
def test_a_window_is_mirrored_beyond_a_flat_end_and_what_lies_there_is_left_out(
    layout: Layout, step: int, corner: int, strided: bool
) -> None:
    """Against a loop over cells, up to the last step, whose windows are feathered."""
    canvas, window, stride = layout
    view = Sliding(stride if strided else None)(canvas, window, 20)[step][corner]
    rows, columns = (
        [seen(start + k, side, ring) for k in range(window)]
        for start, (side, ring) in zip(place(view), sides(canvas), strict=True)
    )
    values = torch.randn(1, 1, canvas.height, canvas.width, dtype=torch.float64)
    (found,) = crop(values, [view], canvas.closed)
    added = torch.randn(1, 1, window, window, dtype=torch.float64)
    fusion = Fusion(values, [view], canvas.closed)
    fusion.add(added, [view])
    total = torch.zeros_like(values)
    for (i, (row, inside_y)), (j, (column, inside_x)) in product(
        enumerate(rows), enumerate(columns)
    ):
        assert found[0, i, j] == values[0, 0, row, column]
        if inside_y and inside_x:
            total[0, 0, row, column] = added[0, 0, i, j]
    assert torch.equal(fusion.weight > 0, total != 0)
    assert torch.equal(fusion.total, total)


def seen(index: int, side: int, ring: bool) -> tuple[int, bool]:
    """Return the cell that is seen at a place of an axis, and True if it lies there."""
    if ring:
        return index % side, True
    if index < 0:
        return -index - 1, False
    return (index, True) if index < side else (2 * side - index - 1, False)


@given(layouts())
def test_a_spanning_view_is_the_canvas(layout: Layout) -> None:
    canvas, window, _ = layout
    values = torch.randn(1, 2, canvas.height, canvas.width)
    ((view,),) = set(Spanning()(canvas, window, 3))
    assert torch.equal(crop(values, [view]), values)


@given(layouts())
def test_fixed_windows_are_the_published_ones_at_every_step(layout: Layout) -> None:
    canvas, window, stride = layout
    steps = Fixed(stride)(canvas, window, 7)
    assert steps == [sliding_views(canvas, window, stride)] * 7


def edges(starts: set[int], window: int, side: int, ring: bool) -> tuple[set[int], set[int]]:
    """Return the places within an axis where windows begin, and those where they end.

    Place c lies before cell c.
    """
    ends = {start + window for start in starts}
    if ring:
        return {start % side for start in starts}, {end % side for end in ends}
    return tuple({c for c in places if 0 < c < side} for places in (starts, ends))


@given(layouts(), st.integers(2, 60), st.booleans())
@settings(deadline=None, max_examples=50)
def test_edges_of_windows_visit_every_cell_equally_often(
    layout: Layout, steps: int, strided: bool
) -> None:
    """To within one step, up to the last, away from the ends of a flat axis.

    Around a ring where gaps differ by a cell, some cells have one more in each cycle.
    """
    canvas, window, stride = layout
    *views, _ = Sliding(stride if strided else None)(canvas, window, steps + 1)
    for index, (side, ring) in enumerate(sides(canvas)):
        places = [{place(view)[index] for view in step} for step in views]
        found = [edges(starts, window, side, ring) for starts in places]
        begins, ends = (
            Counter(c for step in kind for c in step) for kind in zip(*found, strict=True)
        )
        if not ring and side == window:
            assert not begins and not ends  # the only window spans the axis
            continue
        for counts, first, last in ((begins, 1, side - window), (ends, window, side - 1)):
            cells = range(side) if ring else range(first, last + 1)
            times = [counts[c] for c in cells]
            count = len(places[0])
            uneven = ceil(steps / (side // count)) if ring and side % count else 0
            assert not times or max(times) - min(times) <= 1 + uneven
        assert all(begins[c] + ends[c] < 2 * steps for c in range(side))


@given(layouts(), st.booleans())
@settings(deadline=None)
def test_no_cell_is_an_edge_at_every_step(layout: Layout, strided: bool) -> None:
    """Along either axis, the ends of a flat one too, wherever a window can move by a cell."""
    canvas, window, stride = layout
    views = Sliding(stride if strided else None)(canvas, window, 12)
    for index, (side, ring) in enumerate(sides(canvas)):
        if not ring and side == window:
            continue
        moved = [{place(view)[index] for view in step} for step in views[:-1]]
        kinds = [
            {start % side for start in starts} | {(start + window) % side for start in starts}
            for starts in moved
        ]
        always = set.intersection(*kinds)
        assert not always


@given(layouts(), st.booleans())
@settings(deadline=None)
def test_the_last_step_overlaps_by_half_and_is_feathered(layout: Layout, strided: bool) -> None:
    canvas, window, stride = layout
    *moved, last = Sliding(stride if strided else None)(canvas, window, 5)
    assert all(view.feathered for view in last)
    assert not any(view.feathered for views in moved for view in views)
    for index, (side, ring) in enumerate(sides(canvas)):
        starts = sorted({place(view)[index] for view in last})
        assert all(b - a <= window // 2 for a, b in pairwise(starts))
        if not ring and side > window:
            assert starts[0] < 0 < window + starts[-1] - side  # no end is an edge


@given(layouts())
@settings(deadline=None)
def test_without_a_stride_there_are_as_few_windows_as_can_cover(layout: Layout) -> None:
    canvas, window, _ = layout
    # A flat side takes one more than would fit: windows hang over both of its ends.
    most = [ceil(side / window) + (not ring and side > window) for side, ring in sides(canvas)]
    for views in Sliding(None)(canvas, window, window + 1)[:-1]:
        assert len(views) <= prod(most)


@given(layouts())
@settings(deadline=None)
def test_feathered_windows_leave_no_step_at_their_edges(layout: Layout) -> None:
    small, window, _ = layout
    canvas, window = Canvas(4 * small.height, 4 * small.width, small.closed), 4 * window
    (views,) = Sliding(None)(canvas, window, 1)
    values = torch.zeros(1, 1, canvas.height, canvas.width, dtype=torch.float64)
    same = torch.ones(len(views), 1, window, window, dtype=torch.float64)
    torch.testing.assert_close(fuse(same, views, values, canvas.closed), values + 1)
    unlike = same * (torch.arange(len(views)) % 2).view(-1, 1, 1, 1)
    fused = fuse(unlike, views, values, canvas.closed)
    for dim, (_, ring) in zip((-2, -1), sides(canvas), strict=True):
        begin = fused.narrow(dim, 0, 1) if ring else None
        assert fused.diff(dim=dim, append=begin).abs().max() <= 4 / window  # at most 1 / 8


@given(blocks=st.integers(2, 6), window=lengths, ring=st.booleans())
def test_windows_without_a_stride_share_no_cell(blocks: int, window: int, ring: bool) -> None:
    width = blocks * window
    canvas = Canvas(window, width, "x" if ring else "")
    for views in Sliding(None)(canvas, window, window + 1)[:-1]:
        covered = [cell for v in views for cell in range(v.left, v.left + window)]
        if ring:
            covered = [cell % width for cell in covered]
        assert len(covered) == len(set(covered))


@given(st.integers(1, 200))
def test_offsets_visit_every_cell_before_any_again(gap: int) -> None:
    first = gap // 3
    assert golden_offsets(gap, first)[0] == first
    assert sorted(golden_offsets(gap, first)) == list(range(gap))


@given(gap=st.integers(8, 200), first=st.integers(0, 7))
def test_offsets_of_consecutive_steps_lie_apart(gap: int, first: int) -> None:
    for a, b in pairwise(golden_offsets(gap, first)):
        assert min((a - b) % gap, (b - a) % gap) >= gap / 4  # golden sections: 0.38


@given(
    count=st.integers(2, 8),
    window=st.integers(16, 40),
    ring=st.booleans(),
    strided=st.booleans(),
)
@settings(deadline=None)
def test_layouts_move_by_golden_offsets(count: int, window: int, ring: bool, strided: bool) -> None:
    """Edges of consecutive steps lie at least a quarter of the gap between windows apart."""
    canvas = Canvas(window, count * window, "x" if ring else "")
    stride = window // 2 if strided else None
    *views, _ = Sliding(stride)(canvas, window, window)
    lefts = [step[0].left for step in views]
    gap = ceil(canvas.width / len(views[0])) if ring else stride or window
    for a, b in pairwise(lefts):
        assert min((a - b) % gap, (b - a) % gap) >= gap / 4


@given(
    count=st.integers(3, 8),
    window=st.integers(16, 40),
    ring=st.booleans(),
    strided=st.booleans(),
)
def test_the_first_step_has_no_edge_where_the_canvas_begins(
    count: int, window: int, ring: bool, strided: bool
) -> None:
    """The edge of a ring is its seam. A flat axis may end at an edge."""
    canvas = Canvas(window, count * window, "x" if ring else "")
    first, *_ = Sliding(window // 2 if strided else None)(canvas, window, 20)
    assert all(v.left % canvas.width for v in first)
    assert not ring or all((v.left + window) % canvas.width for v in first)


@given(window=lengths, blocks=st.integers(0, 9), data=st.data())
def test_multiples_of_the_stride_give_the_published_list(
    window: int, blocks: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(8, window))
    starts = flat_starts(window + blocks * stride, window, stride)
    assert starts == tuple(i * stride for i in range(blocks + 1))


@given(length=st.integers(16, 400), window=st.sampled_from([16, 32, 64]), data=st.data())
def test_a_ring_is_covered_evenly(length: int, window: int, data: st.DataObject) -> None:
    assume(length >= window)
    stride = data.draw(st.integers(8, window - 1))
    starts = ring_starts(length, window, stride)
    gaps = [b - a for a, b in zip(starts, (*starts[1:], starts[0] + length), strict=True)]
    assert max(gaps) <= stride and max(gaps) - min(gaps) <= 1
    assert len(starts) >= 2
    covered = [sum((cell - start) % length < window for start in starts) for cell in range(length)]
    assert max(covered) - min(covered) <= 1
    spacings = [d for d in range(8, stride + 1) if length % d == 0 and window % d == 0]
    if spacings:
        assert max(covered) == min(covered) == window // max(spacings)
    else:
        assert len(starts) == ceil(length / stride)


@pytest.mark.parametrize(
    ("canvas", "stride", "message"),
    [
        (Canvas(15, 40), 8, "15 latent cells.*smaller than a window; try 16"),
        (Canvas(16, 40), 17, "stride=17: must be 1 to .*16.*try 8"),
        (Canvas(16, 40), 0, "stride=0: must be 1 to .*16.*try 8"),
        (Canvas(16, 40, "x"), 16, "stride=16: must be less than .*16.*ring.*try 8"),
    ],
)
def test_a_canvas_that_windows_cannot_cover_is_refused(
    canvas: Canvas, stride: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sliding_views(canvas, 16, stride)


@given(layouts(), st.integers(1, 12), st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_the_batch_of_windows_changes_nothing(layout: Layout, batch: int, seed: int) -> None:
    canvas, window, stride = layout
    networks, noise = Networks(), draw_noise(canvas.height, canvas.width, seed)

    def run(batch_size: int) -> torch.Tensor:
        return networks.run(
            canvas,
            Sliding(stride),
            SyncSettings(50.0, threshold=3),
            window=window,
            noise=noise,
            batch_size=batch_size,
        )

    count = max(map(len, Sliding(stride)(canvas, window, STEPS)))
    torch.testing.assert_close(run(batch), run(count), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@given(count=st.integers(2, 6), turns=st.integers(0, 7), vertical=st.booleans())
@settings(deadline=None, max_examples=10)
def test_a_ring_has_no_preferred_place(
    scheduler: str, count: int, turns: int, vertical: bool
) -> None:
    """Rolling the noise by window spacings rolls what is sampled."""
    spacing = 8
    length, dim = count * spacing, -2 if vertical else -1
    canvas = Canvas(length, 16, "y") if vertical else Canvas(16, length, "x")
    noise, networks = draw_noise(canvas.height, canvas.width, count), Networks()

    def run(noise: torch.Tensor) -> torch.Tensor:
        return networks.run(canvas, Sliding(spacing), scheduler=scheduler, noise=noise)

    rolled, expected = run(noise.roll(turns * spacing, dim)), run(noise).roll(turns * spacing, dim)
    torch.testing.assert_close(rolled, expected, rtol=1e-5, atol=1e-5)  # some step in float32
