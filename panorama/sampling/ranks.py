"""Several processes on one panorama."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, distributed

from panorama.sampling.canvas import View

UpdateWindows = Callable[[Sequence[View]], Tensor]
"""From N views to what is computed in their windows, (N, C, h, w)."""

_sharing = ContextVar("sharing windows among ranks", default=False)


@contextmanager
def sharing_windows() -> Iterator[None]:
    """Split the windows of every panorama among the ranks while the block runs.

    All ranks of torch.distributed's default group must sample the same canvas inside it.
    """
    token = _sharing.set(True)
    try:
        yield
    finally:
        _sharing.reset(token)


def split_among_ranks(update: UpdateWindows) -> UpdateWindows:
    """Wrap an update of windows so that each rank computes its part and gets the rest.

    Outside of `sharing_windows` the update is returned as it is.
    """
    if not _sharing.get():
        return update
    rank, ranks = distributed.get_rank(), distributed.get_world_size()

    def shared(views: Sequence[View]) -> Tensor:
        # Every rank computes equally many windows, since all_gather needs equal shapes.
        count = -(-len(views) // ranks)
        padded = [views[min(index, len(views) - 1)] for index in range(count * ranks)]
        mine = update(padded[rank * count : (rank + 1) * count]).contiguous()
        parts = [torch.empty_like(mine) for _ in range(ranks)]
        distributed.all_gather(parts, mine)
        return torch.cat(parts)[: len(views)]

    return shared
