"""One training loop for everything: AdamW, cosine to zero, moving average, checkpoints, resume."""

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, inf, pi
from pathlib import Path
from typing import TypeVar
from zlib import crc32

import torch
from torch import Tensor, nn

from weights.train.device import device, mixed_precision

Batch = tuple[Tensor, ...]
Draw = Callable[[torch.Generator], Batch]
"""Draws a batch on the device, with a generator of the CPU."""
Loss = Callable[..., Tensor]
"""Returns a model's loss on the tensors of a batch, in mixed precision. It depends on nothing but
them and the weights, and draws no random numbers, so that a GPU can replay it.
"""
Network = TypeVar("Network", bound=nn.Module)
Part = nn.Module | torch.optim.Optimizer

SAVE_EVERY = 180.0  # seconds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """The folder of a run's images, latents and checkpoints, and its deadline."""

    folder: Path
    deadline: float = inf  # by time.monotonic()


class OutOfTime(Exception):
    """The deadline passed before a training was finished; its checkpoint holds the progress."""


@dataclass(frozen=True)
class Plan:
    """The plan of a training, which sees the same batches however often it is resumed."""

    name: str
    steps: int
    learning_rate: float
    warmup: int = 200
    average: float = 0.0  # decay of the exponential moving average of the weights, 0 for none

    def seed(self, step: int) -> int:
        """Return the seed of a step's batch."""
        return (crc32(self.name.encode()) << 20) + step

    def rate(self, step: int) -> float:
        """Return the learning rate's factor: a linear warm-up, then a cosine to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + cos(pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


class Gradients:
    """The loss and its gradients, replayed on a GPU.

    A step of these small models is thousands of kernels, which take several times longer to launch
    than to run. A CUDA graph launches them all at once; there is one for each shape of a batch.
    """

    def __init__(self, loss: Loss, parameters: Sequence[nn.Parameter]) -> None:
        self.loss = loss
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.gradients = [parameter.grad for parameter in parameters]
        self.graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}
        self.pool: tuple[int, int] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """Set the gradients of a batch's loss, and return the loss."""
        if device().type != "cuda":
            return self.compute(batch)
        shapes = tuple(part.shape for part in batch)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture(batch)
        graph, inputs, value = self.graphs[shapes]
        torch._foreach_copy_(inputs, batch)
        graph.replay()
        return value

    def compute(self, batch: Batch) -> Tensor:
        """Set the gradients in place, and return the loss."""
        torch._foreach_zero_(self.gradients)
        value = self.loss(*batch)
        value.backward()
        return value.detach()

    def capture(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor]:
        """Capture the computation on a batch, after a few runs that choose kernels."""
        inputs = tuple(part.clone() for part in batch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.compute(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            value = self.compute(inputs)
        self.pool = graph.pool()
        return graph, inputs, value


def fit(model: Network, draw: Draw, loss: Loss, plan: Plan, work: Work) -> Network:
    """Train a model in place, resuming from its checkpoint in the work folder if there is one.

    Frozen weights keep their values. Buffers are not averaged, so they must not change.

    Returns:
        The trained model, its weights averaged if the plan says so.

    Raises:
        OutOfTime: the deadline came first.
    """
    path = work.folder / "checkpoints" / f"{plan.name}.pt"
    model.to(device())
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, plan.learning_rate, (0.9, 0.99), fused=device().type == "cuda"
    )
    average = copy.deepcopy(model).requires_grad_(False) if plan.average else model
    means, values = list(average.parameters()), list(model.parameters())
    parts: Mapping[str, Part] = {"model": model, "average": average, "optimizer": optimizer}
    first = resume(path, parts)
    gradients = Gradients(mixed_precision()(loss), learned)
    started = saved = time.monotonic()
    mean = torch.zeros((), device=device())
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * plan.rate(step)
        value = gradients(draw(torch.Generator().manual_seed(plan.seed(step))))
        nn.utils.clip_grad_norm_(learned, 1.0, foreach=True)
        optimizer.step()
        if plan.average:
            decay = min(plan.average, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(means, values, 1 - decay)
        mean += (value - mean) * max(0.01, 1 / (step - first + 1))
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            logger.info(
                "%s %d/%d loss %.4f %.2f s a step", plan.name, step + 1, plan.steps, mean, pace
            )
        now, last = time.monotonic(), step + 1 == plan.steps
        if now - saved > SAVE_EVERY or now > work.deadline or last:
            state = {name: part.state_dict() for name, part in parts.items()}
            save(state | {"step": step + 1}, path)
            saved = now
        if now > work.deadline and not last:
            raise OutOfTime(f"{plan.name} stopped after step {step + 1} of {plan.steps}")
    return average.eval()


def save(value: object, path: Path) -> None:
    """Write a file; a run killed meanwhile leaves the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def resume(path: Path, parts: Mapping[str, Part]) -> int:
    """Load the parts of a checkpoint, if there is one, and return the next step."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device(), weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    logger.info("resuming %s at step %d", path.stem, state["step"])
    return int(state["step"])
