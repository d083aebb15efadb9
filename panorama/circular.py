"""Convolutions that wrap around, for as long as a block runs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

AXES = ("", "x", "y", "xy")


@contextmanager
def circular(*modules: nn.Module, axes: str = "x") -> Iterator[None]:
    """Makes every padded Conv2d inside some modules wrap around while the block runs.

    The padding of a wrapped axis is taken from the opposite edge; the other axis keeps its own
    padding mode. Convolutions that LoRA layers hold are modules too and wrap with the rest. On
    exit, also by an exception, every convolution is as it was. Inside a nested block the inner one
    holds.

    Padding that a model applies outside its convolutions is not reached: that of the VAE encoder's
    downsampling. Decoders, UNets and ControlNets have none.

    Args:
        modules: whose convolutions, at any depth.
        axes: "x" joins left and right, "y" top and bottom, "xy" both, "" neither.

    Raises:
        ValueError: unknown axes.
    """
    if axes not in AXES:
        raise ValueError(f"axes={axes!r}: must be one of {', '.join(map(repr, AXES))}")
    with ExitStack() as stack:
        for conv in padded_convolutions(modules) if axes else ():
            stack.enter_context(replaced(conv, "_conv_forward", partial(wrapped, conv, axes)))
        yield


def padded_convolutions(modules: tuple[nn.Module, ...]) -> list[nn.Conv2d]:
    """Every Conv2d that pads, once each even where modules share it."""
    found = dict.fromkeys(m for root in modules for m in root.modules())
    return [m for m in found if isinstance(m, nn.Conv2d) and any(padding(m))]


def padding(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Left, right, top and bottom padding, in cells ("same" and "valid" resolved)."""
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    return left, right, top, bottom


def wrapped(conv: nn.Conv2d, axes: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`Conv2d._conv_forward` with circular padding on `axes`: (N, C, H, W) to (N, C', H', W')."""
    left, right, top, bottom = padding(conv)
    sides = {"x": (left, right, 0, 0), "y": (0, 0, top, bottom)}
    for axis, pad in sides.items():
        mode = "circular" if axis in axes else conv.padding_mode.replace("zeros", "constant")
        if any(pad):
            x = F.pad(x, pad, mode=mode)
    return F.conv2d(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups)


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Sets an attribute of the instance while the block runs, then puts back what was there."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
