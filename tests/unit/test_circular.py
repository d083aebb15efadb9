"""Circular padding holds for every convolution, and leaves nothing behind."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from panorama.circular import circular
from tests.small import small_unet, small_vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return small_vae().double()


def state(module: nn.Module) -> list[tuple[str, ...]]:
    return [tuple(sorted(vars(m))) for m in module.modules()]


@pytest.mark.parametrize(("axes", "dims"), [("x", (-1,)), ("y", (-2,)), ("xy", (-2, -1))])
def test_decoding_commutes_with_rolling(vae: AutoencoderKL, axes: str, dims: tuple[int]) -> None:
    latents = torch.randn(1, 4, 8, 10, dtype=torch.float64)
    with torch.no_grad(), circular(vae, axes=axes):
        picture = vae.decode(latents).sample
        for cells in (1, 3, 7):
            rolled = vae.decode(latents.roll([cells] * len(dims), dims)).sample
            expected = picture.roll([4 * cells] * len(dims), dims)
            torch.testing.assert_close(rolled, expected, atol=1e-9, rtol=0)


def test_only_the_axes_asked_for_wrap(vae: AutoencoderKL) -> None:
    latents = torch.randn(1, 4, 8, 10, dtype=torch.float64)
    with torch.no_grad(), circular(vae, axes="x"):
        picture = vae.decode(latents).sample
        rolled = vae.decode(latents.roll(1, -2)).sample
    assert (rolled - picture.roll(4, -2)).abs().max() > 1e-3


def test_a_unet_commutes_with_rolling_by_its_downsampling() -> None:
    unet = small_unet().double()
    latents, text = torch.randn(1, 4, 8, 16).double(), torch.randn(1, 3, 128).double()
    with torch.no_grad(), circular(unet):
        noise = unet(latents, 10, text).sample
        rolled = unet(latents.roll(6, -1), 10, text).sample
    torch.testing.assert_close(rolled, noise.roll(6, -1), atol=1e-9, rtol=0)


def test_nothing_is_left_behind(vae: AutoencoderKL) -> None:
    latents = torch.randn(1, 4, 8, 10, dtype=torch.float64)
    before, picture = state(vae), vae.decode(latents).sample
    with pytest.raises(RuntimeError, match="stop"), circular(vae), circular(vae, axes="y"):
        raise RuntimeError("stop")
    assert state(vae) == before
    assert torch.equal(vae.decode(latents).sample, picture)


def test_the_inner_of_nested_blocks_holds_and_the_outer_comes_back() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1).double()
    x = torch.randn(1, 1, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        with circular(conv, axes="y"):
            vertical = conv(x)
        with circular(conv, axes="x"):
            horizontal = conv(x)
            with circular(conv, axes="y"):
                assert torch.equal(conv(x), vertical)
            assert torch.equal(conv(x), horizontal)
    assert not torch.equal(vertical, horizontal)


def test_the_other_axis_keeps_its_own_padding_mode() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect").double()
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    padded = nn.functional.pad(x, (1, 1, 0, 0), mode="circular")
    padded = nn.functional.pad(padded, (0, 0, 1, 1), mode="reflect")
    with circular(conv, axes="x"):
        expected = nn.functional.conv2d(padded, conv.weight, conv.bias)
        torch.testing.assert_close(conv(x), expected)


def test_strides_dilation_groups_and_named_padding() -> None:
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    for conv in (
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(4, 4, (3, 5), padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
    ):
        conv = conv.double()
        shift = conv.stride[1]
        with circular(conv):
            expected = conv(x).roll(1, -1)
            torch.testing.assert_close(conv(x.roll(shift, -1)), expected)


def test_unknown_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="axes='z'"), circular(nn.Conv2d(1, 1, 3), axes="z"):
        pass
