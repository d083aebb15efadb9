"""Calls of networks as CUDA graphs, which launch all of their kernels at once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Arguments = tuple[Tensor | None, ...]
Function = Callable[..., Tensor]
"""A function of tensors."""


class Graphs:
    """Call a function of tensors, and replay CUDA graphs of its calls.

    A call of a UNet launches thousands of kernels, and for a few windows the processor takes longer
    to launch them than a GPU to run them. The first call with tensors of some shapes runs as it is,
    and chooses kernels. The second is recorded. It and all later ones are replayed.

    Calls on other devices, and those that keep what a gradient needs, run as they are.

    Args:
        function: computes a tensor from the first argument, a tensor, and others, tensors or None.
            It must not wait for the GPU. Whatever else it reads must not change.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._recordings: dict[tuple[torch.Size | None, ...], Recording | None] = {}

    def __call__(self, x: Tensor, *others: Tensor | None) -> Tensor:
        """Call the function."""
        if torch.is_grad_enabled() or not x.is_cuda:
            return self._function(x, *others)
        shapes = tuple(None if part is None else part.shape for part in (x, *others))
        if shapes not in self._recordings:
            self._recordings[shapes] = None
            return self._function(x, *others)
        recording = self._recordings[shapes]
        if recording is None:
            recording = self._recordings[shapes] = record(self._function, (x, *others))
        return recording.replay((x, *others))


@dataclass(frozen=True, eq=False)
class Recording:
    """A CUDA graph of a call, and the memory from which it reads and to which it writes."""

    graph: torch.cuda.CUDAGraph
    arguments: Arguments
    result: Tensor

    def replay(self, arguments: Arguments) -> Tensor:
        """Call the function again, with other tensors of the same shapes."""
        for own, given in zip(self.arguments, arguments, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        self.graph.replay()
        return self.result.clone()


def record(function: Function, arguments: Arguments) -> Recording:
    """Record a call of a function with tensors of these shapes."""
    own = tuple(None if part is None else part.clone() for part in arguments)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU at the same time.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function(*own)
    return Recording(graph, own, result)
