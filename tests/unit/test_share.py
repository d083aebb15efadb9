"""Several processes make one panorama, and it is the one that a single process makes."""

from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing

from panorama.sampler import sample
from panorama.share import ALONE, Share
from panorama.synchronize import Synchronizer, SyncSchedule
from panorama.views import step_views
from tests.numeric.test_plain_loop import Networks, make_scheduler

RANKS = 2


class Seen(Networks):
    """Counts the windows that a process denoises."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = 0

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        self.windows += len(x) * (not torch.is_grad_enabled())
        return super().predict_noise(x, t)


def run(share: Share) -> tuple[Tensor, int]:
    networks, solver = Seen(), make_scheduler("unipc")
    latents = sample(
        torch.randn(1, 4, 16, 72, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        step_views(16, 72, 16, 8, ring_x=True),
        networks.predict_noise,
        solver,
        synchronizer=Synchronizer(
            networks.predict_noise, networks.decode, networks, solver.alphas_cumprod
        ),
        schedule=SyncSchedule(300.0, threshold=2),
        share=share,
    )
    return latents, networks.windows


def work(rank: int, folder: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS
    )
    torch.save(run(Share(rank, RANKS)), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (tmp_path,), nprocs=RANKS)
    alone, windows = run(ALONE)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for latents, _ in parts:
        torch.testing.assert_close(latents, alone, rtol=1e-6, atol=1e-6)
    assert torch.equal(parts[0][0], parts[1][0])
    # All have the anchor of both sync steps.
    assert sum(count for _, count in parts) == windows + 2 * (RANKS - 1)
    assert max(count for _, count in parts) <= windows / RANKS + 6


def test_shares_make_up_the_whole() -> None:
    items = list(range(7))
    assert sorted(item for rank in range(3) for item in Share(rank, 3).of(items)) == items
    assert ALONE.of(items) == items
