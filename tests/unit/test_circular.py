"""Circular padding holds for every convolution, and leaves nothing behind."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from panorama.sampling.circular import circular, replaced
from panorama.sampling.gradient import frozen
from tests.small import saved_bytes, small_unet, small_vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return small_vae().double()


def state(module: nn.Module) -> list[tuple[str, ...]]:
    return [tuple(sorted(vars(m))) for m in module.modules()]


@pytest.mark.parametrize(("axes", "dims"), [("x", (-1,)), ("y", (-2,)), ("xy", (-2, -1))])
def test_decoding_commutes_with_rolling(vae: AutoencoderKL, axes: str, dims: tuple[int]) -> None:
    latents = torch.randn(1, 4, 8, 10, dtype=torch.float64)
    with torch.no_grad(), circular(vae, axes=axes):
        image = vae.decode(latents).sample
        for cells in (1, 3, 7):
            rolled = vae.decode(latents.roll([cells] * len(dims), dims)).sample
            expected = image.roll([4 * cells] * len(dims), dims)
            torch.testing.assert_close(rolled, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("axes", "dim"), [("x", -2), ("y", -1), ("", -1)])
def test_only_the_chosen_axes_wrap(vae: AutoencoderKL, axes: str, dim: int) -> None:
    latents = torch.randn(1, 4, 8, 10, dtype=torch.float64)
    with torch.no_grad(), circular(vae, axes=axes):
        image = vae.decode(latents).sample
        rolled = vae.decode(latents.roll(1, dim)).sample
    assert (rolled - image.roll(4, dim)).abs().max() > 1e-3


def test_a_unet_commutes_with_rolling_by_its_downsampling() -> None:
    unet = small_unet().double()
    latents, text = torch.randn(1, 4, 8, 16).double(), torch.randn(1, 3, 128).double()
    with torch.no_grad(), circular(unet):
        noise = unet(latents, 10, text).sample
        rolled = unet(latents.roll(6, -1), 10, text).sample
    torch.testing.assert_close(rolled, noise.roll(6, -1), atol=1e-9, rtol=0)


def test_several_modules_wrap_and_one_that_they_share_wraps_once(vae: AutoencoderKL) -> None:
    latents = torch.randn(1, 4, 8, 10, dtype=torch.float64)
    before = state(vae)
    with torch.no_grad(), circular(vae, vae.decoder, nn.Conv2d(1, 1, 3, padding=1)):
        image = vae.decode(latents).sample
        rolled = vae.decode(latents.roll(3, -1)).sample
    torch.testing.assert_close(rolled, image.roll(12, -1), atol=1e-9, rtol=0)
    assert state(vae) == before


Contexts = Callable[[nn.Module], AbstractContextManager[Any]]


@pytest.mark.parametrize(
    ("outer", "inner"), [(circular, frozen), (frozen, circular)], ids=["frozen in", "circular in"]
)
def test_frozen_and_circular_hold_together_in_either_order(
    outer: Contexts, inner: Contexts
) -> None:
    vae = small_vae().double()
    latents = torch.randn(1, 4, 8, 10, dtype=torch.float64).requires_grad_()

    def decode(x: Tensor) -> Tensor:
        image: Tensor = vae.decode(x).sample
        return image

    with circular(vae):
        (expected,) = torch.autograd.grad(decode(latents).square().mean(), latents)
    with frozen(vae), saved_bytes(vae) as alone:
        decode(latents)
    before = state(vae)
    with outer(vae), inner(vae):
        with saved_bytes(vae) as both:
            image = decode(latents)
        assert both.total == alone.total  # no input of a convolution, padded or not
        torch.testing.assert_close(
            decode(latents.roll(3, -1)), image.roll(12, -1), atol=1e-9, rtol=0
        )
        (of_x,) = torch.autograd.grad(image.square().mean(), latents)
    torch.testing.assert_close(of_x, expected, rtol=1e-9, atol=1e-12)
    assert state(vae) == before


def test_nothing_is_left_behind(vae: AutoencoderKL) -> None:
    latents = torch.randn(1, 4, 8, 10, dtype=torch.float64)
    before, image = state(vae), vae.decode(latents).sample
    with pytest.raises(RuntimeError, match="stop"), circular(vae), circular(vae, axes="y"):
        raise RuntimeError("stop")
    assert state(vae) == before
    assert torch.equal(vae.decode(latents).sample, image)


def test_the_innermost_block_applies_and_the_outer_one_comes_back() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1).double()
    x = torch.randn(1, 1, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        flat = conv(x)
        with circular(conv, axes="y"):
            vertical = conv(x)
        with circular(conv, axes="x"):
            horizontal = conv(x)
            with circular(conv, axes="y"):
                assert torch.equal(conv(x), vertical)
            with circular(conv, axes=""):
                assert torch.equal(conv(x), flat)
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


@pytest.mark.parametrize(
    ("axes", "extended", "horizontal", "vertical"),
    [
        ("", "x", "replicate", "constant"),
        ("", "xy", "replicate", "replicate"),
        ("y", "x", "replicate", "circular"),
        ("x", "y", "circular", "replicate"),
    ],
)
def test_an_extended_axis_repeats_its_outermost_cells(
    axes: str, extended: str, horizontal: str, vertical: str
) -> None:
    conv = nn.Conv2d(2, 2, (3, 5), padding=(1, 2)).double()
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    padded = nn.functional.pad(x, (2, 2, 0, 0), mode=horizontal)
    padded = nn.functional.pad(padded, (0, 0, 1, 1), mode=vertical)
    with circular(conv, axes=axes, extended=extended):
        expected = nn.functional.conv2d(padded, conv.weight, conv.bias)
        torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize(("dim", "axis"), [(-1, "x"), (-2, "y")])
def test_what_is_constant_along_an_axis_decodes_so_up_to_extended_ends(
    vae: AutoencoderKL, dim: int, axis: str
) -> None:
    latents = torch.randn(1, 4, 8, 8, dtype=torch.float64).mean(dim, keepdim=True)
    latents = 3 * latents.expand(1, 4, 8, 8)
    steps = {}
    with torch.no_grad():
        for extended in ("", axis):
            with circular(vae, axes="", extended=extended):
                steps[extended] = vae.decode(latents).sample.diff(dim=dim).abs().max()
    assert steps[""] > 1e-2  # zeros beyond the ends show
    assert steps[axis] < 1e-9


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


@pytest.mark.parametrize("kernel", [(4, 4), (4, 3), (3, 4), (1, 3), (3, 1)], ids=str)
def test_uneven_and_absent_padding(kernel: tuple[int, int]) -> None:
    """An even kernel pads one cell more at the end than at the start."""
    conv = nn.Conv2d(2, 2, kernel, padding="same").double()
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    (top, bottom), (left, right) = (((k - 1) // 2, k // 2) for k in kernel)
    padded = nn.functional.pad(x, (0, 0, top, bottom))
    padded = nn.functional.pad(padded, (left, right, 0, 0), mode="circular")
    with circular(conv, axes="x"):
        expected = nn.functional.conv2d(padded, conv.weight, conv.bias)
        torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": "z"}, r"^axes='z'.*'x'"),
        ({"extended": "yx"}, r"^extended='yx'.*'xy'"),
        ({"axes": "xy", "extended": "x"}, r"^extended='x': must not contain 'x', which wraps"),
    ],
)
def test_unknown_axes_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message), circular(nn.Conv2d(1, 1, 3), **options):
        pass


@pytest.mark.parametrize("before", [{}, {"name": None}, {"name": 1}])
def test_a_replaced_attribute_comes_back_even_if_it_was_none(before: dict[str, Any]) -> None:
    class Owner:
        name = "of the class"

    owner = Owner()
    vars(owner).update(before)
    with pytest.raises(RuntimeError), replaced(owner, "name", 2):
        assert owner.name == 2
        raise RuntimeError
    assert vars(owner) == before
