"""Gradients with respect to the inputs of networks, in little memory."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from panorama.sampling.circular import all_modules, patched


@contextmanager
def frozen(*networks: nn.Module, checkpointing: bool = False) -> Iterator[Callable[[], bool]]:
    """Let gradients flow through networks to their inputs alone, while the block runs.

    No gradient of a weight is computed. A convolution then does not need its input in the backward
    pass, so it does not keep it. Outputs and gradients stay the same, up to rounding.

    Args:
        networks: any modules.
        checkpointing: recompute the blocks of diffusers' networks in the backward pass, which
            keeps only the input of each (arXiv 1604.06174).

    Yields:
        A function that turns checkpointing on for the rest of the block, and returns False if
        that changes nothing.
    """
    with ExitStack() as stack:
        for module in all_modules(networks):
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    stack.callback(parameter.requires_grad_, True)
                    parameter.requires_grad_(False)
            if isinstance(module, nn.Conv2d):
                stack.enter_context(patched(module, conv2d=FrozenConvolution.apply))

        def checkpoint() -> bool:
            changed: list[Any] = [network for network in networks if enable_checkpointing(network)]
            for network in changed:
                stack.callback(network.disable_gradient_checkpointing)
            return bool(changed)

        if checkpointing:
            checkpoint()
        yield checkpoint


def enable_checkpointing(network: Any) -> bool:
    """Turn on diffusers' gradient checkpointing; return False if it is on or not supported."""
    supported = getattr(network, "_supports_gradient_checkpointing", False)
    if not supported or network.is_gradient_checkpointing:
        return False
    network.enable_gradient_checkpointing()
    return True


class FrozenConvolution(Function):
    """A convolution with fixed weights: its gradient needs nothing but them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        """Convolve x to (N, C', H', W'). The geometry is stride, padding, dilation and groups."""
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Turn the gradient of the output (N, C', H', W') into that of x (N, C, H, W)."""
        (weight,) = ctx.saved_tensors
        weight = weight.to(gradient.dtype)  # under autocast they differ
        of_x = conv2d_input(ctx.shape, weight, gradient, *ctx.geometry)  # type: ignore[no-untyped-call]
        return of_x, *([None] * (2 + len(ctx.geometry)))
