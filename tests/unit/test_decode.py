"""The picture of a canvas: exact where it is decoded whole, without joints where it is not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from panorama.decode import MIN_SLICE, decode_canvas
from tests.small import small_vae
from weights.train.autoencoder import to_tensor
from weights.train.scenes import Scene, render

FACTOR = 4
TINY = Path(__file__).parents[2] / "weights" / "tiny" / "syncdiffusion"


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return small_vae()


@pytest.fixture(scope="module")
def tiny() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(TINY, subfolder="vae", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def strip(tiny: AutoencoderKL) -> torch.Tensor:
    """Latents (1, 4, 32, 256) of a day and a night side by side."""
    rng = np.random.default_rng(0)
    shown = [Scene(time, "autumn hills", True, False) for time in ("noon", "night")]
    pictures = [render(scene, rng, supersample=1)[0] for scene in shown]
    with torch.no_grad():
        latents = [tiny.encode(to_tensor(picture[None])).latent_dist.mean for picture in pictures]
    return torch.cat(latents, -1) * tiny.config.scaling_factor


@pytest.mark.parametrize(("ring", "dim", "shape"), [("x", -1, (8, 40)), ("y", -2, (40, 8))])
def test_a_ring_decodes_the_same_wherever_it_is_cut(
    vae: AutoencoderKL, ring: str, dim: int, shape: tuple[int, int]
) -> None:
    latents = torch.randn(1, 4, *shape)
    picture = decode_canvas(vae, latents, ring=ring)
    for cells in (1, 5, 17):
        rolled = decode_canvas(vae, latents.roll(cells, dim), ring=ring)
        torch.testing.assert_close(rolled, picture.roll(FACTOR * cells, dim), atol=1e-5, rtol=0)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("tall", [False, True])
def test_slices_are_close_to_the_whole_and_leave_no_joint(
    tiny: AutoencoderKL, strip: torch.Tensor, ring: bool, tall: bool
) -> None:
    """In grey levels of 255, where a slice sees half of the canvas."""
    axis, dim = ("y", -2) if tall else ("x", -1)
    latents = strip.transpose(-1, -2) if tall else strip
    whole = 127.5 * decode_canvas(tiny, latents, ring=axis if ring else "")
    sliced = 127.5 * decode_canvas(tiny, latents, ring=axis if ring else "", max_cells=32 * 128)
    difference = sliced - whole
    assert difference.abs().mean() < 1.5
    assert difference.abs().max() < 15
    steps = difference - difference.roll(1, dim)
    steps = steps if ring else steps.narrow(dim, 1, steps.shape[dim] - 1)
    assert steps.abs().mean() < 0.25


def test_the_other_axis_of_a_sliced_canvas_may_be_the_ring(
    tiny: AutoencoderKL, strip: torch.Tensor
) -> None:
    sliced = decode_canvas(tiny, strip, ring="y", max_cells=32 * 128)
    rolled = decode_canvas(tiny, strip.roll(3, -2), ring="y", max_cells=32 * 128)
    torch.testing.assert_close(rolled, sliced.roll(3 * 8, -2), atol=1e-4, rtol=0)


def test_slicing_leaves_the_decoder_as_it_was(tiny: AutoencoderKL, strip: torch.Tensor) -> None:
    latents = strip[..., :160]
    before = decode_canvas(tiny, latents)
    decode_canvas(tiny, latents, max_cells=32 * 128)
    assert torch.equal(decode_canvas(tiny, latents), before)
    assert not any("forward" in vars(module) for module in tiny.modules())


def test_what_is_small_enough_is_decoded_whole(vae: AutoencoderKL) -> None:
    latents = torch.randn(1, 4, 8, 40)
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_canvas(vae, latents, max_cells=320), expected)


@pytest.mark.parametrize(("room", "fits"), [(300, 200), (150, MIN_SLICE), (100, MIN_SLICE)])
def test_too_little_memory_decodes_smaller_slices(
    vae: AutoencoderKL, caplog: pytest.LogCaptureFixture, room: int, fits: int
) -> None:
    latents = torch.randn(1, 4, 8, 400)
    expected = decode_canvas(vae, latents, ring="x", max_cells=8 * fits)
    tried: list[int] = []

    def refuse(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        cells = inputs[0].shape[-1]
        tried.append(cells)
        if cells > room:
            raise torch.OutOfMemoryError(f"no memory for {cells} cells")

    hook = vae.decoder.register_forward_pre_hook(refuse)
    try:
        if room < MIN_SLICE:
            with pytest.raises(torch.OutOfMemoryError, match="no memory for 128 cells"):
                decode_canvas(vae, latents, ring="x")
        else:
            assert torch.equal(decode_canvas(vae, latents, ring="x"), expected)
    finally:
        hook.remove()
    assert tried[0] == 400
    assert caplog.messages[0] == (
        "not enough memory to decode 400 latent cells along x at once: going on with 200"
    )
    assert not any("forward" in vars(module) for module in vae.modules())
