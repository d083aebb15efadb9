"""Convolutions that wrap around a closed canvas."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from torch import Tensor, nn
from torch.nn import functional as F

AXES = ("", "x", "y", "xy")
PADDING = "_reversed_padding_repeated_twice"  # of a Conv2d: left, right, top and bottom
OUTSIDE = (0, 1, 0, 1)  # how Downsample2D pads outside of its convolution
_MISSING = object()


@contextmanager
def circular(*modules: nn.Module, axes: str = "x", extended: str = "") -> Iterator[None]:
    """Make every padded Conv2d inside modules wrap around while the block runs.

    A wrapped axis takes its padding from the opposite edge, an extended one repeats its outermost
    cells. Any other axis keeps its own padding mode. The convolutions of a LoRA are modules too and
    wrap with the rest. On exit, also by an exception, every convolution is as it was. Blocks nest,
    the innermost axes apply, and `gradient.frozen` may be entered inside or outside.

    The downsampling of a VAE encoder pads its right and lower edges outside of its convolutions,
    and wraps all the same.

    Args:
        modules: the convolutions at any depth are wrapped.
        axes: "x" joins left and right, "y" top and bottom, "xy" both, "" neither.
        extended: axes that repeat their outermost cells, spelled like `axes`.

    Raises:
        ValueError: unknown axes, or one that is to wrap and be extended.
    """
    for name, value in (("axes", axes), ("extended", extended)):
        if value not in AXES:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, AXES))}")
    if both := set(axes) & set(extended):
        raise ValueError(f"extended={extended!r}: must not contain {both.pop()!r}, which wraps")
    modes = dict.fromkeys(axes, "circular") | dict.fromkeys(extended, "replicate")
    with ExitStack() as stack:
        for module in padding_outside(modules):
            stack.enter_context(replaced(module, "padding", 1))  # so that it pads no more itself
            stack.enter_context(replaced(module.conv, PADDING, OUTSIDE))
        for conv in padded_convolutions(modules):
            stack.enter_context(patched(conv, axis_modes=modes))
        yield


@contextmanager
def patched(conv: nn.Conv2d, **attributes: object) -> Iterator[None]:
    """Run a convolution by `convolve`, with attributes that it reads, while the block runs."""
    attributes["_conv_forward"] = partial(convolve, conv)
    with ExitStack() as stack:
        for name, value in attributes.items():
            stack.enter_context(replaced(conv, name, value))
        yield


def convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Replace `Conv2d._conv_forward`: (N, C, H, W) to (N, C', H', W').

    Two attributes of the convolution change what it does, independently of each other:
    `axis_modes`, set by `circular`, and `conv2d`, set by `gradient.frozen`.
    """
    own = vars(conv)
    conv2d: Callable[..., Tensor] = F.conv2d
    if torch.is_grad_enabled():  # otherwise nothing is kept anyway
        conv2d = own.get("conv2d", F.conv2d)
    x, zeros = pad(conv, x, own.get("axis_modes", {}))
    return conv2d(x, weight, bias, conv.stride, zeros, conv.dilation, conv.groups)


def pad(conv: nn.Conv2d, x: Tensor, modes: Mapping[str, str]) -> tuple[Tensor, tuple[int, int]]:
    """Pad the input of a convolution by the mode of each axis, by default the convolution's own.

    Zeros that the convolution can add itself are left to it, since padding copies the input.

    Returns:
        The input (N, C, H, W), and the rows and columns of zeros to add on either side.
    """
    left, right, top, bottom = padding_of(conv)
    zeros = {"y": 0, "x": 0}
    for dim, axis, before, after in ((-2, "y", top, bottom), (-1, "x", left, right)):
        mode = modes.get(axis, conv.padding_mode)
        if not (before or after):
            continue
        if mode == "zeros" and before == after:
            zeros[axis] = before
        elif mode == "circular":
            x = torch.cat([x.narrow(dim, -before, before), x, x.narrow(dim, 0, after)], dim)
        else:
            sides = (before, after, 0, 0) if axis == "x" else (0, 0, before, after)
            x = F.pad(x, sides, mode=mode.replace("zeros", "constant"))
    return x, (zeros["y"], zeros["x"])


def padded_convolutions(modules: tuple[nn.Module, ...]) -> list[nn.Conv2d]:
    """Return every Conv2d that pads, once each even if modules share it."""
    return [m for m in all_modules(modules) if isinstance(m, nn.Conv2d) and any(padding_of(m))]


def padding_outside(modules: tuple[nn.Module, ...]) -> list[Any]:
    """Return every Downsample2D that pads outside of its convolution."""
    found = [m for m in all_modules(modules) if isinstance(m, Downsample2D)]
    return [m for m in found if m.use_conv and m.padding == 0]


def all_modules(modules: tuple[nn.Module, ...]) -> dict[nn.Module, None]:
    """Return `modules` and all modules inside them, each once even if it is shared."""
    return dict.fromkeys(m for root in modules for m in root.modules())


def padding_of(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return left, right, top and bottom padding in cells, with "same" and "valid" resolved."""
    left, right, top, bottom = getattr(conv, PADDING)
    return left, right, top, bottom


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute of an instance while the block runs, then restore what was there."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
