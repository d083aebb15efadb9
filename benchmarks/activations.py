"""Count the memory of tensors."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from panorama.base_model import BaseModel


class Activations(TorchDispatchMode):
    """Count the bytes of tensors that are alive at once, each storage once, without the weights.

    Fake tensors count too: they have a storage and no values.

    Attributes:
        bytes: alive now.
        most: alive at once so far.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        """Leave these weights out of the count."""
        super().__init__()
        self.bytes = self.most = 0
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if size and place not in self._weights and place not in self._alive:
            self._alive.add(place)
            self.bytes += size
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self._remove, place, size)

    def _remove(self, place: int, size: int) -> None:
        self._alive.remove(place)
        self.bytes -= size


def weights_of(base: BaseModel) -> list[Tensor]:
    """Return every weight of a base model."""
    return [weight.detach() for network in base.networks() for weight in network.parameters()]
