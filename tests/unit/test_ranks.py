"""Several processes make one panorama, the same that a single process makes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from panorama.sampling.canvas import Canvas, View, crop
from panorama.sampling.ranks import sharing_windows, split_among_ranks
from panorama.sampling.synchronize import SyncSettings
from panorama.sampling.views import Sliding
from tests.small import Networks

RANKS = 2


class Counting(Networks):
    """Counts the windows that a process denoises."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = 0

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        self.windows += len(x) * (not torch.is_grad_enabled())
        return super().predict_noise(x, t)


def run() -> tuple[Tensor, int]:
    """Sample a ring of nine windows, and count how many this process denoised."""
    networks = Counting()
    latents = networks.run(
        Canvas(16, 72, "x"), Sliding(8), SyncSettings(300.0, threshold=2), scheduler="unipc"
    )
    return latents, networks.windows


def work(rank: int, folder: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS
    )
    with sharing_windows():
        torch.save(run(), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (tmp_path,), nprocs=RANKS)
    alone, windows = run()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for latents, _ in parts:
        torch.testing.assert_close(latents, alone, rtol=1e-6, atol=1e-6)
    assert torch.equal(parts[0][0], parts[1][0])
    # Both have the anchor of 2 sync steps, and 4 steps have one of 9 windows twice.
    assert sum(count for _, count in parts) == windows + 2 + 4
    assert max(count for _, count in parts) <= windows / RANKS + 6


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shares_are_of_one_size_and_make_up_the_whole(
    count: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvas = torch.arange(20.0).view(1, 1, 1, 20)
    views = [View(0, left, 1, 4) for left in range(count)]
    parts: list[Tensor] = []

    def all_gather(gathered: list[Tensor], mine: Tensor) -> None:
        """Collect the parts, and fill those of the ranks so far."""
        parts.append(mine)
        for empty, part in zip(gathered, parts, strict=False):
            empty.copy_(part)

    monkeypatch.setattr(distributed, "get_world_size", lambda: ranks)
    monkeypatch.setattr(distributed, "all_gather", all_gather)
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        with sharing_windows():
            result = split_among_ranks(lambda some: crop(canvas, some))(views)
    assert torch.equal(result, crop(canvas, views))  # of the last rank, which has every part
    assert {len(part) for part in parts} == {-(-count // ranks)}


def test_outside_the_block_nothing_is_shared() -> None:
    def update(views: object) -> Tensor:
        return torch.ones(1)

    with pytest.raises(RuntimeError, match="stop"), sharing_windows():
        raise RuntimeError("stop")
    assert split_among_ranks(update) is update
