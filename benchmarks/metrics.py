"""Measures of panoramas beside those that every image records, see `panorama.quality`."""

from collections.abc import Sequence
from itertools import combinations
from statistics import mean

import torch
from torch import Tensor
from torch.nn import functional as F

from panorama.images.sphere import Face
from panorama.quality import disjoint_windows
from weights.train.recognise import Judge

GREY = (0.299, 0.587, 0.114)
SCHARR = ((-3.0, 0.0, 3.0), (-10.0, 0.0, 10.0), (-3.0, 0.0, 3.0))


def coherence(judge: Judge, image: Tensor, window: int) -> float:
    """Return the mean distance of pairs of non-overlapping windows of an image.

    Args:
        judge: measures distances.
        image: (1, 3, H, W) in [0, 1].
        window: side, pixels.
    """
    windows = torch.cat([*disjoint_windows(image, window)]) * 2 - 1
    first, second = zip(*combinations(range(len(windows)), 2), strict=True)
    with torch.no_grad():
        return float(judge.distance(windows[list(first)], windows[list(second)]).mean())


def discontinuity_score(image: Tensor, floor: float = 0.1) -> float:
    """Return the Discontinuity Score of (1, 3, H, W) in [0, 1], which is 0 for one colour.

    Three columns on either side of the seam are put together and convolved across it. Of the four
    columns that result, the middle two see the seam and the outer two do not: the score is the mean
    ratio of the former to the latter, about 1 for a busy image without a seam.

    Args:
        image: converted to grey first.
        floor: added to the denominators.

    Source:
        Geometry Fidelity for Spherical Images, arXiv 2407.18207, of which no code is published;
        kernel and floor are those of the evaluation in the repository
        littlewhitesea/Text-Driven-Pano-Gen.
    """
    grey = torch.einsum("nchw,c->nhw", image, torch.tensor(GREY))[:, None]
    seam = torch.cat([grey[..., -3:], grey[..., :3]], -1)  # (1, 1, H, 6)
    edges = F.conv2d(seam, torch.tensor(SCHARR)[None, None], padding=(1, 0)).abs()  # (1, 1, H, 4)
    outer_left, left, right, outer_right = edges.unbind(-1)
    ratios = left / (outer_left + floor) + right / (outer_right + floor)
    return float(ratios.mean() / 2)


def repetition(image: Tensor, window: int, *, ring: bool) -> float:
    """Return the largest correlation of the details of an image with themselves, moved sideways.

    The details are what a moving average over half a window, along each row, leaves. Moves are at
    least half a window. The correlation is normalised by that without a move.

    Args:
        image: (1, 3, H, W).
        window: width, pixels.
        ring: the image closes left to right, otherwise what is moved out of it is lost.
    """
    grey = torch.einsum("nchw,c->nhw", image, torch.tensor(GREY))  # (1, H, W)
    size = window // 4 * 2 + 1
    padded = F.pad(grey, (size // 2, size // 2), mode="circular" if ring else "reflect")
    details = (grey - F.avg_pool1d(padded, size, 1))[0]  # (H, W)
    width = details.shape[-1]
    length = width if ring else 2 * width
    spectrum = torch.fft.rfft(details.double(), length).abs().square().sum(0)
    correlation = torch.fft.irfft(spectrum, length)[: width // 2 + 1 if ring else width]
    return float(correlation[window // 2 :].max() / correlation[0])


def at_size_of(image: Tensor, other: Tensor) -> Tensor:
    """Average squares of pixels of an image until it is as large as another."""
    return F.avg_pool2d(image, image.shape[-1] // other.shape[-1])


def low_pass_psnr(image: Tensor, base: Tensor) -> float:
    """Return the PSNR in dB of an enlarged image, averaged down to the size of its base.

    Args:
        image: (1, 3, H, W) in [0, 1].
        base: (1, 3, h, w) in [0, 1], smaller by a whole factor, or as large.
    """
    return float(-10 * (at_size_of(image, base) - base).square().mean().log10())


def polar_energy(image: Tensor) -> float:
    """Return the energy of gradients at both poles, each in a perspective view of 90 degrees.

    A panorama that is smeared or overdrawn at its poles differs there from a render. Pixels of the
    views are about as large as those at the equator.

    Args:
        image: equirectangular, (1, 3, H, W).
    """
    views = [Face(up, image.shape[-2] // 2, 90.0).show(image) for up in (True, False)]
    return mean(map(energy, views))


def equatorial_energy(image: Tensor) -> float:
    """Return the energy of gradients up to 22.5 degrees from the equator of (1, 3, H, W)."""
    height = image.shape[-2]
    return energy(image[..., 3 * height // 8 : 5 * height // 8, :])


def energy(image: Tensor) -> float:
    """Return the mean square of the steps between neighbouring pixels."""
    return float(sum(image.diff(dim=dim).square().mean() for dim in (-1, -2)))


def variety(judge: Judge, panoramas: Sequence[Tensor]) -> float:
    """Return the mean distance between windows of different panoramas of one prompt.

    Args:
        judge: measures distances.
        panoramas: non-overlapping windows of each, (n, 3, h, w) in [-1, 1].
    """
    found = []
    with torch.no_grad():
        for first, second in combinations(panoramas, 2):
            # Each pair matches other windows, so that no place counts more.
            found.append(float(judge.distance(first, second.roll(len(found), 0)).mean()))
    return mean(found)
