"""The image of a canvas: exact where it is decoded whole, without joints where it is not."""

from contextlib import nullcontext
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from panorama.errors import NotFiniteError
from panorama.images.vae import MIN_SLICE, decode_canvas, slice_weight
from panorama.sampling.canvas import Axis
from tests.small import small_vae
from weights.train.scenes import Scene
from weights.train.views import to_tensor

FACTOR = 4
TINY = Path(__file__).parents[2] / "weights" / "tiny" / "sd2"


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return small_vae()


@pytest.fixture(scope="module")
def tiny() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(TINY, subfolder="vae", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def strip(tiny: AutoencoderKL) -> torch.Tensor:
    """Return latents (1, 4, 16, 256) of a day and a night side by side, around the horizon."""
    rng = np.random.default_rng(0)
    shown = [Scene(time, "autumn hills", True, False) for time in ("noon", "night")]
    images = [scene.render(rng)[0] for scene in shown]
    with torch.no_grad():
        latents = [tiny.encode(to_tensor(image[None])).latent_dist.mean for image in images]
    return torch.cat(latents, -1)[:, :, 24:40] * tiny.config.scaling_factor


@pytest.mark.parametrize(("closed", "dim", "shape"), [("x", -1, (8, 40)), ("y", -2, (40, 8))])
def test_a_ring_decodes_the_same_wherever_it_is_cut(
    vae: AutoencoderKL, closed: Axis, dim: int, shape: tuple[int, int]
) -> None:
    latents = torch.randn(1, 4, *shape)
    image = decode_canvas(vae, latents, closed=closed)
    for cells in (1, 5, 17):
        rolled = decode_canvas(vae, latents.roll(cells, dim), closed=closed)
        torch.testing.assert_close(rolled, image.roll(FACTOR * cells, dim), atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_cells", [16 * 256, 16 * 128], ids=["whole", "sliced"])
@pytest.mark.parametrize("tall", [False, True])
def test_a_canvas_goes_on_beyond_extended_ends(
    tiny: AutoencoderKL, strip: torch.Tensor, tall: bool, max_cells: int
) -> None:
    """In grey levels: constant along its length, its image is too, which zeros would change."""
    latents = strip[..., 40:41].expand(1, 4, 16, 256)
    axis, dim, latents = ("y", -2, latents.mT) if tall else ("x", -1, latents)
    images = {
        axes: 127.5 * decode_canvas(tiny, latents, extended=axes, max_cells=max_cells)
        for axes in ("", axis)
    }
    steps = {axes: image.diff(dim=dim).abs().max() for axes, image in images.items()}
    assert steps[axis] < 0.05 and steps[""] > 1


@pytest.mark.parametrize("max_cells", [16 * 256, 16 * 128], ids=["whole", "sliced"])
def test_a_ring_is_the_same_beside_an_extended_axis(
    tiny: AutoencoderKL, strip: torch.Tensor, max_cells: int
) -> None:
    """Rolling still rolls it, and a constant across it shows no zeros at the flat ends."""
    ring = strip.mean(-2, keepdim=True).expand(1, 4, 16, 256)
    image = decode_canvas(tiny, ring, "x", extended="y", max_cells=max_cells)
    assert 127.5 * image.diff(dim=-2).abs().max() < 0.05
    rolled = decode_canvas(tiny, ring.roll(64, -1), "x", extended="y")
    whole = decode_canvas(tiny, ring, "x", extended="y")
    torch.testing.assert_close(rolled, whole.roll(64 * 8, -1), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"extended='x'.*wraps"):
        decode_canvas(tiny, ring, "x", extended="x")


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("tall", [False, True])
def test_slices_are_close_to_the_whole_and_leave_no_joint(
    tiny: AutoencoderKL, strip: torch.Tensor, ring: bool, tall: bool
) -> None:
    """Compare in grey levels of 255, where a slice sees half of the canvas."""
    axis, dim = ("y", -2) if tall else ("x", -1)
    latents = strip.transpose(-1, -2) if tall else strip
    whole = 127.5 * decode_canvas(tiny, latents, closed=axis if ring else "")
    sliced = 127.5 * decode_canvas(tiny, latents, closed=axis if ring else "", max_cells=16 * 128)
    difference = sliced - whole
    assert difference.abs().mean() < 1.5
    assert difference.abs().max() < 10
    steps = difference - difference.roll(1, dim)
    steps = steps if ring else steps.narrow(dim, 1, steps.shape[dim] - 1)
    assert steps.abs().mean() < 0.1


def test_the_other_axis_of_a_sliced_canvas_may_be_the_ring(
    tiny: AutoencoderKL, strip: torch.Tensor
) -> None:
    sliced = decode_canvas(tiny, strip, closed="y", max_cells=16 * 128)
    rolled = decode_canvas(tiny, strip.roll(3, -2), closed="y", max_cells=16 * 128)
    torch.testing.assert_close(rolled, sliced.roll(3 * 8, -2), atol=1e-4, rtol=0)


def test_slicing_leaves_the_decoder_as_it_was(tiny: AutoencoderKL, strip: torch.Tensor) -> None:
    latents = strip[..., :160]
    before = decode_canvas(tiny, latents)
    decode_canvas(tiny, latents, max_cells=16 * 128)
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
    expected = decode_canvas(vae, latents, closed="x", max_cells=8 * fits)
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
                decode_canvas(vae, latents, closed="x")
        else:
            assert torch.equal(decode_canvas(vae, latents, closed="x"), expected)
    finally:
        hook.remove()
    assert tried[0] == 400
    assert "not enough memory" in caplog.messages[0] and "400" in caplog.messages[0]
    assert not any("forward" in vars(module) for module in vae.modules())


@pytest.mark.parametrize("size", [128, 256, 1024])
def test_slices_blend_linearly_and_their_outer_sixteenths_do_not_count(size: int) -> None:
    weight = slice_weight(size, torch.device("cpu"))
    overlap, outer = size // 4, size // 16
    assert weight[:outer].max() <= 1e-6 and weight[-outer:].max() <= 1e-6
    assert torch.equal(weight[overlap:-overlap], torch.ones(size - 2 * overlap))
    both = weight[:overlap] + weight[-overlap:]
    torch.testing.assert_close(both, torch.ones(overlap), rtol=0, atol=1e-5)
    ramp = weight[outer : overlap - outer].diff()
    torch.testing.assert_close(ramp, torch.full_like(ramp, 8 / size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("closed", ["", "x"])
def test_what_a_slice_makes_of_its_ends_shows_only_at_a_canvas_edge(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, closed: Axis
) -> None:
    size, length = 128, 400
    end = size // 16 * FACTOR

    def decode(_: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
        image = torch.zeros(1, 3, *(FACTOR * side for side in latents.shape[-2:]))
        image[..., :end] = image[..., -end:] = 1.0
        return image

    monkeypatch.setattr("panorama.images.vae.decode", decode)
    monkeypatch.setattr("panorama.images.vae.shared_statistics", lambda *_: nullcontext())
    image = decode_canvas(vae, torch.zeros(1, 4, 8, length), closed=closed, max_cells=8 * size)
    expected = torch.zeros_like(image)
    if not closed:
        expected[..., :end] = expected[..., -end:] = 1.0
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("max_cells", [8 * 400, 8 * 128])
@pytest.mark.parametrize("value", [nan, inf])
def test_an_image_that_is_not_finite_is_an_error(max_cells: int, value: float) -> None:
    vae = small_vae()
    with torch.no_grad():
        vae.decoder.conv_out.weight[1, 2, 0, 0] = value
    with pytest.raises(NotFiniteError, match="image"):
        decode_canvas(vae, torch.randn(1, 4, 8, 400), max_cells=max_cells)
