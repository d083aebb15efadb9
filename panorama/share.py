"""What each of several processes does of one panorama."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, distributed

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """One of several processes that do the same work together, each of them a part of it.

    Attributes:
        rank: which one.
        ranks: how many there are; more than one are those of torch.distributed's default group.
    """

    rank: int = 0
    ranks: int = 1

    @property
    def first(self) -> bool:
        """Whether this one does what has to be done once."""
        return self.rank == 0

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that are this process's."""
        return items[self.rank :: self.ranks]

    def sum(self, total: Tensor) -> None:
        """Makes of every process's own total, of one shape, the sum of them all, in place."""
        if self.ranks > 1:
            distributed.all_reduce(total)


ALONE = Share()
"""Of a process that does everything."""
