"""Calls of the networks that are recorded as CUDA graphs, and those that are replayed.

Without a GPU nothing can be recorded. A recording here calls the function again, as its graph does.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from panorama.sampling import graphs
from panorama.sampling.graphs import Graphs, Recording


class Function:
    """A function of tensors that notes what it is called for."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.now = "call"
        self.fails: set[str] = set()

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        self.now = what
        try:
            yield
        finally:
            self.now = "call"

    def __call__(self, x: Tensor, t: Tensor, depth: Tensor | None) -> Tensor:
        self.notes.append(f"{self.now} {len(x)}")
        if self.now in self.fails:
            raise torch.OutOfMemoryError("too little")
        return t * x if depth is None else t * x + depth


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> Iterator[Function]:
    given = Function()

    def record(function: Any, arguments: Any, pool: Any) -> Recording:
        with given.during("record"):
            result = function(*arguments)
        own = tuple(None if part is None else part.clone() for part in arguments)

        def replay() -> None:
            with given.during("replay"):
                result.copy_(function(*own))

        graph = SimpleNamespace(replay=replay, pool=lambda: pool or f"pool of {len(result)}")
        return Recording(graph, own, result)

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "can_replay", lambda x: not torch.is_grad_enabled())
    with torch.no_grad():
        yield given


@pytest.mark.parametrize("cuda", [True, False])
def test_only_calls_without_a_gradient_on_a_gpu_are_replayed(cuda: bool) -> None:
    x: Any = SimpleNamespace(is_cuda=cuda)
    assert not graphs.can_replay(x)
    with torch.no_grad():
        assert graphs.can_replay(x) == cuda


def arguments(count: int, seed: int, depth: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, count, 3, generator=generator)
    return x, torch.tensor(float(seed)), other if depth else None


def test_each_shape_is_called_once_recorded_once_and_then_replayed(function: Function) -> None:
    replayed = Graphs(function)
    results = []
    for seed in range(4):
        for count in (2, 5):
            given = arguments(count, seed, depth=count == 5)
            results.append((replayed(*given), Function()(*given)))
    for found, expected in results:  # later calls leave earlier results as they are
        assert torch.equal(found, expected)
    assert [note for note in function.notes if not note.startswith("replay")] == [
        "call 2", "call 5", "record 2", "record 5",
    ]  # fmt: skip
    assert function.notes.count("replay 2") == function.notes.count("replay 5") == 3
    with torch.enable_grad():
        replayed(*arguments(2, 9))
    assert function.notes[-1] == "call 2"


def test_recordings_share_their_memory(function: Function) -> None:
    replayed = Graphs(function)
    for count in (2, 5, 2, 5):
        replayed(*arguments(count, 1))
    pools = {recording.graph.pool() for recording in replayed._recordings.values() if recording}
    assert pools == {"pool of 2"}


@pytest.mark.parametrize("where", ["record", "replay"])
def test_once_memory_has_run_out_calls_run_as_they_are(function: Function, where: str) -> None:
    replayed = Graphs(function)
    replayed(*arguments(2, 0))
    function.fails = {where}
    for seed in (1, 2):
        given = arguments(2, seed)
        assert torch.equal(replayed(*given), Function()(*given))
    assert function.notes[-2:] == ["call 2", "call 2"]
    assert not replayed._recordings


def test_a_call_that_ran_out_of_memory_is_made_again_and_then_raises(function: Function) -> None:
    function.fails = {"call"}
    with pytest.raises(torch.OutOfMemoryError, match="too little"):
        Graphs(function)(*arguments(2, 0))
    assert function.notes == ["call 2", "call 2"]


def test_garbage_is_collected_again_after_a_recording_that_failed() -> None:
    assert gc.isenabled()
    with pytest.raises(RuntimeError), graphs.no_collection():
        assert not gc.isenabled()
        raise RuntimeError
    assert gc.isenabled()
    gc.disable()
    try:
        with graphs.no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_graphs_go_as_soon_as_nothing_uses_them(function: Function) -> None:
    replayed = Graphs(function)
    found = weakref.ref(replayed)
    replayed(*arguments(2, 0))
    gc.disable()
    try:
        del replayed
        assert found() is None
    finally:
        gc.enable()
