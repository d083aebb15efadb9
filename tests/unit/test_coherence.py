"""The measures of `script/coherence`."""

import pytest
import torch
from torch import Tensor

from script.coherence import SCHARR, discontinuity_score, seam_ratio


def waves(columns: int) -> Tensor:
    """Three waves of 128 columns each around the full turn, cut off after some columns."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.linspace(0, 6 * torch.pi, 385)[:columns]
    phase = 6 * torch.rand(1, 3, 32, 1, generator=generator)
    return 0.5 + 0.5 * torch.sin(angle + phase)


def test_a_seam_shows() -> None:
    for score in (seam_ratio, discontinuity_score):
        assert score(waves(384)) < 1.1
        assert score(waves(320)) > 2 * score(waves(384))


def test_a_seam_shows_wherever_the_picture_is_cut() -> None:
    whole, cut = waves(384), waves(320)
    assert discontinuity_score(whole.roll(50, -1)) < 1.1
    assert discontinuity_score(cut.roll(50, -1)) < discontinuity_score(cut)


def test_one_colour_has_no_discontinuity() -> None:
    assert discontinuity_score(torch.full((1, 3, 8, 16), 0.7)) == pytest.approx(0, abs=1e-5)


def test_the_discontinuity_score_is_that_of_its_formula() -> None:
    picture = torch.rand(1, 3, 6, 10, generator=torch.Generator().manual_seed(1))
    grey = 0.299 * picture[0, 0] + 0.587 * picture[0, 1] + 0.114 * picture[0, 2]
    rows, total = len(grey), 0.0
    for y in range(rows):
        edges = []
        for x in range(-2, 2):  # of the six columns from -3 to 2 those with neighbours
            edge = 0.0
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < rows:
                        edge += SCHARR[dy + 1][dx + 1] * float(grey[y + dy, x + dx])
            edges.append(abs(edge))
        total += edges[1] / (edges[0] + 0.1) + edges[2] / (edges[3] + 0.1)
    assert discontinuity_score(picture) == pytest.approx(total / (2 * rows), rel=1e-4)
