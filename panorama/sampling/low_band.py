"""The low band of latents: what a Gaussian blur leaves of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from panorama.sampling.canvas import Axis
from panorama.sampling.solver import Solver


@dataclass(frozen=True, eq=False)
class LowBand:
    """Hold the low band of x0 to that of a smaller image, so that its composition stays.

    Source: DiffuseHigh (arXiv 2406.18459, section 4.2), with a Gaussian in place of a wavelet.
    """

    reference: Tensor  # latents of the enlarged image, (1, C, H, W)
    sigma: float  # standard deviation of the Gaussian, latent cells
    closed: Axis = ""

    def __call__(self, solver: Solver, t: Tensor, x: Tensor, noise_pred: Tensor) -> Tensor:
        """Return the noise in latents x (1, C, H, W) whose x0 has the low band of the reference."""
        x0 = solver.x0(x, noise_pred, t)
        return solver.noise(x, x0 + smooth(self.reference - x0, self.sigma, self.closed), t)


def smooth(x: Tensor, sigma: float, closed: Axis = "") -> Tensor:
    """Average the rows and the columns of (N, C, h, w), weighted by a Gaussian of their distance.

    The weights of each row and column sum to 1, also at the ends of an axis. On the closed axis
    the distance is the shorter one of both ways around.
    """

    def weights(length: int, ring: bool) -> Tensor:
        places = torch.arange(length, device=x.device)
        distance = (places[:, None] - places).abs()
        if ring:
            distance = torch.minimum(distance, length - distance)
        return torch.softmax(-0.5 * (distance / sigma) ** 2, -1).to(x)

    rows, columns = x.shape[-2:]
    return weights(rows, closed == "y") @ x @ weights(columns, closed == "x").T
