"""Networks that keep little for a gradient with respect to their inputs, while a block runs.

Weights are not trained here. So a convolution needs none of its input for its gradient, and what
is cheap to compute, a normalisation with its activation, is computed again rather than kept. An
activation takes the place of what it is made of, which without a gradient saves time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.utils.checkpoint import checkpoint

from panorama.circular import replaced


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Lets gradients flow through networks to their inputs alone, while the block runs.

    No gradient of a weight is computed and nothing is kept for one. Outputs and gradients are what
    they are without it, to rounding.

    Args:
        networks: of diffusers, whose layers are known here, or any other.
    """
    modules = dict.fromkeys(module for network in networks for module in network.modules())
    with ExitStack() as stack:
        for module in modules:
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    stack.callback(parameter.requires_grad_, True)
                    parameter.requires_grad_(False)
            if type(module) in LEAN and is_plain(module):
                name, method = LEAN[type(module)]
                stack.enter_context(replaced(module, name, MethodType(method, module)))
        yield


@contextmanager
def checkpointed(*networks: Any) -> Iterator[None]:
    """Makes networks of diffusers compute their blocks again for a gradient, while the block runs.

    Only what goes into each block is kept (arXiv 1604.06174). A network that does so already goes
    on doing it.
    """
    changed = [network for network in networks if not network.is_gradient_checkpointing]
    with ExitStack() as stack:
        for network in changed:
            stack.callback(network.disable_gradient_checkpointing)
            network.enable_gradient_checkpointing()
        yield


def again(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), which is computed again for its gradient; only x is kept."""
    if not torch.is_grad_enabled():
        return function(x)
    result: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return result


class FrozenConvolution(torch.autograd.Function):
    """A convolution whose weights are not trained: its gradient needs no more than them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
    ) -> Tensor:
        """(N, C, H, W) to (N, C', H', W'); geometry is stride, padding, dilation and groups."""
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient (N, C', H', W') of the output to that of x (N, C, H, W)."""
        (weight,) = ctx.saved_tensors
        weight = weight.to(gradient.dtype)  # under autocast they differ
        of_x = conv2d_input(ctx.shape, weight, gradient, *ctx.geometry)  # type: ignore[no-untyped-call]
        return of_x, None, None, None


def convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`Conv2d._conv_forward`, which keeps no x."""
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    result: Tensor = FrozenConvolution.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return result


def residual(block: ResnetBlock2D, x: Tensor, temb: Tensor | None = None) -> Tensor:
    """`ResnetBlock2D.forward`, which keeps no normalised or activated x.

    Args:
        block: that is plain, see `is_plain`.
        x: (N, C, H, W).
        temb: the timesteps' embeddings (N, D), where the block listens to them.
    """
    hidden = block.conv1(again(lambda h: F.silu(block.norm1(h), inplace=True), x))
    if block.time_emb_proj is not None:
        hidden = hidden + block.time_emb_proj(block.nonlinearity(temb))[:, :, None, None]
    hidden = block.conv2(again(lambda h: F.silu(block.norm2(h), inplace=True), hidden))
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    result: Tensor = shortcut + hidden
    return result


def gated(layer: GEGLU, x: Tensor) -> Tensor:
    """`GEGLU.forward`, which keeps what its linear layer gives and not what becomes of it."""

    def gate(both: Tensor) -> Tensor:
        values, gates = both.chunk(2, dim=-1)
        product: Tensor = layer.gelu(gates).mul_(values)
        return product

    return again(gate, layer.proj(x))


LEAN: Mapping[type[nn.Module], tuple[str, Callable[..., Tensor]]] = {
    nn.Conv2d: ("_conv_forward", convolve),
    ResnetBlock2D: ("forward", residual),
    GEGLU: ("forward", gated),
}
"""For a kind of layer the method to replace, and what does the same and keeps less."""


def is_plain(module: nn.Module) -> bool:
    """Whether a layer is one that its replacement stands for: as Stable Diffusion has them."""
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, ResnetBlock2D):
        return (
            module.time_embedding_norm != "scale_shift"  # a decoder's are "group", without temb
            and not module.skip_time_act
            and module.upsample is None
            and module.downsample is None
            and isinstance(module.nonlinearity, nn.SiLU)
            and module.output_scale_factor == 1
            and not (module.training and module.dropout.p)
        )
    return True
