"""The laws that windows and sampling keep, whatever the sizes."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil, prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from panorama.sampling.canvas import Canvas, Fusion, View, crop
from panorama.sampling.solver import SCHEDULERS
from panorama.sampling.synchronize import SyncSettings
from panorama.sampling.views import (
    Disjoint,
    Sliding,
    Spanning,
    flat_starts,
    golden_offsets,
    ring_starts,
    sliding_views,
)
from tests.small import Networks, draw_noise

lengths = st.integers(8, 40)
Layout = tuple[Canvas, int, int]
"""A canvas, a window and a stride."""


def fuse(values: torch.Tensor, views: Sequence[View], canvas: torch.Tensor) -> torch.Tensor:
    fusion = Fusion(canvas, views)
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
    assert Fusion(values, views).weight.min() >= 1
    torch.testing.assert_close(fuse(crop(values, views), views, values), values)


@given(layouts())
def test_a_spanning_view_is_the_canvas(layout: Layout) -> None:
    canvas, window, _ = layout
    values = torch.randn(1, 2, canvas.height, canvas.width)
    ((view,),) = set(Spanning()(canvas, window, 3))
    assert torch.equal(crop(values, [view]), values)


@given(layouts())
@settings(deadline=None)
def test_windows_turn_on_a_ring_and_nowhere_else(layout: Layout) -> None:
    canvas, window, stride = layout
    still = sliding_views(canvas, window, stride)
    steps = Sliding(stride)(canvas, window, 100)
    assert len(steps) == 100
    if not canvas.closed:
        assert set(steps) == {still}
    for views in steps:
        moves = {(b.top - a.top, b.left - a.left) for a, b in zip(still, views, strict=True)}
        ((down, right),) = moves
        assert down == 0 or canvas.closed == "y"
        assert right == 0 or canvas.closed == "x"


@given(layouts())
@settings(deadline=None)
def test_disjoint_windows_cover_every_cell_at_every_step_and_are_few_until_the_last(
    layout: Layout,
) -> None:
    canvas, window, _ = layout
    values = torch.zeros(1, 1, canvas.height, canvas.width)
    # A flat side takes one more than would fit: both ends have a window that goes no further.
    most = [ceil(side / window) + (not ring and side > window) for side, ring in sides(canvas)]
    *apart, last = Disjoint()(canvas, window, window + 1)
    assert len(apart) == window
    for views in apart:
        assert Fusion(values, views).weight.min() >= 1
        assert len(views) <= prod(most)
    assert all(view.feathered for view in last)
    assert not any(view.feathered for views in apart for view in views)
    count = Fusion(values, [replace(view, feathered=False) for view in last]).weight
    assert count.min() >= 1
    # But for half a window at either end of a flat side, windows overlap along it.
    half = ceil(window / 2)
    ends = {True: slice(None), False: slice(half, -half)}
    inner = count[..., *(ends[ring or side == window] for side, ring in sides(canvas))]
    overlapping = 2 ** sum(side > window or ring for side, ring in sides(canvas))
    assert min(inner.shape) == 0 or inner.min() >= overlapping
    assert len(last) <= prod(ceil(side / (window // 2)) + 1 for side, _ in sides(canvas))


@given(layouts())
@settings(deadline=None)
def test_feathered_windows_leave_no_step_at_their_edges(layout: Layout) -> None:
    small, window, _ = layout
    canvas, window = Canvas(4 * small.height, 4 * small.width, small.closed), 4 * window
    for side, ring in sides(canvas):
        assume(ring or side == window or side >= 3 * window // 2)  # or they overlap by far more
    (views,) = Disjoint()(canvas, window, 1)
    values = torch.zeros(1, 1, canvas.height, canvas.width, dtype=torch.float64)
    same = torch.ones(len(views), 1, window, window, dtype=torch.float64)
    torch.testing.assert_close(fuse(same, views, values), values + 1)
    unlike = same * (torch.arange(len(views)) % 2).view(-1, 1, 1, 1)
    fused = fuse(unlike, views, values)
    for dim, (_, ring) in zip((-2, -1), sides(canvas), strict=True):
        begin = fused.narrow(dim, 0, 1) if ring else None
        assert fused.diff(dim=dim, append=begin).abs().max() <= 4 / window  # at most 1 / 8


@given(blocks=st.integers(2, 6), window=lengths, ring=st.booleans())
def test_disjoint_windows_share_no_cell_but_at_the_ends_of_a_flat_canvas(
    blocks: int, window: int, ring: bool
) -> None:
    edges, width = set(), blocks * window
    canvas = Canvas(window, width, "x" if ring else "")
    for views in Disjoint()(canvas, window, window + 1)[:-1]:
        inner = views if ring else [v for v in views if v.left not in (0, width - window)]
        covered = [cell % width for v in inner for cell in range(v.left, v.left + window)]
        assert len(covered) == len(set(covered))
        edges |= {view.left % window for view in views}
    assert edges == set(range(window))  # no edge stays


@given(st.integers(1, 200))
def test_offsets_visit_every_cell_before_any_again(gap: int) -> None:
    first = gap // 3
    assert golden_offsets(gap, first)[0] == first
    assert sorted(golden_offsets(gap, first)) == list(range(gap))


@given(gap=st.integers(8, 200), first=st.integers(0, 7))
def test_offsets_of_consecutive_steps_lie_apart(gap: int, first: int) -> None:
    for a, b in pairwise(golden_offsets(gap, first)):
        assert min((a - b) % gap, (b - a) % gap) >= gap / 4  # golden sections: 0.38


@given(count=st.integers(2, 8), window=st.integers(16, 40), ring=st.booleans())
@settings(deadline=None)
def test_layouts_move_by_golden_offsets(count: int, window: int, ring: bool) -> None:
    """Edges of consecutive steps lie at least a quarter of the gap between windows apart."""
    canvas = Canvas(window, count * window, "x" if ring else "")
    lefts = [views[1].left for views in Disjoint()(canvas, window, window)[:-1]]
    moved = [(lefts, window)]
    if ring:
        turned = Sliding(window // 2)(canvas, window, window)
        gap = ceil(canvas.width / len(turned[0]))
        moved.append(([views[0].left for views in turned], gap))
    for places, gap in moved:
        for a, b in pairwise(places):
            assert min((a - b) % gap, (b - a) % gap) >= gap / 4


@given(count=st.integers(3, 8), window=st.integers(16, 40))
def test_synchronised_steps_have_their_edges_off_a_rings_seam(count: int, window: int) -> None:
    canvas = Canvas(window, count * window, "x")
    first, *_ = Sliding(window // 2)(canvas, window, 20)
    assert all(v.left % canvas.width and (v.left + window) % canvas.width for v in first)
    disjoint = Disjoint()(canvas, window, 20)[:5]
    on_seam = [any(view.left % canvas.width == 0 for view in views) for views in disjoint]
    assert on_seam == [True, False, False, False, False]


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

    count = len(sliding_views(canvas, window, stride))
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
