"""One training loop for everything: AdamW, cosine to zero, moving average, checkpoints, resume."""

import copy
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn

Loss = Callable[[torch.Generator], Tensor]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The plan of a training run, which sees the same batches however often it is resumed."""

    name: str
    steps: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.01
    average: float = 0.0  # decay of the exponential moving average of the weights, 0 for none
    clip: float = 1.0
    save_every: float = 180.0  # seconds

    def seed(self, step: int) -> int:
        """Return the seed of a step's batch."""
        return (crc32(self.name.encode()) << 20) + step

    def rate(self, step: int) -> float:
        """Return the learning rate's factor: a linear warm-up, then a cosine to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + cos(pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


def has_bfloat16() -> bool:
    """Return True if the processor multiplies in bfloat16; others are many times slower at it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def mixed_precision() -> torch.autocast:
    """Compute in bfloat16 where it is faster than single precision."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16())


def fit(model: nn.Module, loss: Loss, plan: Plan, work: Path) -> nn.Module:
    """Train in place, from the last checkpoint if there is one.

    Args:
        model: the model to train.
        loss: draws a batch with the generator given and returns the model's loss on it.
        plan: the plan of the training run.
        work: the folder whose `checkpoints/` a later run resumes from.

    Returns:
        The trained model, its weights averaged if the plan says so.
    """
    path = work / "checkpoints" / f"{plan.name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), plan.learning_rate, (0.9, 0.99), weight_decay=plan.weight_decay
    )
    average = copy.deepcopy(model).requires_grad_(False) if plan.average else model
    first = resume(path, model, average, optimizer)
    started = saved = time.monotonic()
    mean = 0.0
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * plan.rate(step)
        value = loss(torch.Generator().manual_seed(plan.seed(step)))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        if plan.average:
            blend(average, model, min(plan.average, (step + 1) / (step + 10)))
        mean += (float(value.detach()) - mean) * max(0.01, 1 / (step - first + 1))
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            logger.info(
                "%s %d/%d loss %.4f %.2f s a step", plan.name, step + 1, plan.steps, mean, pace
            )
        if time.monotonic() - saved > plan.save_every or step + 1 == plan.steps:
            save(path, model, average, optimizer, step + 1)
            saved = time.monotonic()
    return average.eval()


def blend(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Set average to decay * average + (1 - decay) * model."""
    with torch.no_grad():
        for mean, now in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)
        for mean, now in zip(average.buffers(), model.buffers(), strict=True):
            mean.copy_(now)


def save(
    path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write a checkpoint; a run killed meanwhile leaves the previous one."""
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def resume(
    path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load a checkpoint, if there is one, and return the next step."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    logger.info("resuming %s at step %d", path.stem, state["step"])
    return int(state["step"])
