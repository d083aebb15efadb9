"""Sampling a canvas: what each step computes, how windows are moved, and how a run can end."""

import logging
from collections.abc import Callable, Sequence
from itertools import product
from math import exp, nan, pi
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from panorama.base_model import BaseModel
from panorama.errors import NotFiniteError
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.canvas import Axis, Canvas, View, crop
from panorama.sampling.denoiser import Conditioning
from panorama.sampling.sampler import sample, sync_steps
from panorama.sampling.solver import Solver, build_scheduler
from panorama.sampling.synchronize import (
    PerceptualGradient,
    Synchronizer,
    SyncSettings,
    SyncStep,
    gradient,
    smooth,
)
from panorama.sampling.views import Fixed, Sliding, sliding_views
from tests.small import (
    STEPS,
    WINDOW,
    Networks,
    draw_noise,
    make_solver,
    own_scheduler,
    small_unet,
    small_vae,
)

STRIP = Canvas(16, 48)


def test_the_weights_are_those_of_the_paper() -> None:
    settings = SyncSettings(weight=20.0, decay_rate=0.5, freq=2, threshold=5)
    found = [settings.at(k) for k in range(8)]
    assert [step and step.weight for step in found] == [None, 10.0, None, 2.5, *[None] * 4]
    assert all(step.gradient and not step.means for step in found if step)


def test_gradient_and_means_have_steps_of_their_own() -> None:
    settings = SyncSettings(threshold=1, means=3)
    found = [settings.at(k) for k in range(4)]
    assert [step and (step.gradient, step.means) for step in found] == [
        (True, True),
        (False, True),
        (False, True),
        None,
    ]
    assert SyncSettings(weight=0, threshold=1, means=3).at(0) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", -1.0),
        ("weight", nan),
        ("decay_rate", -0.1),
        ("freq", 0),
        ("threshold", -1),
        ("means", -1),
    ],
)
def test_settings_without_a_meaning_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}={value}: must be at least .*; try [01]"):
        SyncSettings(**{name: value})


# Which windows are computed, and how often


class Counting(Networks):
    """Counts the images that go through each network."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {"predict_noise": 0, "decode": 0, "compared": 0, "gradients": 0}

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls["predict_noise"] += len(x)
        self.calls["gradients"] += len(x) * torch.is_grad_enabled()
        return super().predict_noise(x, t)

    def decode(self, x: Tensor) -> Tensor:
        self.calls["decode"] += len(x)
        return super().decode(x)

    def distance(self, images: Tensor, features: list[Tensor]) -> Tensor:
        self.calls["compared"] += len(images)
        return super().distance(images, features)


@pytest.mark.parametrize(
    ("weight", "threshold", "sync_steps"), [(0.0, 6, 0), (20.0, 0, 0), (20.0, 2, 2)]
)
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("means", [True, False])
@pytest.mark.parametrize(("width", "windows"), [(48, 5), (16, 1)])
def test_nothing_is_computed_twice(
    weight: float,
    threshold: int,
    sync_steps: int,
    gradient: bool,
    means: bool,
    width: int,
    windows: int,
) -> None:
    """And without the gradient nothing is decoded or compared."""
    networks = Counting()
    settings = SyncSettings(weight, threshold=threshold * gradient, means=threshold * means)
    networks.run(Canvas(16, width), Fixed(8), settings)
    sync_steps *= windows > 1  # a single window has no other to be like
    moved = (windows - 1) * sync_steps * gradient
    assert networks.calls == {
        "predict_noise": windows * STEPS + moved,
        "decode": windows * sync_steps * gradient,
        "compared": moved,
        "gradients": moved,
    }


@pytest.mark.parametrize("sync", [None, SyncSettings(20.0, threshold=2)])
@pytest.mark.parametrize("closed", ["", "x"])
def test_each_window_comes_with_its_view(sync: SyncSettings | None, closed: Axis) -> None:
    """On a canvas whose latents hold their own places, and stay."""
    places = torch.arange(16 * 48, dtype=torch.float64).view(1, 1, 16, 48).expand(1, 4, -1, -1)
    canvas, solver, seen = Canvas(16, 48, closed), make_solver(), []

    def denoise(x: Tensor, t: Tensor, views: Sequence[View]) -> Tensor:
        seen.append(len(views))
        expected = crop(places, views, closed)
        torch.testing.assert_close(solver.x0(x, torch.zeros_like(x), t), expected)
        return torch.zeros_like(x) * x

    class Flat(Networks):
        def distance(self, images: Tensor, features: list[Tensor]) -> Tensor:
            return 0 * images.mean((1, 2, 3))

    networks = Flat()
    latents = solver.level(solver.timesteps[0]).alpha * places
    gradient = PerceptualGradient(denoise, networks.decode, networks, solver)
    run = sync and Synchronizer(sync, denoise, canvas, WINDOW, gradient=gradient)
    views = Sliding(8)(canvas, WINDOW, STEPS)
    overhanging = any(view.left < 0 for step in views for view in step)
    assert overhanging is not bool(closed)
    sample(latents, views, denoise, solver, closed=closed, sync=run, batch_size=4)
    again = [len(step) - 1 for step in views[: 2 if sync else 0]]  # for the gradient
    assert sum(seen) == sum(map(len, views)) + sum(again)
    assert max(seen) == 4


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_on_step_sees_every_step_and_the_x0_that_it_predicts(scheduler: str) -> None:
    """From one window, which is not synchronised, by the formula of its latents."""
    seen: list[tuple[int, int]] = []
    kept: list[Tensor] = []
    networks, canvas, solver = Networks(), Canvas(16, 16), make_solver(scheduler)

    def on_step(step: int, steps: int, x0: Tensor) -> None:
        seen.append((step, steps))
        kept.append(x0)

    latents = networks.run(canvas, Fixed(8), scheduler=scheduler, on_step=on_step)
    assert seen == [(k, STEPS) for k in range(1, STEPS + 1)]
    t, x = solver.timesteps[0], solver.initial(draw_noise(16, 16))
    alpha_bar = float(own_scheduler().alphas_cumprod[int(t)])
    unit = x if scheduler == "ddim" else x * alpha_bar**0.5
    with torch.no_grad():
        noise = networks.predict_noise(unit, t)
    expected = (unit - (1 - alpha_bar) ** 0.5 * noise) / alpha_bar**0.5
    torch.testing.assert_close(kept[0], expected, rtol=1e-3, atol=1e-3)
    difference = (kept[-1] - latents).abs().max()
    # Euler ends at x0, DDIM at the first level of the schedule.
    assert difference < (1e-4 if scheduler == "euler" else 0.1)


def test_on_step_may_stop_a_run() -> None:
    def on_step(step: int, steps: int, latents: Tensor) -> None:
        if step == 3:
            raise KeyboardInterrupt

    networks = Counting()
    with pytest.raises(KeyboardInterrupt):
        networks.run(STRIP, Fixed(8), on_step=on_step)
    assert networks.calls["predict_noise"] == 3 * 5


@pytest.mark.parametrize("value", [nan, torch.inf])
def test_latents_that_are_not_finite_name_the_step(value: float) -> None:
    class Failing(Counting):
        def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
            noise = super().predict_noise(x, t)
            if self.calls["predict_noise"] > 2 * 5:
                noise[-1, 0, 3, 3] = value  # one cell of one window
            return noise

    networks = Failing()
    with pytest.raises(NotFiniteError, match=f"step 3 of {STEPS}"):
        networks.run(STRIP, Fixed(8))


class Reads(TorchDispatchMode):
    """Counts how often the host reads whether all of the latents are something.

    On a GPU it would wait. Timesteps are read too, but they stay on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func is torch.ops.aten.all.default and args[0].numel() >= STRIP.height * STRIP.width:
            self.made.append(result)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += any(args[0] is made for made in self.made)
        return result


def test_no_step_waits_for_the_device() -> None:
    with Reads() as reads:
        Networks().run(STRIP, Fixed(8))
    assert (len(reads.made), reads.count) == (STEPS, 0)
    with reads:
        assert torch.ones(STRIP.height, STRIP.width).isfinite().all()
    assert reads.count == 1


# How windows are moved


MOVING = SyncStep(300.0, gradient=True, means=False)
SHARING = SyncStep(3.0, gradient=False, means=True)
WAYS = {
    "gradient": SyncSettings(300.0),
    "means": SyncSettings(0.5, threshold=0, means=5),
    "both": SyncSettings(3.0, means=5),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", [0, 1, 2])
def test_windows_move_alike_under_euler_and_ddim(way: str, step: int) -> None:
    """The x0 of moved windows agree to 1e-4, though Euler's latents are of another variance."""
    networks, ends = Networks(), []
    latents = draw_noise(16, 48)
    views = sliding_views(STRIP, WINDOW, 16)
    for name in ("ddim", "euler"):
        solver = make_solver(name)
        t, sync = solver.timesteps[step], networks.synchronizer(solver, STRIP, WAYS[way])
        x = crop(latents, views) * solver.level(t).variance ** 0.5
        with torch.no_grad():
            noise = networks.denoiser(solver)(x, t, views)
            found = WAYS[way].at(0)
            assert found
            anchors = sync.anchors(t, found, x[:1], noise[:1])
            moved, noise_pred = sync.update(t, anchors, found, x, views)
        ends.append(solver.x0(moved, noise_pred, t))
        assert (ends[-1] - solver.x0(x, noise, t)).abs().max() > 1e-2
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_synchronised_run_of_euler_ends_as_one_of_ddim(way: str) -> None:
    networks, ends = Networks(), []
    own = own_scheduler()
    for scheduler in (
        DDIMScheduler.from_config(own.config, set_alpha_to_one=True),  # as Euler ends
        build_scheduler("euler", own),
    ):
        for sync in (networks.synchronizer, lambda *_: None):
            solver = Solver(scheduler, STEPS)
            ends.append(
                sample(
                    solver.initial(draw_noise(16, 48)),
                    Sliding(8)(STRIP, WINDOW, STEPS),
                    networks.denoiser(solver),
                    solver,
                    sync=sync(solver, STRIP, WAYS[way]),
                )
            )
    ddim, unsynchronised, euler, _ = ends
    torch.testing.assert_close(ddim, euler, rtol=1e-4, atol=1e-4)
    assert (ddim - unsynchronised).abs().max() > 1e-2


def shared(
    canvas: Canvas, x: Tensor, anchors: Tensor, weight: float, weights: list[list[float]]
) -> Tensor:
    """Share the means of anchors with windows, by the weights of the anchors for each window."""
    sync = Networks().synchronizer(make_solver(), canvas, WAYS["means"])
    return sync.share_means(x, anchors, weight, torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize(
    ("canvas", "dims"),
    [
        (Canvas(16, 48), [-1]),
        (Canvas(48, 16), [-2]),
        (Canvas(16, 16, "x"), [-1]),
        (Canvas(16, 48, "y"), [-1, -2]),
        (Canvas(48, 48), [-1, -2]),
    ],
)
def test_shared_means_move_and_nothing_else_does(canvas: Canvas, dims: list[int]) -> None:
    """On a wide canvas they are those of rows, on a tall one of columns, else of channels."""
    x, anchor = draw_noise(16, 32, seed=1).reshape(2, 4, 16, 16), draw_noise(16, 16, seed=2)
    moved = shared(canvas, x, anchor, 3.0, [[1.0], [1.0]])
    own, theirs, new = (values.mean(dims, keepdim=True) for values in (x, anchor, moved))
    torch.testing.assert_close(new - own, 0.75 * smooth(theirs - own, 2.0))
    torch.testing.assert_close(moved - new, x - own)


def test_of_the_difference_between_means_only_what_is_smooth_moves() -> None:
    """A palette that changes slowly from row to row is taken over, single rows are not."""
    rows = torch.arange(64, dtype=torch.float64)[:, None]
    slow, fast = (rows / 64 * pi).cos(), rows % 2 * 2 - 1
    torch.testing.assert_close(smooth(slow, 8.0), slow, rtol=0, atol=0.25)
    assert smooth(fast, 8.0).abs().max() < 0.1
    torch.testing.assert_close(smooth(torch.ones(64, 1), 8.0), torch.ones(64, 1))


def test_smoothing_is_a_gaussian_mean_of_places() -> None:
    """Equal to plain loops."""
    x, expected = draw_noise(6, 5, seed=3), torch.zeros(1, 4, 6, 5, dtype=torch.float64)
    for row, column in product(range(6), range(5)):
        total = 0.0
        for other, place in product(range(6), range(5)):
            squared = (other - row) ** 2 + (place - column) ** 2
            weight = exp(-squared / (2 * 1.5**2))
            expected[..., row, column] += weight * x[..., other, place]
            total += weight
        expected[..., row, column] /= total
    torch.testing.assert_close(smooth(x, 1.5), expected)


def test_no_weight_moves_no_mean_and_the_anchor_stays() -> None:
    x, anchor = draw_noise(16, 16, seed=1), draw_noise(16, 16, seed=2)
    assert torch.equal(shared(STRIP, x, anchor, 0.0, [[1.0]]), x)
    torch.testing.assert_close(shared(STRIP, anchor, anchor, 20.0, [[1.0]]), anchor)


@pytest.mark.parametrize(("left", "share"), [(0, 1.0), (8, 1.0), (24, 0.5), (28, 0.25), (48, 0.0)])
def test_a_window_between_two_anchors_moves_to_means_between_theirs(
    left: int, share: float
) -> None:
    """Parts of 32 cells, whose middle halves are theirs alone."""
    canvas, solver, networks = Canvas(16, 64), make_solver(), Networks()
    sync = networks.synchronizer(solver, canvas, WAYS["means"], parts=2)
    t, view = solver.timesteps[0], View(0, left, 16, 16)
    x, anchors = draw_noise(16, 16, seed=1), draw_noise(16, 32, seed=2).reshape(2, 4, 16, 16)
    with torch.no_grad():
        of_anchors = networks.predict_noise(anchors, t)
        moved, noise_pred = sync.update(
            t, sync.anchors(t, SHARING, anchors, of_anchors), SHARING, x, [view]
        )
        noise = networks.predict_noise(moved, t)
    for found, own, theirs in ((moved, x, anchors), (noise_pred, noise, of_anchors)):
        first, second = theirs.mean(-1)
        difference = share * first + (1 - share) * second - own.mean(-1)
        move = 0.75 * smooth(difference[..., None], 2.0)[..., 0]
        torch.testing.assert_close(found.mean(-1), own.mean(-1) + move)


def test_a_window_between_two_anchors_descends_towards_both() -> None:
    canvas, solver, networks = Canvas(16, 64), make_solver(), Networks()
    t, view = solver.timesteps[0], View(0, 28, 16, 16)  # a quarter of the first, the rest not
    x, anchors = draw_noise(16, 16, seed=1), draw_noise(16, 32, seed=2).reshape(2, 4, 16, 16)
    moves = []
    with torch.no_grad():
        noise = networks.predict_noise(anchors, t)
        for parts, chosen in ((2, [0, 1]), (1, [0]), (1, [1])):
            sync = networks.synchronizer(solver, canvas, WAYS["gradient"], parts=parts)
            found = sync.anchors(t, MOVING, anchors[chosen], noise[chosen])
            moves.append(sync.update(t, found, MOVING, x, [view])[0] - x)
    both, first, second = moves
    assert (first - second).abs().max() > 1e-2
    torch.testing.assert_close(both, 0.25 * first + 0.75 * second, rtol=1e-5, atol=1e-8)


def test_every_part_has_an_anchor_that_stays() -> None:
    """At steps where all windows are anchors none moves."""
    canvas, networks = Canvas(16, 64), Networks()
    views = sliding_views(canvas, WINDOW, 16)
    for parts, anchors in ((1, [32]), (2, [16, 48]), (4, [0, 16, 32, 48])):
        sync = networks.synchronizer(make_solver(), canvas, WAYS["means"], parts=parts)
        found, others = sync.split(views)
        assert [view.left for view in found] == anchors
        assert sorted([*found, *others], key=lambda view: view.left) == list(views)
        moves = bool(others)
        assert [bool(s) for s in sync_steps(sync.settings, parts, [views] * STEPS)] == [
            moves
        ] * 5 + [False]


def test_small_gradients_survive_half_precision() -> None:
    """Half precision has nothing between 0 and 6e-8."""

    def distance(x: Tensor) -> Tensor:
        return 2e-8 * x.half().float().sum(1)

    found = gradient(distance, torch.ones(2, 3))
    torch.testing.assert_close(found, torch.full((2, 3), 2e-8), rtol=0.01, atol=0)


def test_in_single_precision_the_gradient_is_exact() -> None:
    x = torch.randn(2, 999, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(x.sin().sum(), x)
    assert torch.equal(gradient(lambda x: x.sin().sum(1), x), expected)


# Memory that runs out


class Memory(Networks):
    """Has room for some windows at once, and for some of them with a gradient."""

    def __init__(self, room: int, with_gradient: int, with_checkpointing: int = 0) -> None:
        super().__init__()
        self.room, self.with_gradient = room, with_gradient
        self.with_checkpointing = with_checkpointing
        self.batches: list[int] = []
        self.saved = 0

    def save_memory(self) -> bool:
        """Turn checkpointing on, once, if that helps."""
        self.saved += 1
        turned_on = self.with_gradient < self.with_checkpointing
        if turned_on:
            self.with_gradient = self.with_checkpointing
        return turned_on

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        self.batches.append(len(x))
        if len(x) > (self.with_gradient if torch.is_grad_enabled() else self.room):
            raise torch.OutOfMemoryError(f"no memory for {len(x)} windows")
        return super().predict_noise(x, t)

    def latents(self) -> Tensor:
        """Sample nine windows, at two sync steps and four others."""
        return self.run(
            Canvas(16, 80),
            Fixed(8),
            SyncSettings(300.0, threshold=2),
            scheduler="unipc",
            batch_size=9,
            save_memory=self.save_memory,
        )


@pytest.fixture(scope="module")
def with_ample_memory() -> Tensor:
    return Memory(room=9, with_gradient=9).latents()


def test_too_little_memory_halves_the_batch_and_changes_nothing(
    with_ample_memory: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    short = Memory(room=2, with_gradient=2)
    torch.testing.assert_close(short.latents(), with_ample_memory, rtol=1e-9, atol=1e-9)
    # Half as many as asked for where they are synchronised, and never again so many.
    assert [n for n in short.batches if n > 2] == [4, 9, 4]
    assert short.saved == 1  # no later than in the sync step
    assert logged(caplog) == [("windows", 4, 2), ("windows", 9, 4), ("windows", 4, 2)]


@pytest.mark.parametrize(
    ("with_checkpointing", "expected"),
    [
        (4, [("checkpointing", 4)]),
        (2, [("checkpointing", 4), ("windows", 4, 2)]),
    ],
)
def test_a_sync_step_turns_checkpointing_on_before_it_halves_the_batch(
    with_checkpointing: int,
    expected: list[tuple[Any, ...]],
    with_ample_memory: Tensor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    short = Memory(room=9, with_gradient=1, with_checkpointing=with_checkpointing)
    torch.testing.assert_close(short.latents(), with_ample_memory, rtol=1e-9, atol=1e-9)
    assert logged(caplog) == expected


def test_a_plain_step_only_halves_the_batch(
    with_ample_memory: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    short = Memory(room=4, with_gradient=4, with_checkpointing=9)
    torch.testing.assert_close(short.latents(), with_ample_memory, rtol=1e-9, atol=1e-9)
    assert logged(caplog) == [("windows", 9, 4)]
    assert short.saved == 0


def test_too_little_memory_for_one_window_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="1 windows"):
        Memory(room=0, with_gradient=0).latents()


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[Any, ...]]:
    """Return the subject and the numbers of each warning."""
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return [
        ("checkpointing" if "checkpointing" in record.getMessage() else "windows", *record.args)
        for record in caplog.records
    ]


def test_the_pipeline_turns_the_checkpointing_of_its_networks_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    unet, vae, networks = small_unet(), small_vae(), Networks().float()
    base = BaseModel(unet, vae, (), own_scheduler(), perceptual=networks)
    conditioning = Conditioning(torch.ones(2, 1, 3, 128), None, 7.5)
    settings = Settings(
        prompt="",
        height=64,
        width=192,
        num_inference_steps=2,
        layout=Fixed(8),
        sync=SyncSettings(100.0),
    )
    noise = draw_noise(16, 48).float()
    expected = Pipeline(base).denoise(settings, conditioning, noise)

    def refuse(*_: Any) -> None:
        if torch.is_grad_enabled() and not unet.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("no memory for a gradient without checkpointing")

    hook: Callable[..., Any] = unet.register_forward_pre_hook(refuse)
    latents = Pipeline(base).denoise(settings, conditioning, noise)
    hook.remove()
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert logged(caplog) == [("checkpointing", 4)]
    assert not unet.is_gradient_checkpointing
    assert not vae.is_gradient_checkpointing
