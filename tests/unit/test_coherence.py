"""The measures of `script/coherence`."""

from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from script import coherence
from script.coherence import SCHARR, discontinuity_score, seam_ratio
from tests.small_sdxl import save_family


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


def test_sdxl_360_is_measured_as_it_is_used_and_without_its_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_family(tmp_path, width=128, height=64, guidance_scale=3.0)
    load = Mock(side_effect=coherence.load)
    monkeypatch.setattr(coherence, "load", load)
    keep = tmp_path / "pictures"
    coherence.table_sdxl_360(
        Namespace(family=str(tmp_path), prompt="sea", seeds=2, steps=1, keep=keep)
    )
    assert load.call_args.kwargs["device"] == "cpu"  # where the stock pipelines' noise is
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["0.8", "circular"], ["0.8", "zeros"], ["0", "circular"], ["0", "zeros"]]
    pictures = {path.read_bytes() for path in keep.iterdir()}
    assert len(pictures) == 8
