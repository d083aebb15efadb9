"""Networks that keep little for a gradient compute the same as they do otherwise."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from panorama.sampling.gradient import frozen
from tests.small import saved_bytes, small_unet, small_vae


def unet_noise(unet: Any, x: Tensor) -> Tensor:
    states = torch.ones(len(x), 77, unet.config.cross_attention_dim, dtype=x.dtype)
    noise: Tensor = unet(x, torch.tensor(500), encoder_hidden_states=states).sample
    return noise


def vae_images(vae: Any, x: Tensor) -> Tensor:
    images: Tensor = vae.decode(x).sample
    return images


NETWORKS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = {
    "unet": (small_unet, unet_noise),
    "vae": (small_vae, vae_images),
}


def gradient(network: Any, run: Callable[[Any, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the output of a network, and the gradient of its mean square."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64).requires_grad_()
    output = run(network, x)
    (of_x,) = torch.autograd.grad(output.square().mean(), x)
    return output.detach(), of_x


def attributes(network: nn.Module) -> list[dict[str, Any]]:
    """Return the attributes of each module, but for a function that diffusers leaves behind."""
    left = "_gradient_checkpointing_func"
    return [{k: v for k, v in vars(m).items() if k != left} for m in network.modules()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_stay_and_nothing_is_left_behind(
    name: str, checkpointing: bool
) -> None:
    make, run = NETWORKS[name]
    network = make().double()
    expected, before = gradient(network, run), attributes(network)
    with frozen(network, checkpointing=checkpointing):
        assert not any(p.requires_grad for p in network.parameters())
        torch.testing.assert_close(gradient(network, run), expected, rtol=1e-9, atol=1e-9)
    assert all(p.requires_grad for p in network.parameters())
    assert attributes(network) == before


def kept(
    network: Any,
    run: Callable[[Any, Tensor], Tensor],
    context: AbstractContextManager[Any],
) -> int:
    """Return the bytes that a network keeps for the gradient of two inputs."""
    x = torch.randn(2, 4, 32, 32, dtype=network.dtype).requires_grad_()
    with context, saved_bytes(network) as found:
        output = run(network, x)
    assert output.requires_grad
    return found.total


@pytest.mark.parametrize("name", NETWORKS)
def test_less_is_kept_and_a_fifth_with_checkpointing(name: str) -> None:
    """Against weights that merely require no gradient."""
    make, run = NETWORKS[name]
    network = make().double().requires_grad_(False)
    plain = kept(network, run, nullcontext())
    assert kept(network, run, frozen(network)) < 0.85 * plain
    assert kept(network, run, frozen(network, checkpointing=True)) < 0.2 * plain


@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_a_convolution_keeps_nothing_but_its_weights(padding: Any) -> None:
    convs = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=padding) for _ in range(3)))
    x = torch.randn(2, 4, 16, 16).requires_grad_()
    with frozen(convs), saved_bytes(convs) as found:
        assert convs(x).requires_grad
    assert found.total == 0


def test_an_exception_puts_everything_back() -> None:
    unet = small_unet()
    before = attributes(unet)
    with pytest.raises(RuntimeError, match="stop"), frozen(unet, checkpointing=True):
        assert unet.is_gradient_checkpointing
        unet_noise(unet, torch.ones(1, 4, 16, 4))
        raise RuntimeError("stop")
    assert attributes(unet) == before
    assert not unet.is_gradient_checkpointing
    assert all(p.requires_grad for p in unet.parameters())


def test_checkpointing_is_turned_on_once_and_off_at_the_end() -> None:
    unet, vae, plain = small_unet(), small_vae(), nn.Conv2d(1, 1, 1)
    with frozen(unet, vae, plain) as turn_on:
        assert not unet.is_gradient_checkpointing
        assert turn_on()
        assert unet.is_gradient_checkpointing and vae.is_gradient_checkpointing
        assert not turn_on()  # there is nothing more to save
    assert not unet.is_gradient_checkpointing and not vae.is_gradient_checkpointing
    with frozen(unet, checkpointing=True) as turn_on:
        assert not turn_on()
    with frozen(plain) as turn_on:
        assert not turn_on()


def test_checkpointing_that_was_on_stays_on() -> None:
    unet = small_unet()
    unet.enable_gradient_checkpointing()
    with frozen(unet, checkpointing=True):
        assert unet.is_gradient_checkpointing
    assert unet.is_gradient_checkpointing


def test_weights_that_were_frozen_before_stay_frozen() -> None:
    unet = small_unet().requires_grad_(False)
    unet.conv_in.requires_grad_(True)
    with frozen(unet):
        pass
    trainable = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert trainable == {"conv_in.weight", "conv_in.bias"}


@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_any_padding_have_their_gradient(
    padding: Any, padding_mode: str, groups: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=padding_mode, groups=groups)
    x = torch.randn(2, 4, 8, 8).requires_grad_()
    (expected,) = torch.autograd.grad(conv(x).square().sum(), x)
    with frozen(conv):
        (found,) = torch.autograd.grad(conv(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_under_autocast_a_gradient_meets_weights_of_its_own_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtypes: list[torch.dtype] = []

    def watched(shape: Any, weight: Tensor, gradient: Tensor, *geometry: Any) -> Tensor:
        dtypes.extend((weight.dtype, gradient.dtype))
        return conv2d_input(shape, weight, gradient, *geometry)

    monkeypatch.setattr("panorama.sampling.gradient.conv2d_input", watched)
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (expected,) = torch.autograd.grad(conv(x).float().square().sum(), x)
        with frozen(conv):
            (found,) = torch.autograd.grad(conv(x).float().square().sum(), x)
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(found, expected)
