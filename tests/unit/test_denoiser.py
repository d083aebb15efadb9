"""Windows of a canvas: what SDXL is told of each, the depth of each, and guidance."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from panorama.base_model import BaseModel
from panorama.conditioning.prompts import encode_prompts
from panorama.sampling.canvas import Canvas, View, crop
from panorama.sampling.denoiser import Conditioning, DepthControl, UNetDenoiser
from panorama.sampling.solver import Solver, build_scheduler
from tests import small_sd2, small_sdxl

FACTOR, SIDE = 8, 16  # of the small SDXL: pixels per cell, and cells of a window's side
GENERATOR = torch.Generator().manual_seed(2)
DEPTH = torch.rand(1, 3, 32 * FACTOR, 48 * FACTOR, generator=GENERATOR)
LATENTS = torch.randn(1, 4, 32, 48, generator=GENERATOR)
VIEWS = [
    View(0, 0, 16, 16),
    View(16, 24, 16, 16),
    View(12, 40, 16, 16),
    View(24, 5, 16, 16),
    View(-6, -9, 16, 16),
]


@pytest.fixture(scope="module", autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return small_sdxl.build()


def conditioning(
    base: BaseModel, scale: float = 3.0, prompt: str | tuple[str, ...] = "night over the sea"
) -> Conditioning:
    negative = "" if scale == 1 else "people"
    return encode_prompts(base.text_encoders, base.embed_type, prompt, negative, scale)


def solver(base: BaseModel, name: str = "euler") -> Solver:
    return Solver(build_scheduler(name, base.scheduler), 5)


def build(
    base: BaseModel,
    *,
    closed: Literal["", "x", "y"] = "",
    scale: float = 3.0,
    depth: Tensor | None = None,
    name: str = "euler",
    prompt: str | tuple[str, ...] = "night over the sea",
    graphs: bool = False,
) -> UNetDenoiser:
    """Return a denoiser for windows of a canvas of 32 x 48 cells."""
    control = None if depth is None else DepthControl(base.controlnet, depth, 0.7)
    canvas = Canvas(32, 48, closed)
    run = solver(base, name)
    given = conditioning(base, scale, prompt)
    return UNetDenoiser(base.unet, given, canvas, run, base.factor, control, graphs)


def watch(network: Any, seen: list[Any]) -> Any:
    """Note the arguments of every call of a network."""
    return network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )


@pytest.mark.parametrize(
    ("closed", "crops"),
    [
        # Windows that hang over a flat end have the crop of the nearest one that does not.
        ("", [(0, 0), (128, 192), (96, 256), (128, 40), (0, 0)]),
        ("x", [(0, 0), (128, 0), (96, 0), (128, 0), (0, 0)]),
        ("y", [(0, 0), (0, 192), (0, 256), (0, 40), (0, 0)]),
    ],
)
def test_sdxl_is_told_which_part_of_which_image_a_window_is(
    base: BaseModel, closed: Any, crops: list[tuple[int, int]]
) -> None:
    seen: list[Any] = []
    denoise = build(base, closed=closed, depth=DEPTH)
    hooks = [watch(base.unet, seen), watch(base.controlnet, seen)]
    try:
        denoise(crop(LATENTS, VIEWS), solver(base).timesteps[0], VIEWS)
    finally:
        for hook in hooks:
            hook.remove()
    # Original height and width, crop's top and left, target height and width, in pixels.
    rows = [[256, 384, top, left, 128, 128] for top, left in crops]
    assert len(seen) == 2
    for _, options in seen:  # both halves of guidance
        assert options["added_cond_kwargs"]["time_ids"].tolist() == rows + rows


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("closed", ["", "x", "y"])
@pytest.mark.parametrize("follows", [False, True], ids=["text", "depth"])
def test_several_windows_at_once_are_one_after_the_other(
    base: BaseModel, follows: bool, closed: Any, scale: float
) -> None:
    denoise = build(base, closed=closed, scale=scale, depth=DEPTH if follows else None)
    t, windows = solver(base).timesteps[1], crop(LATENTS, VIEWS, closed)
    together = denoise(windows, t, VIEWS)
    for window, view, found in zip(windows, VIEWS, together, strict=True):
        torch.testing.assert_close(found[None], denoise(window[None], t, [view]))


def cut(image: Tensor, view: View, closed: str, factor: int = 1) -> Tensor:
    """Cut a window, one row and column at a time, wrapped or mirrored at the ends."""
    places = []
    for start, size, length, wraps in (
        (view.top, view.height, image.shape[2], closed == "y"),
        (view.left, view.width, image.shape[3], closed == "x"),
    ):
        cells = range(factor * start, factor * (start + size))
        mirrored = [*range(length), *reversed(range(length))]
        places.append([n % length if wraps else mirrored[n % (2 * length)] for n in cells])
    return image[:, :, places[0]][..., places[1]]


def by_hand(
    base: BaseModel,
    view: View,
    t: Tensor,
    scale: float,
    closed: str,
    prompt: str | tuple[str, ...] = "night over the sea",
    weights: Sequence[float] = (1.0,),
) -> Tensor:
    """Call the ControlNet and the UNet for one window, text by text."""
    embeddings = conditioning(base, scale, prompt)
    x, depth = cut(LATENTS, view, closed), cut(DEPTH, view, closed, FACTOR)
    top, left = min(max(view.top, 0), 32 - view.height), min(max(view.left, 0), 48 - view.width)
    top, left = (0 if closed == "y" else top), (0 if closed == "x" else left)
    sizes = [32, 48, top, left, view.height, view.width]
    sigma = base_sigmas(base)[float(t)]
    predictions = []
    for k in range(len(embeddings.states)):
        assert embeddings.pooled is not None
        parts = list(enumerate(weights))
        options: dict[str, Any] = {
            "encoder_hidden_states": sum(w * embeddings.states[k, p, None] for p, w in parts),
            "added_cond_kwargs": {
                "text_embeds": sum(w * embeddings.pooled[k, p, None] for p, w in parts),
                "time_ids": torch.tensor([[8.0 * n for n in sizes]]),
            },
        }
        scaled = x / (sigma**2 + 1) ** 0.5
        control = base.controlnet(
            scaled, t, controlnet_cond=depth, conditioning_scale=0.7, **options
        )
        out = base.unet(
            scaled,
            t,
            down_block_additional_residuals=control.down_block_res_samples,
            mid_block_additional_residual=control.mid_block_res_sample,
            **options,
        )
        predictions.append(out.sample)
    if len(predictions) == 1:
        return predictions[0]
    uncond, text = predictions
    return uncond + scale * (text - uncond)


def base_sigmas(base: BaseModel) -> dict[float, float]:
    """Euler's sigma at each timestep, from the noise schedule."""
    scheduler = build_scheduler("euler", base.scheduler)
    scheduler.set_timesteps(5)
    return dict(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False))


@pytest.mark.parametrize("view", [*VIEWS, View(4, 8, 8, 20)], ids=str)
@pytest.mark.parametrize(("scale", "closed"), [(1.0, ""), (3.0, "x"), (0.0, "y")])
def test_a_window_is_the_networks_called_by_hand(
    base: BaseModel, view: View, scale: float, closed: Any
) -> None:
    t, x = solver(base).timesteps[2], cut(LATENTS, view, closed)
    found = build(base, closed=closed, scale=scale, depth=DEPTH)(x, t, [view])
    torch.testing.assert_close(found, by_hand(base, view, t, scale, closed), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_window_between_two_parts_has_their_embeddings_interpolated(
    base: BaseModel, scale: float
) -> None:
    prompt, t = ("night over the sea", "dawn", "noon over green hills"), solver(base).timesteps[2]
    shown = {
        View(9, 0, 16, 16): (1.0, 0.0, 0.0),
        View(9, 9, 16, 16): (0.375, 0.625, 0.0),
        View(9, 38, 16, 16): (0.25, 0.0, 0.75),
    }
    denoise = build(base, closed="x", scale=scale, depth=DEPTH, prompt=prompt)
    together = denoise(torch.cat([cut(LATENTS, view, "x") for view in shown]), t, list(shown))
    for found, (view, weights) in zip(together, shown.items(), strict=True):
        expected = by_hand(base, view, t, scale, "x", prompt, weights)
        torch.testing.assert_close(found[None], expected, atol=1e-5, rtol=1e-4)
        single = by_hand(base, view, t, scale, "x", prompt[0])
        assert ((expected - single).abs().max() > 1e-4) == (weights[0] != 1)


def differences(base: BaseModel, views: Sequence[View], **changes: Any) -> Tensor:
    """Return the largest difference between denoisers of the same windows."""
    t, x = solver(base).timesteps[1], crop(LATENTS, [VIEWS[0]])
    return (build(base, **changes)(x, t, [views[0]]) - build(base)(x, t, [VIEWS[0]])).abs().max()


def test_place_and_depth_and_guidance_take_part(base: BaseModel) -> None:
    """Otherwise the equalities would say nothing about them."""
    assert differences(base, VIEWS) == 0
    assert differences(base, [VIEWS[1]]) > 1e-4
    assert differences(base, VIEWS, depth=DEPTH) > 1e-2
    assert differences(base, VIEWS, scale=1.0) > 1e-3


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++", "unipc"])
def test_latents_reach_the_unet_with_unit_variance(base: BaseModel, name: str) -> None:
    run, seen = solver(base, name), []
    hook = watch(base.unet, seen)
    try:
        for noise in (LATENTS, 2 * LATENTS):
            x = run.initial(crop(noise, VIEWS))
            build(base, name=name, scale=1.0)(x, run.timesteps[0], VIEWS)
    finally:
        hook.remove()
    inputs = [args[0] for args, _ in seen]
    torch.testing.assert_close(inputs[0], crop(LATENTS, VIEWS), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(inputs[1], 2 * inputs[0])


def test_latents_keep_their_precision_whatever_the_unet_has() -> None:
    base = small_sdxl.build()
    embeddings, run = conditioning(base), solver(base)
    for network in (base.unet, base.controlnet):
        network.to(torch.bfloat16)
    control = DepthControl(base.controlnet, DEPTH, 0.7)
    denoise = UNetDenoiser(base.unet, embeddings, Canvas(32, 48), run, FACTOR, control)
    t = run.timesteps[0]
    found = denoise(run.initial(crop(LATENTS, VIEWS)), t, VIEWS)
    assert found.dtype == torch.float32
    reference = small_sdxl.build()
    expected = build(reference, depth=DEPTH)(run.initial(crop(LATENTS, VIEWS)), t, VIEWS)
    assert (found - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_cuda_graphs_change_nothing_without_a_gpu(base: BaseModel) -> None:
    t, windows = solver(base).timesteps[1], crop(LATENTS, VIEWS)
    plain, replayed = (build(base, depth=DEPTH, graphs=graphs) for graphs in (False, True))
    for batch in (slice(0, 2), slice(2, 5), slice(0, 2), slice(3, 5)):
        given = windows[batch], t, VIEWS[batch]
        assert torch.equal(replayed(*given), plain(*given))


@pytest.mark.parametrize("graphs", [False, True])
def test_a_denoiser_goes_as_soon_as_nothing_uses_it(base: BaseModel, graphs: bool) -> None:
    """Or it would hold a GPU's memory until Python looks for cycles."""
    denoise = build(base, depth=DEPTH, graphs=graphs)
    found = weakref.ref(denoise)
    gc.disable()
    try:
        del denoise
        assert found() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_graphs_are_replayed_with_new_windows_steps_and_depth() -> None:
    base = small_sdxl.build()
    for network in (base.unet, base.controlnet):
        network.to("cuda")
    plain, replayed = (build(base, depth=DEPTH.cuda(), graphs=g) for g in (False, True))
    windows, calls = crop(LATENTS, VIEWS).cuda(), []
    hook = watch(base.unet, calls)
    for t in solver(base).timesteps:
        for batch in (slice(0, 2), slice(2, 5), slice(3, 5)):
            given = windows[batch], t, VIEWS[batch]
            torch.testing.assert_close(replayed(*given), plain(*given))
    hook.remove()
    # Each of the two shapes of a batch runs once as it is and once to be recorded.
    assert len(calls) == 5 * 3 + 2 * 2


def test_sd2_is_told_of_no_place() -> None:
    base, seen = small_sd2.build(), []
    hook = watch(base.unet, seen)
    denoise = UNetDenoiser(
        base.unet, conditioning(base), Canvas(32, 48), solver(base, "ddim"), base.factor
    )
    t = solver(base, "ddim").timesteps[1]
    together = denoise(crop(LATENTS, VIEWS), t, VIEWS)
    hook.remove()
    assert seen[0][1]["added_cond_kwargs"] is None
    moved = denoise(crop(LATENTS, VIEWS), t, VIEWS[::-1])
    assert torch.equal(moved, together)
