"""Sampling a canvas: what each step computes, how windows are moved, and how a run can end."""

import logging
from collections.abc import Callable, Sequence
from math import nan
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from panorama.base_model import BaseModel
from panorama.errors import NotFiniteError
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.canvas import Canvas, View, crop
from panorama.sampling.denoiser import Conditioning
from panorama.sampling.sampler import sample
from panorama.sampling.solver import Solver, build_scheduler
from panorama.sampling.synchronize import Synchronizer, SyncSettings, gradient
from panorama.sampling.views import Sliding
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
    assert [settings.weight_at(k) for k in range(8)] == [0, 10.0, 0, 2.5, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight", -1.0), ("weight", nan), ("decay_rate", -0.1), ("freq", 0), ("threshold", -1)],
)
def test_settings_without_a_meaning_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}={value}: must be at least .*; try [01]"):
        SyncSettings(**{name: value})


# Which windows are computed, and how often


class Counting(Networks):
    """Counts the images that go through each network."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {"predict_noise": 0, "decode": 0, "gradients": 0}

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls["predict_noise"] += len(x)
        self.calls["gradients"] += len(x) * torch.is_grad_enabled()
        return super().predict_noise(x, t)

    def decode(self, x: Tensor) -> Tensor:
        self.calls["decode"] += len(x)
        return super().decode(x)


@pytest.mark.parametrize(
    ("weight", "threshold", "sync_steps"), [(0.0, 6, 0), (20.0, 0, 0), (20.0, 2, 2)]
)
@pytest.mark.parametrize("through_unet", [True, False])
@pytest.mark.parametrize(("width", "windows"), [(48, 5), (16, 1)])
def test_nothing_is_computed_twice(
    weight: float, threshold: int, sync_steps: int, through_unet: bool, width: int, windows: int
) -> None:
    networks = Counting()
    settings = SyncSettings(weight, threshold=threshold, through_unet=through_unet)
    networks.run(Canvas(16, width), Sliding(8), settings)
    sync_steps *= windows > 1  # a single window has no other to be like
    moved = (windows - 1) * sync_steps * through_unet
    assert networks.calls == {
        "predict_noise": windows * STEPS + moved,
        "decode": windows * sync_steps,
        "gradients": moved,
    }


@pytest.mark.parametrize("sync", [None, SyncSettings(20.0, threshold=2)])
def test_each_window_comes_with_its_view(sync: SyncSettings | None) -> None:
    """On a ring whose latents hold their own places, and stay."""
    places = torch.arange(16 * 48, dtype=torch.float64).view(1, 1, 16, 48).expand(1, 4, -1, -1)
    canvas, solver, seen = Canvas(16, 48, "x"), make_solver(), []

    def denoise(x: Tensor, t: Tensor, views: Sequence[View]) -> Tensor:
        seen.append(len(views))
        torch.testing.assert_close(solver.x0(x, torch.zeros_like(x), t), crop(places, views))
        return torch.zeros_like(x) * x

    class Flat(Networks):
        def distance(self, images: Tensor, features: list[Tensor]) -> Tensor:
            return 0 * images.mean((1, 2, 3))

    networks = Flat()
    latents = solver.level(solver.timesteps[0]).alpha * places
    sync_of_run = sync and Synchronizer(denoise, networks.decode, networks, solver, sync)
    views = Sliding(8)(canvas, WINDOW, STEPS)
    sample(latents, views, denoise, solver, sync=sync_of_run, batch_size=4)
    assert seen.count(4) == (STEPS if sync is None else STEPS - 2)  # of 6, the rest of each step 2


def test_on_step_sees_every_step() -> None:
    seen: list[tuple[int, int]] = []
    kept: list[Tensor] = []

    def on_step(step: int, steps: int, latents: Tensor) -> None:
        seen.append((step, steps))
        kept.append(latents)

    latents = Networks().run(STRIP, Sliding(8), on_step=on_step)
    assert seen == [(k, STEPS) for k in range(1, STEPS + 1)]
    assert torch.equal(kept[-1], latents) and not torch.equal(kept[-2], latents)


def test_on_step_may_stop_a_run() -> None:
    def on_step(step: int, steps: int, latents: Tensor) -> None:
        if step == 3:
            raise KeyboardInterrupt

    networks = Counting()
    with pytest.raises(KeyboardInterrupt):
        networks.run(STRIP, Sliding(8), on_step=on_step)
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
        networks.run(STRIP, Sliding(8))
    assert networks.calls["predict_noise"] == 3 * 5


# How windows are moved


@pytest.mark.parametrize("through_unet", [True, False])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_windows_move_alike_under_euler_and_ddim(through_unet: bool, step: int) -> None:
    """The x0 of moved windows agree to 1e-4, though Euler's latents are of another variance."""
    networks, ends = Networks(), []
    settings = SyncSettings(through_unet=through_unet)
    latents = draw_noise(16, 48)
    views = Sliding(16)(STRIP, WINDOW, 1)[0]
    for name in ("ddim", "euler"):
        solver = make_solver(name)
        t, sync = solver.timesteps[step], networks.synchronizer(solver, settings)
        x = crop(latents, views) * solver.level(t).variance ** 0.5
        with torch.no_grad():
            noise = networks.denoiser(solver)(x, t, views)
            target = sync.embed(x[:1], noise[:1], t)
            moved, noise_pred = sync.update(t, target, 300.0, x, views)
        ends.append(solver.x0(moved, noise_pred, t))
        assert (ends[-1] - solver.x0(x, noise, t)).abs().max() > 1e-2
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("through_unet", [True, False])
def test_a_synchronised_run_of_euler_ends_as_one_of_ddim(through_unet: bool) -> None:
    networks, ends = Networks(), []
    settings = SyncSettings(300.0, through_unet=through_unet)
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
                    sync=sync(solver, settings),
                )
            )
    ddim, unsynchronised, euler, _ = ends
    torch.testing.assert_close(ddim, euler, rtol=1e-4, atol=1e-4)
    assert (ddim - unsynchronised).abs().max() > 1e-2


class Sum(Networks):
    """A distance whose gradient is 1 in three of the four channels of x0."""

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def decode(self, x: Tensor) -> Tensor:
        return x[:, :3]

    def embed(self, images: Tensor) -> list[Tensor]:
        return []

    def distance(self, images: Tensor, features: list[Tensor]) -> Tensor:
        return images.sum((1, 2, 3))


def moves_of_x0(scheduler: str, steps: int, weight: float, x0: list[float]) -> Tensor:
    """Return how far x0 moves for each unit of weight, by step and window of one cell."""
    solver = make_solver(scheduler, steps)
    sync = Sum().synchronizer(solver, SyncSettings(through_unet=False))
    start = torch.tensor(x0, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 4, 1, 1)
    moves = []
    for t in solver.timesteps:
        x = solver.level(t).alpha * start
        moved, noise = sync.update(t, [], weight, x, [View(0, 0, 1, 1)] * len(x0))
        moves.append((start - solver.x0(moved, noise, t))[:, 0, 0, 0] / weight)
    return torch.stack(moves)


def test_x0_moves_as_far_as_docs_speed_says() -> None:
    moves = moves_of_x0("dpm++", 20, 1e-4, [0.5])
    assert moves[0] == pytest.approx(274, abs=0.5)
    assert moves[4] == pytest.approx(170, abs=1)
    assert moves[10] == pytest.approx(7, abs=0.5)
    assert moves[-8:].max() < 1 < moves[:-8].min()
    same = [moves_of_x0(name, 10, 1e-4, [0.5]) for name in ("ddim", "euler")]
    torch.testing.assert_close(*same, rtol=1e-4, atol=1e-6)


def test_no_window_moves_its_x0_by_more_than_the_length_of_x0() -> None:
    # Four equal values of x0 have a length of 2 x0; the move shares it among three of them.
    first = moves_of_x0("ddim", 20, 1.0, [0.25, 0.5, 0.0])[0]
    assert first.tolist() == pytest.approx([0.25 * 2 / 3**0.5, 0.5 * 2 / 3**0.5, 0.0])
    free = moves_of_x0("ddim", 20, 1e-4, [0.25, 0.5, 0.001])[0] * 1e-4
    assert free[0] == pytest.approx(float(free[1])) and free[0] < 0.25
    assert free[2] == pytest.approx(0.001 * 2 / 3**0.5)


def test_a_move_of_x0_follows_its_gradient_and_keeps_the_noise() -> None:
    networks, solver = Networks(), make_solver()
    settings = SyncSettings(through_unet=False, pooling=2)
    sync = networks.synchronizer(solver, settings)
    x, t = draw_noise(16, 32, seed=1).reshape(2, 4, 16, 16), solver.timesteps[2]
    views = [View(0, 0, 16, 16)] * 2
    with torch.no_grad():
        noise = networks.predict_noise(x, t)
        x0 = solver.x0(x, noise, t)
        target = sync.embed(x[:1] + 1, noise[:1], t)
        moved, kept = sync.update(t, target, 20.0, x, views)

    def distance(x0: Tensor) -> Tensor:
        coarse = x0.unflatten(-1, (8, 2)).mean(-1).unflatten(-2, (8, 2)).mean(-2)
        return networks.distance(networks.decode(coarse).clamp(-1, 1), target)

    assert torch.equal(kept, noise)
    x0.requires_grad_()
    (expected,) = torch.autograd.grad(distance(x0).sum(), x0)
    after = solver.x0(moved, noise, t)
    scale = 300 * (1 - solver.level(t).alpha_bar) ** 10
    torch.testing.assert_close(x0 - after, scale * 20.0 * expected, rtol=1e-4, atol=1e-6)
    assert (distance(after) < distance(x0)).all()


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
            Sliding(8),
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
    conditioning = Conditioning(torch.ones(2, 3, 128), None, 7.5)
    settings = Settings(
        prompt="",
        height=64,
        width=192,
        num_inference_steps=2,
        layout=Sliding(8),
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
