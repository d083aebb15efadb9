"""SDXL around a full turn and through windows, on a random model of SDXL's shape."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from panorama.base_model import BaseModel, load_base_model, own_lora
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.circular import padded_convolutions
from panorama.sampling.sampler import OnStep
from panorama.sampling.synchronize import SyncSettings
from panorama.sampling.views import Fixed, Sliding, Spanning
from tests import loras
from tests.small_sdxl import build, save
from tests.state import State

HEIGHT, WIDTH = 64, 256  # pixels; a view that wraps has multiples of 32
FACTOR = 8
PROMPT = "hdri view, bedroom in the color of blue"


def random_depth(height: int, width: int) -> Tensor:
    return torch.rand(height, width, generator=torch.Generator().manual_seed(3))


DEPTH = random_depth(HEIGHT, WIDTH)
IMAGES = {"text": {}, "depth": {"depth": DEPTH, "controlnet_conditioning_scale": 1.0}}


@pytest.fixture(scope="module")
def base() -> BaseModel:
    """Without a LoRA; for tests that leave it as it was."""
    return build()


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """With a LoRA on convolutions, those of the UNet's first and last layer among them."""
    base, path = build(), tmp_path_factory.mktemp("lora") / "lora.safetensors"
    loras.save(loras.draw(base, loras.CONVOLUTIONS), path, loras.peft)
    return replace(base, lora=own_lora(base, path))


def spanning(**changes: Any) -> Settings:
    """Return a full turn in one view."""
    inputs: dict[str, Any] = {"prompt": PROMPT, "height": HEIGHT, "width": WIDTH, "closed": "x"}
    inputs |= {"num_inference_steps": 2, "guidance_scale": 3.0, "layout": Spanning()}
    return Settings(**inputs | changes)


def windowed(**changes: Any) -> Settings:
    """Return a strip of four windows and a half."""
    inputs: dict[str, Any] = {"prompt": PROMPT, "height": 128, "width": 576}
    inputs |= {"num_inference_steps": 3, "guidance_scale": 3.0, "layout": Fixed(8)}
    return Settings(**inputs | changes)


def noise_for(base: BaseModel, settings: Settings) -> Tensor:
    return Pipeline(base).noise(settings, torch.Generator().manual_seed(1))


def denoise(
    base: BaseModel, settings: Settings, noise: Tensor | None = None, on_step: OnStep | None = None
) -> Tensor:
    """Return the latents that a seed's noise, or a given one, becomes."""
    pipe = Pipeline(base)
    noise = noise_for(base, settings) if noise is None else noise
    return pipe.denoise(settings, pipe.encode(settings), noise, on_step)


def image(base: BaseModel, settings: Settings, noise: Tensor | None = None) -> Tensor:
    """Return the image (3, H, W) in [0, 1]."""
    return Pipeline(base).decode(settings, denoise(base, settings, noise))[0]


# --- a full turn in one view ---


@pytest.mark.parametrize("lora", ["without", "with a convolutional"])
@pytest.mark.parametrize("kind", IMAGES)
def test_rolling_the_noise_and_the_depth_rolls_the_image(
    base: BaseModel, convolutional: BaseModel, kind: str, lora: str
) -> None:
    tested = base if lora == "without" else convolutional
    options = IMAGES[kind] | {"lora_scale": 1.0}
    settings = spanning(**options)
    still, noise = image(tested, settings), noise_for(tested, settings)
    assert tested.divisor == 4  # as SDXL's: the least roll, in latent cells
    for cells in range(tested.divisor, WIDTH // FACTOR, tested.divisor):
        moved = {"depth": DEPTH.roll(cells * FACTOR, -1)} if kind == "depth" else {}
        rolled = image(tested, spanning(**options | moved), noise.roll(cells, -1))
        assert (rolled - still.roll(cells * FACTOR, -1)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", IMAGES)
def test_on_a_canvas_that_does_not_close_it_does_not(base: BaseModel, kind: str) -> None:
    settings = spanning(**IMAGES[kind], closed="")
    still, noise = image(base, settings), noise_for(base, settings)
    moved = {"depth": DEPTH.roll(16 * FACTOR, -1)} if kind == "depth" else {}
    rolled = image(base, replace(settings, **moved), noise.roll(16, -1))
    assert (rolled - still.roll(16 * FACTOR, -1)).abs().max() > 0.03


def test_a_canvas_closes_top_to_bottom_too(base: BaseModel) -> None:
    depth = random_depth(WIDTH, HEIGHT)
    settings = spanning(height=WIDTH, width=HEIGHT, closed="y", depth=depth)
    still, noise = image(base, settings), noise_for(base, settings)
    moved = replace(settings, depth=depth.roll(12 * FACTOR, 0))
    rolled = image(base, moved, noise.roll(12, -2))
    assert (rolled - still.roll(12 * FACTOR, -2)).abs().max() < 1e-4


def test_every_part_takes_part(base: BaseModel, convolutional: BaseModel) -> None:
    """Otherwise the equivariance of the whole would say nothing about it."""
    text = image(base, spanning())
    assert (image(base, spanning(**IMAGES["depth"])) - text).abs().max() > 0.01
    off, on = (image(convolutional, spanning(lora_scale=scale)) for scale in (0, 1.0))
    assert (on - off).abs().max() > 0.01


@pytest.mark.parametrize("kind", IMAGES)
def test_nothing_is_left_behind(convolutional: BaseModel, kind: str) -> None:
    def stop(*_: Any) -> Tensor:
        raise InterruptedError

    settings = spanning(**IMAGES[kind])
    first = denoise(convolutional, settings)
    before = State.of(convolutional)
    with pytest.raises(InterruptedError):
        denoise(convolutional, settings, on_step=stop)
    before.check(convolutional)
    assert torch.equal(denoise(convolutional, settings), first)
    before.check(convolutional)


def test_a_conditioning_scale_of_0_gives_the_image_of_the_text(base: BaseModel) -> None:
    settings = spanning(depth=DEPTH, controlnet_conditioning_scale=0.0)
    assert torch.equal(denoise(base, settings), denoise(base, spanning()))


def test_texts_of_any_length_are_read_to_their_end(base: BaseModel) -> None:
    long = "a bedroom in the color of blue, " * 8
    assert not torch.equal(
        denoise(base, spanning(prompt=long)), denoise(base, spanning(prompt=long + "with a door"))
    )
    assert not torch.equal(
        denoise(base, spanning(negative_prompt=long)),
        denoise(base, spanning(negative_prompt=long + "no window")),
    )


@pytest.mark.parametrize("kind", IMAGES)
def test_half_precision_makes_the_same_image_of_a_seed(
    base: BaseModel, tmp_path: Path, kind: str
) -> None:
    half = load_base_model(save(base, tmp_path), torch.bfloat16)  # CPUs lack much in float16
    assert half.unet.dtype == half.controlnet.dtype == torch.bfloat16
    # The VAE overflows in half precision, and so is not even rounded to it.
    assert all(map(torch.equal, half.vae.parameters(), base.vae.parameters()))
    generator = torch.Generator()
    settings = spanning(**IMAGES[kind])
    images = [Pipeline(m)(settings, generator.manual_seed(7)) for m in (half, base)]
    assert (images[0] - images[1]).abs().mean() < 0.05
    other = Pipeline(base)(settings, generator.manual_seed(8))
    assert (images[0] - other).abs().mean() > 0.1


def test_an_autoencoder_that_does_not_overflow_is_as_precise_as_the_rest(tmp_path: Path) -> None:
    base = build()
    base.vae.register_to_config(force_upcast=False)
    half = load_base_model(save(base, tmp_path), torch.bfloat16)
    assert half.vae.dtype == torch.bfloat16


# --- windows: syncdiffusion-xl ---


@pytest.mark.parametrize("layout", [Fixed(8), Sliding(8), Sliding(4), Sliding(None)], ids=str)
@pytest.mark.parametrize("closed", ["x", "y"])
@pytest.mark.parametrize("follows", [False, True], ids=["text", "depth"])
def test_rolling_a_ring_by_a_spacing_of_its_windows_rolls_the_image(
    base: BaseModel, follows: bool, closed: Any, layout: Any
) -> None:
    dim, height, width = (-1, 128, 256) if closed == "x" else (-2, 256, 128)
    depth = random_depth(height, width) if follows else None
    settings = windowed(height=height, width=width, closed=closed, layout=layout, depth=depth)
    spacing = layout.stride or base.window
    still, noise = image(base, settings), noise_for(base, settings)
    moved = None if depth is None else depth.roll(spacing * FACTOR, dim)
    rolled = image(base, replace(settings, depth=moved), noise.roll(spacing, dim))
    assert (rolled - still.roll(spacing * FACTOR, dim)).abs().max() < 1e-4


@contextmanager
def watched(network: Any) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Note the arguments of every call of a network, and whether a gradient goes through it."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = network.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def test_each_window_follows_its_own_part_of_the_depth(base: BaseModel) -> None:
    depth = random_depth(128, 576)
    settings = windowed(depth=depth, guidance_scale=1.0, num_inference_steps=1)
    with watched(base.controlnet) as calls:
        denoise(base, settings)
    seen = torch.cat([options["controlnet_cond"] for _, options in calls])
    lefts = range(0, 576 - 128 + 1, 64)
    assert torch.equal(seen, torch.stack([depth[:, x : x + 128].expand(3, -1, -1) for x in lefts]))


def test_depth_changes_the_image_where_it_differs(base: BaseModel) -> None:
    depth = random_depth(128, 576)
    other = depth.clone()
    other[:, -64:] = 1 - other[:, -64:]
    latents = [
        denoise(base, windowed(depth=d, num_inference_steps=1, controlnet_conditioning_scale=1.0))
        for d in (depth, other)
    ]
    difference = (latents[0] - latents[1]).abs().amax((0, 1, 2))  # by column
    assert difference[-8:].min() > 1e-4
    assert not difference[:56].any()  # only the last window, from there on, sees what changed


EVERYTHING: dict[str, Any] = {
    "scheduler": "dpm++",
    "negative_prompt": "people",
    "depth": random_depth(128, 256),
    "lora_scale": 0.7,
    "closed": "x",
    "width": 256,
    "sync": SyncSettings(weight=30.0, threshold=0, means=2),
}


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++", "unipc"])
@pytest.mark.parametrize("gradient", [False, True], ids=["fast", "exact"])
def test_windows_are_synchronised_under_every_scheduler(
    convolutional: BaseModel, gradient: bool, scheduler: str
) -> None:
    sync = SyncSettings(weight=30.0, threshold=2 * gradient, means=2 * (not gradient))
    synced, plain = (
        denoise(convolutional, windowed(**EVERYTHING | {"scheduler": scheduler, "sync": settings}))
        for settings in (sync, None)
    )
    assert synced.isfinite().all()
    assert (synced - plain).abs().max() > 1e-6


def test_every_input_takes_part_in_synchronised_windows(convolutional: BaseModel) -> None:
    latents = denoise(convolutional, windowed(**EVERYTHING))
    changes = {"negative_prompt": "", "depth": None, "lora_scale": 0.0, "closed": "", "sync": None}
    for name, value in {**changes, "scheduler": "euler"}.items():
        changed = denoise(convolutional, windowed(**EVERYTHING | {name: value}))
        assert (changed - latents).abs().max() > 1e-6, name


def test_synchronised_windows_leave_nothing_behind(convolutional: BaseModel) -> None:
    def stop(*_: Any) -> Tensor:
        raise InterruptedError

    settings = windowed(**EVERYTHING)
    first = denoise(convolutional, settings)
    before = State.of(convolutional)
    with pytest.raises(InterruptedError):
        denoise(convolutional, settings, on_step=stop)
    before.check(convolutional)
    assert torch.equal(denoise(convolutional, settings), first)


@pytest.mark.parametrize("gradient", [False, True], ids=["fast", "exact"])
def test_only_exact_takes_a_gradient_through_the_networks(base: BaseModel, gradient: bool) -> None:
    """And only it decodes what windows are predicted to become."""
    depth = random_depth(128, 576)
    sync = SyncSettings(threshold=int(gradient), means=1)
    with (
        watched(base.unet) as unet,
        watched(base.controlnet) as controlnet,
        watched(base.vae.decoder) as decoder,
        watched(base.perceptual.stages[0]) as perceptual,
    ):
        denoise(base, windowed(depth=depth, sync=sync))
    for calls in (unet, controlnet):
        assert any(args[0].requires_grad for args, _ in calls) == gradient
    assert bool(decoder) == bool(perceptual) == gradient


# --- the published models ---

PUBLISHED = Path(__file__).parents[1] / "data" / "sdxl"


@pytest.mark.parametrize(
    ("kind", "name", "millions"),
    [
        (UNet2DConditionModel, "unet", 2567.463684),
        (AutoencoderKL, "vae", 83.653863),
        (ControlNetModel, "controlnet", 272.586),
    ],
)
def test_the_published_models_have_no_padding_that_the_patch_does_not_reach(
    kind: Any, name: str, millions: float
) -> None:
    with torch.device("meta"):
        model = kind.from_config(json.loads((PUBLISHED / f"{name}.json").read_text()))
    assert sum(parameter.numel() for parameter in model.parameters()) == round(millions * 1e6)
    reached = {id(module) for module in padded_convolutions((model,))}
    # The VAE's encoder, which nothing here runs, pads its downsampling outside the convolutions.
    model.encoder = None
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
            assert id(module) in reached
        assert not isinstance(
            module, nn.ConvTranspose2d | nn.Upsample | nn.MaxPool2d | nn.AvgPool2d
        )
