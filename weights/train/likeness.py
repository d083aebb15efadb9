"""Compare the features of generated images with those of other images, as FID does."""

import torch
from torch import Tensor

from weights.train.recognise import Judge


def features(judge: Judge, windows: Tensor) -> Tensor:
    """Return the means (N, C) of the last block's features of windows (N, 3, H, W) in [-1, 1]."""
    with torch.no_grad():
        return judge.blocks(windows)[-1].mean((2, 3))


def frechet(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of the normal distributions of features (N, C) and (M, C)."""
    first, second = first.double(), second.double()
    means = (first.mean(0) - second.mean(0)).square().sum()
    one, two = (torch.cov(x.T) for x in (first, second))
    product = torch.linalg.eigvals(one @ two).real.clamp(min=0).sqrt().sum()
    return float(means + one.trace() + two.trace() - 2 * product)


def strangeness(found: Tensor, singles: Tensor) -> float:
    """Return the Frechet distance of features from those of single windows, over their variance."""
    return frechet(found, singles) / float(torch.cov(singles.T.double()).trace())
