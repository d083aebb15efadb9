"""All of a base model that a run could change."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from panorama.base_model import BaseModel


@dataclass
class State:
    """The state of networks.

    Attributes:
        attributes: names and modes of every module's own, patches among them, and its hooks.
        learning: whether each parameter takes a gradient.
        parameters: copies.
    """

    attributes: list[tuple[Any, ...]]
    learning: list[bool]
    parameters: list[Tensor]

    @classmethod
    def of(cls, base: BaseModel) -> Self:
        """Look at a base model. Run it once before: text encoders note that they were used."""
        modules = [module for network in base.networks() for module in network.modules()]
        parameters = [p for network in base.networks() for p in network.parameters()]
        return cls(
            [(*sorted(vars(m)), m.training, checkpointing(m), hooks(m)) for m in modules],
            [parameter.requires_grad for parameter in parameters],
            [parameter.detach().clone() for parameter in parameters],
        )

    def check(self, base: BaseModel) -> None:
        """Fail if anything is not as it was."""
        now = State.of(base)
        assert now.attributes == self.attributes
        assert now.learning == self.learning
        assert all(map(torch.equal, now.parameters, self.parameters))


def checkpointing(module: Any) -> bool:
    """Return True if diffusers' gradient checkpointing is on."""
    return bool(getattr(module, "gradient_checkpointing", False))


def hooks(module: nn.Module) -> int:
    """Return how many hooks run before a module."""
    return len(module._forward_pre_hooks)
