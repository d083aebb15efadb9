"""Enlarging an image, starting from one, and redrawing poles, on a small random model."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from panorama.base_model import BaseModel
from panorama.images.sphere import Face
from panorama.images.vae import encode, encode_canvas, resize
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.canvas import Canvas
from panorama.sampling.circular import circular
from panorama.sampling.low_band import LowBand, smooth
from panorama.sampling.solver import Solver
from panorama.sampling.views import Feathered, Sliding, Spanning
from tests.small import small_vae
from tests.small_sdxl import build

SCHEDULERS = [
    DDIMScheduler(clip_sample=False),
    EulerDiscreteScheduler(),
    DPMSolverMultistepScheduler(),
    UniPCMultistepScheduler(),
]
TINY = Path(__file__).parents[2] / "weights" / "tiny" / "sd2"
kinds = pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return build()


def sphere(**changes: Any) -> Settings:
    inputs: dict[str, Any] = {"prompt": "night over the sea", "height": 256, "width": 512}
    inputs |= {"closed": "x", "layout": Feathered(), "num_inference_steps": 6, "strength": 0.5}
    return Settings(**inputs | changes)


def picture(height: int, width: int) -> Tensor:
    """Return a smooth image that closes left to right."""
    places = torch.linspace(0, 2 * torch.pi, width + 1)[:-1]
    rows = torch.linspace(0.2, 0.8, height)[:, None]
    channels = [rows + 0.15 * (places * k).sin() for k in (1, 2, 3)]
    return torch.stack([c.expand(height, width) for c in channels])[None]


def noise_of(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Encoding


def test_encoding_a_ring_commutes_with_rolling_though_the_encoder_pads_outside() -> None:
    vae, image = small_vae().double(), torch.randn(1, 3, 32, 80, dtype=torch.float64)
    latents = encode_canvas(vae, image, "x")
    for cells in (1, 5, 13):
        rolled = encode_canvas(vae, image.roll(4 * cells, -1), "x")
        torch.testing.assert_close(rolled, latents.roll(cells, -1), atol=1e-6, rtol=0)
    assert (encode_canvas(vae, image.roll(4, -1)) - latents.roll(1, -1)).abs().max() > 1e-3


def test_wrapping_the_encoder_nests_and_leaves_nothing_behind() -> None:
    vae, image = small_vae(), torch.randn(1, 3, 32, 48)
    before = [dict(vars(m)) for m in vae.modules()]
    with torch.no_grad():
        plain = encode(vae, image)
        with pytest.raises(RuntimeError, match="stop"), circular(vae, axes="xy"):
            with circular(vae, axes=""):
                assert torch.equal(encode(vae, image), plain)
            assert not torch.equal(encode(vae, image), plain)
            raise RuntimeError("stop")
        assert torch.equal(encode(vae, image), plain)
    assert [dict(vars(m)) for m in vae.modules()] == before


@pytest.mark.parametrize("closed", ["", "x"])
def test_slices_encode_nearly_as_the_whole_does(closed: Any) -> None:
    vae = AutoencoderKL.from_pretrained(TINY, subfolder="vae", torch_dtype=torch.float32)
    image = 2 * picture(128, 2048) - 1
    whole = encode_canvas(vae, image, closed)
    sliced = encode_canvas(vae, image, closed, max_cells=16 * 128)
    assert not torch.equal(whole, sliced)
    # The standard deviation of latents is 1. Slices that are normalised one by one are .04 apart on
    # average, and at least .37 somewhere.
    apart = (whole - sliced).abs()
    assert apart.mean() < 0.025 and apart.max() < 0.2


@pytest.mark.parametrize("factor", [2, 4])
def test_resizing_a_ring_commutes_with_rolling(factor: int) -> None:
    image = torch.rand(1, 3, 16, 64)
    size = 16 * factor, 64 * factor
    larger = resize(image, size, "x")
    assert larger.shape[-2:] == size
    rolled = resize(image.roll(7, -1), size, "x")
    torch.testing.assert_close(rolled, larger.roll(7 * factor, -1), atol=1e-6, rtol=0)
    assert (resize(image.roll(7, -1), size) - larger.roll(7 * factor, -1)).abs().max() > 1e-2


@given(old=st.integers(16, 300), new=st.integers(16, 300), axis=st.sampled_from(["x", "y"]))
@hypothesis_settings(deadline=None, max_examples=60)
def test_resizing_a_ring_is_that_of_its_repetition(old: int, new: int, axis: Any) -> None:
    image = torch.rand(1, 3, 24, old)
    thrice = F.interpolate(image.tile(3), (48, 3 * new), mode="bicubic", antialias=True)
    expected = thrice[..., new : 2 * new].clamp(0, 1)
    if axis == "y":
        image, expected = image.mT, expected.mT
    found = resize(image, tuple(expected.shape[-2:]), axis)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_resizing_a_ring_shifts_nothing() -> None:
    """Far from the seam the wrap changes nothing, at ratios that no margin of 16 divides."""
    for old, new in ((1000, 1024), (2000, 1024), (1920, 1024), (1200, 64)):
        image = torch.rand(1, 3, 16, old)
        ring, flat = resize(image, (16, new), "x"), resize(image, (16, new))
        middle = slice(new // 4, -new // 4)
        torch.testing.assert_close(ring[..., middle], flat[..., middle], atol=1e-4, rtol=0)


# Part of a schedule


@kinds
def test_the_last_steps_are_those_of_the_whole_run(scheduler: Any) -> None:
    whole, late = Solver(scheduler, 10), Solver(scheduler, 10, last=4)
    assert torch.equal(late.timesteps, whole.timesteps[-4:])
    x0, noise = torch.randn(2, 1, 4, 3, 3).double()
    x = late.initial(noise, x0)
    # With the true noise in each step, every solver returns to the image.
    for t in late.timesteps:
        late.scale(x, t)
        torch.testing.assert_close(late.noise(x, x0, t), noise, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(late.x0(x, noise, t), x0, atol=1e-4, rtol=1e-4)
        x = late.step(noise, t, x)
    torch.testing.assert_close(x, x0, atol=0.06, rtol=0.06)  # DDIM ends a little before


@kinds
def test_a_whole_run_ignores_the_image(scheduler: Any) -> None:
    x0, noise = torch.randn(2, 1, 4, 3, 3)
    assert torch.equal(
        Solver(scheduler, 5, 5).initial(noise, x0), Solver(scheduler, 5).initial(noise)
    )


# Windows


@given(
    window=st.integers(8, 64),
    extra=st.integers(0, 200),
    closed=st.booleans(),
    steps=st.integers(1, 12),
)
def test_feathered_windows_cover_everything_and_overlap_by_a_quarter(
    window: int, extra: int, closed: bool, steps: int
) -> None:
    canvas = Canvas(window, window + extra, "x" if closed else "")
    found = Feathered()(canvas, window, steps)
    assert len(found) == steps and len({len(views) for views in found}) == 1
    for views in found:
        assert all(view.feathered and view.height == view.width == window for view in views)
        lefts = sorted({view.left for view in views})
        gaps = [b - a for a, b in pairwise(lefts)]
        assert all(gap <= 3 * window / 4 for gap in gaps)
        covered = {c for v in views for c in range(v.left, v.left + window)}
        cells = {c % canvas.width for c in covered} if closed else covered
        assert set(range(canvas.width)) <= cells
        if not closed:
            assert lefts[0] > -window and lefts[-1] < canvas.width
    if extra > window and steps > 1:
        assert {v.left for v in found[0]} != {v.left for v in found[1]}


# The low band


@pytest.mark.parametrize("closed", ["", "x", "y"])
def test_smoothing_keeps_constants_and_wraps_only_the_closed_axis(closed: Any) -> None:
    x = torch.randn(1, 4, 12, 20).double()
    torch.testing.assert_close(smooth(torch.ones_like(x), 1.5, closed), torch.ones_like(x))
    for axis, dim in (("x", -1), ("y", -2)):
        rolled = smooth(x.roll(5, dim), 1.5, closed)
        equal = torch.allclose(rolled, smooth(x, 1.5, closed).roll(5, dim))
        assert equal == (axis == closed)


@kinds
def test_the_held_low_band_is_that_of_the_reference(scheduler: Any) -> None:
    """To second order: what is left of the difference is its high band, smoothed."""
    solver = Solver(scheduler, 8, last=4)
    x, noise_pred, reference = torch.randn(3, 1, 4, 16, 32).double()
    t = solver.timesteps[0]
    held = LowBand(reference, 2.0, "x")(solver, t, x, noise_pred)
    difference = reference - solver.x0(x, held, t)
    first = reference - solver.x0(x, noise_pred, t)
    expected = first - smooth(first, 2.0, "x")
    torch.testing.assert_close(difference, expected, atol=1e-4, rtol=1e-4)
    assert difference.mean().abs() < 0.05 * first.std()


# The pipeline


def test_rolling_noise_and_image_rolls_the_enlarged_image(base: BaseModel) -> None:
    pipe, settings = Pipeline(base), sphere()
    conditioning, image = pipe.encode(settings), picture(128, 256)
    canvas = pipe.canvas(settings)
    views = settings.layout(canvas, base.window, 3)[0]
    spacing = sorted({v.left for v in views})[1] - views[0].left
    noise = pipe.noise(settings, noise_of())

    def enlarge(cells: int) -> Tensor:
        x0 = pipe.encode_image(settings, image.roll(4 * cells, -1))
        hold = LowBand(x0, 1.0, "x")
        latents = pipe.denoise(settings, conditioning, noise.roll(cells, -1), x0=x0, hold=hold)
        return pipe.decode(settings, latents)

    once = enlarge(0)
    torch.testing.assert_close(enlarge(spacing), once.roll(8 * spacing, -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        pipe.refine(settings, conditioning, image, noise_of()), once, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("layout", [Spanning(), Sliding(8), Feathered()])
def test_strength_0_returns_the_reconstruction_and_1_the_text_alone(
    base: BaseModel, layout: Any
) -> None:
    pipe, image = Pipeline(base), picture(128, 256)
    settings = sphere(height=128, width=256, layout=layout)
    conditioning, noise = pipe.encode(settings), pipe.noise(settings, noise_of())

    def draw(strength: float) -> Tensor:
        chosen = replace(settings, strength=strength)
        x0 = pipe.encode_image(chosen, image)
        return pipe.denoise(chosen, conditioning, noise, x0=x0)

    with torch.no_grad(), circular(base.vae):
        assert torch.equal(draw(0.0), encode(base.vae, 2 * image - 1))
    assert torch.equal(draw(1.0), pipe.denoise(settings, conditioning, noise))
    assert not torch.equal(draw(0.01), draw(0.0))  # one step, however few there are
    assert not torch.equal(draw(0.5), draw(1.0))


def test_depth_of_another_size_is_refused_and_a_depth_changes_the_details(base: BaseModel) -> None:
    with pytest.raises(ValueError, match="depth has shape"):
        sphere(depth=torch.rand(128, 256))
    pipe, settings = Pipeline(base), sphere(controlnet_conditioning_scale=1.0)
    with_depth = replace(settings, depth=picture(256, 512)[0, 0])
    conditioning, image = pipe.encode(settings), picture(128, 256)
    images = [pipe.refine(s, conditioning, image, noise_of()) for s in (settings, with_depth)]
    assert not torch.equal(*images)


def test_poles_are_redrawn_and_the_equator_stays_bit_by_bit(base: BaseModel) -> None:
    pipe, settings, image = Pipeline(base), sphere(), picture(256, 512)
    steps: list[tuple[int, int]] = []
    fixed = pipe.fix_poles(
        settings,
        image,
        {True: "clear sky", False: "sand"},
        noise_of(),
        lambda step, total, _: steps.append((step, total)),
    )
    assert steps == 2 * [(1, 3), (2, 3), (3, 3)]
    changed = (fixed != image).any(1)[0].any(1)  # (H,) rows
    assert changed[0] and changed[-1]
    # The corners of a face of 100 degrees reach 59.3 degrees away from its pole.
    assert not changed[256 // 3 : 256 - 256 // 3].any()
    again = pipe.fix_poles(settings, image, {True: "clear sky", False: "sand"}, noise_of())
    assert torch.equal(fixed, again)


@pytest.mark.parametrize("changes", [{"prompt": "a storm"}, {"depth": True}])
@pytest.mark.parametrize("up", [True, False])
def test_a_pole_follows_its_own_prompt_and_depth(
    base: BaseModel, up: bool, changes: dict[str, Any]
) -> None:
    pipe, image = Pipeline(base), picture(256, 512)
    depth = torch.rand(256, 512, generator=noise_of(1)) if "depth" in changes else None
    strong = sphere(controlnet_conditioning_scale=1.0)
    plain = pipe.fix_poles(strong, image, {up: "clear sky"}, noise_of())
    prompts = {up: changes.get("prompt", "clear sky")}
    other = pipe.fix_poles(replace(strong, depth=depth), image, prompts, noise_of())
    changed = (plain != other).any(1)[0].any(1)  # (H,) rows
    near, far = (slice(64), slice(128, None)) if up else (slice(192, None), slice(128))
    assert changed[near].any() and not changed[far].any()


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("up", [True, False])
def test_what_a_pole_changes_in_perspective_is_added_there(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, up: bool, strength: float
) -> None:
    """By the steps that keep the pole's colours, and by the autoencoder alone without steps."""
    monkeypatch.setattr("panorama.pipeline.POLE_STRENGTH", strength)
    pipe, image = Pipeline(base), picture(256, 512)
    fixed = pipe.fix_poles(sphere(), image, {up: "clear sky"}, noise_of())
    view = replace(pipe.pole_settings(sphere()), prompt="clear sky")
    face = Face(up, view.height)
    shown = face.show(image)
    x0, noise = pipe.encode_image(view, shown), pipe.noise(view, noise_of())
    hold = LowBand(x0, base.window / 8)
    latents = pipe.denoise(view, pipe.encode(view), noise, x0=x0, hold=hold)
    expected = face.blend(image, pipe.decode(view, latents) - shown).clamp(0, 1)
    torch.testing.assert_close(fixed, expected, atol=1e-5, rtol=0)
    assert (fixed - image).abs().max() > 0.01
