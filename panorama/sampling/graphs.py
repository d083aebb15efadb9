"""Calls of networks as CUDA graphs, which launch all of their kernels at once."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Tensor | None, ...]
Function = Callable[..., Tensor]
"""A function of tensors."""

RECORDING = Lock()
"""Held while a graph is recorded: PyTorch records one at a time."""


class Graphs:
    """Call a function of tensors, and replay CUDA graphs of its calls.

    A call of a UNet launches thousands of kernels, and for a few windows the CPU takes longer to
    launch them than a GPU takes to run them. For each set of shapes, the first call runs as it is,
    so that libraries choose their kernels. The second records a graph, which it and all later calls
    replay. Hooks of modules run only in the first two calls.

    Calls on other devices, and those that keep what a gradient needs, run as they are. So do all
    calls once memory has run out, since graphs keep the memory that their largest call needs.

    Args:
        function: computes a tensor from the first argument, a tensor, and others, tensors or None.
            It must not wait for the GPU. Whatever else it reads must not change.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._recordings: dict[tuple[torch.Size | None, ...], Recording | None] = {}
        self._exhausted = False

    def __call__(self, x: Tensor, *others: Tensor | None) -> Tensor:
        """Call the function."""
        if not self._exhausted and can_replay(x):
            try:
                return self._replay((x, *others))
            except torch.OutOfMemoryError:
                self._exhausted = True
                self._recordings.clear()
        return self._function(x, *others)

    def _replay(self, arguments: Arguments) -> Tensor:
        """Call the function as it is, record it, or replay it."""
        shapes = tuple(None if each is None else each.shape for each in arguments)
        if shapes not in self._recordings:
            result = self._function(*arguments)
            self._recordings[shapes] = None
            return result
        recording = self._recordings[shapes]
        if recording is None:
            made = (r for r in self._recordings.values() if r is not None)
            pool = next((r.graph.pool() for r in made), None)
            recording = self._recordings[shapes] = record(self._function, arguments, pool)
        return recording.replay(arguments)


@dataclass(frozen=True, eq=False)
class Recording:
    """A CUDA graph of a call, and the memory from which it reads and to which it writes."""

    graph: Any  # torch.cuda.CUDAGraph
    arguments: Arguments
    result: Tensor

    def replay(self, arguments: Arguments) -> Tensor:
        """Call the function again, with other tensors of the same shapes."""
        for own, given in zip(self.arguments, arguments, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        self.graph.replay()
        return self.result.clone()


def can_replay(x: Tensor) -> bool:
    """Return True if a call with a tensor can be a CUDA graph."""
    return x.is_cuda and not torch.is_grad_enabled()


def record(function: Function, arguments: Arguments, pool: Any = None) -> Recording:
    """Record a call of a function with tensors of these shapes.

    Args:
        function: see `Graphs`; it was called with such tensors before.
        arguments: at least the first is a tensor, on the GPU.
        pool: memory of an earlier graph to share. Graphs that share memory must not run at the
            same time, and their results must be read before the next one runs.
    """
    own = tuple(None if each is None else each.clone() for each in arguments)
    device, graph = next(each.device for each in own if each is not None), torch.cuda.CUDAGraph()
    with (
        RECORDING,
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),  # restored whatever happens inside
        no_collection(),
    ):
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Other threads may launch kernels meanwhile.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            result = function(*own)
    return Recording(graph, own, result)


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect no garbage while the block runs: a graph deleted then would spoil the recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
