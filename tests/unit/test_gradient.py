"""Networks that keep little for a gradient compute what they compute without."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from panorama.gradient import checkpointed, frozen
from tests.small import small_unet, small_vae


def unet_noise(unet: Any, x: Tensor) -> Tensor:
    states = torch.ones(len(x), 3, 128, dtype=x.dtype)
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
    """What a network makes of some latents, and the gradient of its mean square."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64).requires_grad_()
    output = run(network, x)
    (of_x,) = torch.autograd.grad(output.square().mean(), x)
    return output.detach(), of_x


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """What autograd keeps meanwhile, the size of each storage by its address."""
    kept: dict[int, int] = {}
    held = []  # or an address could be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_stay_and_nothing_is_left_behind(
    name: str, checkpointing: bool
) -> None:
    make, run = NETWORKS[name]
    network = make().double()
    before = gradient(network, run)
    attributes = [dict(module.__dict__) for module in network.modules()]
    with frozen(network), checkpointed(*[network] if checkpointing else []):
        assert not any(p.requires_grad for p in network.parameters())
        torch.testing.assert_close(gradient(network, run), before, rtol=1e-9, atol=1e-9)
    assert all(p.requires_grad for p in network.parameters())
    changed = {"_gradient_checkpointing_func"} if checkpointing else set()
    for module, found in zip(network.modules(), attributes, strict=True):
        now = {k: v for k, v in module.__dict__.items() if k not in changed}
        assert now == {k: v for k, v in found.items() if k not in changed}


@pytest.mark.parametrize("name", NETWORKS)
def test_about_half_as_much_is_kept_and_a_quarter_with_checkpoints(name: str) -> None:
    make, run = NETWORKS[name]
    network = make().double()
    x = torch.randn(2, 4, 32, 32, dtype=torch.float64)

    def kept(*contexts: Any) -> int:
        weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            with saved_bytes() as found:
                output = run(network, x.requires_grad_())
        assert output.requires_grad
        return sum(size for place, size in found.items() if place not in weights)

    plain = kept()
    assert kept(frozen(network)) < 0.55 * plain
    assert kept(frozen(network), checkpointed(network)) < 0.25 * plain


def test_an_exception_puts_everything_back() -> None:
    unet = small_unet()
    before = [set(module.__dict__) for module in unet.modules()]
    with pytest.raises(RuntimeError), frozen(unet), checkpointed(unet):
        assert unet.is_gradient_checkpointing
        unet_noise(unet, torch.ones(1, 4, 16, 3))
        raise RuntimeError
    assert [set(m.__dict__) - {"_gradient_checkpointing_func"} for m in unet.modules()] == [
        names - {"_gradient_checkpointing_func"} for names in before
    ]
    assert not unet.is_gradient_checkpointing
    assert all(p.requires_grad for p in unet.parameters())


def test_weights_that_were_frozen_before_stay_frozen() -> None:
    unet = small_unet().requires_grad_(False)
    unet.conv_in.requires_grad_(True)
    with frozen(unet):
        pass
    trainable = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert trainable == {"conv_in.weight", "conv_in.bias"}


OTHER_KINDS: list[dict[str, Any]] = [
    {
        "down_block_types": ("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
    },
    {"act_fn": "gelu"},
    {"mid_block_scale_factor": 2},
]


@pytest.mark.parametrize("kind", OTHER_KINDS, ids=lambda kind: next(iter(kind)))
def test_blocks_of_another_kind_are_left_alone(kind: dict[str, Any]) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 128,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "layers_per_block": 1,
            **kind,
        }
    ).double()
    before = gradient(unet, unet_noise)
    with frozen(unet):
        torch.testing.assert_close(gradient(unet, unet_noise), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_convolutions_of_any_padding_have_their_gradient(padding: Any) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 4, 3, padding=padding), torch.randn(2, 3, 8, 8).requires_grad_()
    (expected,) = torch.autograd.grad(conv(x).square().sum(), x)
    with frozen(conv):
        (found,) = torch.autograd.grad(conv(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_under_autocast_a_gradient_meets_weights_of_its_own_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds: list[torch.dtype] = []

    def watched(shape: Any, weight: Tensor, gradient: Tensor, *geometry: Any) -> Tensor:
        kinds.extend((weight.dtype, gradient.dtype))
        return conv2d_input(shape, weight, gradient, *geometry)

    monkeypatch.setattr("panorama.gradient.conv2d_input", watched)
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (expected,) = torch.autograd.grad(conv(x).float().square().sum(), x)
        with frozen(conv):
            (found,) = torch.autograd.grad(conv(x).float().square().sum(), x)
    assert kinds == [torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(found, expected)
