"""The laws that windows, sampling and decoding keep, whatever the sizes."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from math import ceil, prod

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from panorama.sampler import sample
from panorama.synchronize import Synchronizer, SyncSchedule
from panorama.views import (
    Fusion,
    View,
    crop,
    disjoint_views,
    flat_starts,
    make_views,
    ring_starts,
    step_views,
    turns,
)
from tests.numeric.test_plain_loop import Networks, make_scheduler

sizes = st.integers(8, 40)


def fuse(windows: torch.Tensor, views: Sequence[View], canvas: torch.Tensor) -> torch.Tensor:
    fusion = Fusion(canvas, views)
    fusion.add(windows, views)
    return fusion.mean()


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, int | bool]:
    size = draw(sizes)
    ring = draw(st.sampled_from(["", "x", "y"]))
    return {
        "height": size + draw(st.integers(0, 60)),
        "width": size + draw(st.integers(0, 60)),
        "size": size,
        "stride": draw(st.integers(8, size - 1 if ring and size > 8 else size)),
        "ring_x": ring == "x" and size > 8,
        "ring_y": ring == "y" and size > 8,
    }


@given(layouts())
@settings(deadline=None)
def test_every_cell_is_covered_and_fuse_undoes_crop(layout: dict[str, int]) -> None:
    views = make_views(**layout)
    canvas = torch.randn(1, 2, layout["height"], layout["width"], dtype=torch.float64)
    assert Fusion(canvas, views).weight.min() >= 1
    torch.testing.assert_close(fuse(crop(canvas, views), views, canvas), canvas)


@given(layouts())
@settings(deadline=None)
def test_windows_turn_on_a_ring_and_nowhere_else(layout: dict[str, int]) -> None:
    still, turned = make_views(**layout), step_views(**layout)
    if not (layout["ring_x"] or layout["ring_y"]):
        assert turned == (still,)
    for views in turned:
        moves = {(b.top - a.top, b.left - a.left) for a, b in zip(still, views, strict=True)}
        ((down, right),) = moves
        assert down == 0 or layout["ring_y"]
        assert right == 0 or layout["ring_x"]


@given(layouts())
@settings(deadline=None)
def test_disjoint_windows_cover_every_cell_at_every_step_and_are_few_until_the_last(
    layout: dict[str, int],
) -> None:
    stride = layout.pop("stride")
    assert stride <= layout["size"]
    size = layout["size"]
    canvas = torch.zeros(1, 1, layout["height"], layout["width"])
    sides = [(layout["height"], layout["ring_y"]), (layout["width"], layout["ring_x"])]
    # On a flat canvas one more than would fit: both ends have a window that goes no further.
    most = [ceil(side / size) + (not ring and side > size) for side, ring in sides]
    *apart, last = disjoint_views(**layout, steps=size + 1)
    assert len(apart) == size
    for views in apart:
        assert Fusion(canvas, views).weight.min() >= 1
        assert len(views) <= most[0] * most[1]
    assert all(view.fades for view in last) and not any(v.fades for views in apart for v in views)
    count = Fusion(canvas, [replace(view, fades=False) for view in last]).weight
    assert count.min() >= 1
    # But for half a window at either end of a flat side, windows overlap along it.
    half = ceil(size / 2)
    ends = {True: slice(None), False: slice(half, -half)}
    inner = count[..., *(ends[ring or side == size] for side, ring in sides)]
    overlapping = 2 ** sum(side > size or ring for side, ring in sides)
    assert min(inner.shape) == 0 or inner.min() >= overlapping
    assert len(last) <= prod(ceil(side / (size // 2)) + 1 for side, _ in sides)


@given(layouts())
@settings(deadline=None)
def test_fading_windows_leave_no_step_at_their_edges(layout: dict[str, int]) -> None:
    height, width, size = (4 * layout[name] for name in ("height", "width", "size"))
    rings = {name: layout[name] for name in ("ring_x", "ring_y")}
    for side, ring in ((height, rings["ring_y"]), (width, rings["ring_x"])):
        assume(ring or side == size or side >= 3 * size // 2)  # or windows overlap by far more
    (views,) = disjoint_views(height, width, size, steps=1, **rings)
    canvas = torch.zeros(1, 1, height, width, dtype=torch.float64)
    same = torch.ones(len(views), 1, size, size, dtype=torch.float64)
    torch.testing.assert_close(fuse(same, views, canvas), canvas + 1)
    unlike = same * (torch.arange(len(views)) % 2).view(-1, 1, 1, 1)
    fused = fuse(unlike, views, canvas)
    for dim, ring in ((-2, rings["ring_y"]), (-1, rings["ring_x"])):
        begin = fused.narrow(dim, 0, 1) if ring else None
        assert fused.diff(dim=dim, append=begin).abs().max() <= 4 / size  # at most 1 / 8


@given(blocks=st.integers(2, 6), size=sizes, ring=st.booleans())
def test_disjoint_windows_share_no_cell_but_at_the_ends_of_a_flat_canvas(
    blocks: int, size: int, ring: bool
) -> None:
    edges = set()
    for views in disjoint_views(size, blocks * size, size, size + 1, ring_x=ring)[:-1]:
        inner = views if ring else [v for v in views if v.left not in (0, (blocks - 1) * size)]
        covered = [cell % (blocks * size) for v in inner for cell in range(v.left, v.left + size)]
        assert len(covered) == len(set(covered))
        edges |= {view.left % size for view in views}
    assert edges == set(range(size))  # no edge stays


@given(st.integers(1, 200))
def test_turns_visit_every_offset_before_any_again(gap: int) -> None:
    first = gap // 3
    assert turns(gap, first)[0] == first
    assert sorted(turns(gap, first)) == list(range(gap))


@given(count=st.integers(3, 8), size=st.integers(16, 40))
def test_synchronised_steps_have_their_edges_off_a_rings_seam(count: int, size: int) -> None:
    width = count * size
    first, *_ = step_views(size, width, size, size // 2, ring_x=True)
    assert all(view.left % width and (view.left + size) % width for view in first)
    disjoint = disjoint_views(size, width, size, 20, ring_x=True)[:5]
    on_seam = [any(view.left % width == 0 for view in views) for views in disjoint]
    assert on_seam == [True, False, False, False, False]


@given(size=sizes, blocks=st.integers(0, 9), data=st.data())
def test_multiples_of_the_stride_give_the_published_list(
    size: int, blocks: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(8, size))
    starts = flat_starts(size + blocks * stride, size, stride)
    assert starts == tuple(i * stride for i in range(blocks + 1))


@given(length=st.integers(16, 400), size=st.sampled_from([16, 32, 64]), data=st.data())
def test_a_ring_is_covered_evenly(length: int, size: int, data: st.DataObject) -> None:
    assume(length >= size)
    stride = data.draw(st.integers(8, size - 1))
    starts = ring_starts(length, size, stride)
    gaps = [b - a for a, b in zip(starts, (*starts[1:], starts[0] + length), strict=True)]
    assert max(gaps) <= stride and max(gaps) - min(gaps) <= 1
    assert len(starts) >= 2
    covered = [sum((cell - start) % length < size for start in starts) for cell in range(length)]
    assert max(covered) - min(covered) <= 1
    spacings = [d for d in range(8, stride + 1) if length % d == 0 and size % d == 0]
    if spacings:
        assert max(covered) == min(covered) == size // max(spacings)
    else:
        assert len(starts) == ceil(length / stride)


@given(layouts(), st.integers(1, 12), st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_the_batch_of_windows_changes_nothing(
    layout: dict[str, int], batch: int, seed: int
) -> None:
    views = step_views(**layout)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 4, layout["height"], layout["width"], generator=generator)
    networks, solver = Networks(), make_scheduler("ddim")
    synchronizer = Synchronizer(
        networks.predict_noise, networks.decode, networks, solver.alphas_cumprod
    )

    def run(view_batch_size: int) -> torch.Tensor:
        return sample(
            noise.double(),
            views,
            networks.predict_noise,
            copy.deepcopy(solver),
            synchronizer=synchronizer,
            schedule=SyncSchedule(50.0, threshold=3),
            view_batch_size=view_batch_size,
        )

    torch.testing.assert_close(run(batch), run(len(views[0])), rtol=1e-9, atol=1e-9)


@given(count=st.integers(2, 6), turns=st.integers(0, 7), vertical=st.booleans())
@settings(deadline=None, max_examples=15)
def test_a_ring_has_no_preferred_place(count: int, turns: int, vertical: bool) -> None:
    """Rolling the noise by window spacings rolls what is sampled."""
    spacing, size = 8, 16
    length, dim = count * spacing, -2 if vertical else -1
    assume(length >= size)
    shape = (1, 4, length, size) if vertical else (1, 4, size, length)
    views = step_views(*shape[-2:], size, spacing, ring_x=not vertical, ring_y=vertical)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(count)).double()
    networks, solver = Networks(), make_scheduler("unipc")

    def run(z: torch.Tensor) -> torch.Tensor:
        return sample(z, views, networks.predict_noise, copy.deepcopy(solver))

    rolled = run(noise.roll(turns * spacing, dim))
    torch.testing.assert_close(rolled, run(noise).roll(turns * spacing, dim))
