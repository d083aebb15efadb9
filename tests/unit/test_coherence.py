"""The measures of `script/coherence`, and what it makes to measure."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import coherence
from benchmarks.metrics import SCHARR, discontinuity_score, seam_ratio
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


def test_a_seam_shows_wherever_the_image_is_cut() -> None:
    whole, cut = waves(384), waves(320)
    assert discontinuity_score(whole.roll(50, -1)) < 1.1
    assert discontinuity_score(cut.roll(50, -1)) < discontinuity_score(cut)


def test_one_colour_has_no_discontinuity() -> None:
    assert discontinuity_score(torch.full((1, 3, 8, 16), 0.7)) == pytest.approx(0, abs=1e-5)


def test_the_discontinuity_score_is_that_of_its_formula() -> None:
    image = torch.rand(1, 3, 6, 10, generator=torch.Generator().manual_seed(1))
    grey = 0.299 * image[0, 0] + 0.587 * image[0, 1] + 0.114 * image[0, 2]
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
    assert discontinuity_score(image) == pytest.approx(total / (2 * rows), rel=1e-4)


def measure(mode: str, folder: Path, **options: object) -> None:
    save_family(folder, modes=[mode], width=128, height=128, guidance_scale=3.0)
    arguments = Namespace(family=str(folder), mode=mode, prompt="sea", seeds=2, **options)
    coherence.TABLES[mode](arguments)


def test_sdxl_360_is_measured_as_it_is_used_and_without_its_lora(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = tmp_path / "images"
    measure("sdxl-360", tmp_path, steps=1, keep=keep)
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["0.8", "circular"], ["0.8", "zeros"], ["0", "circular"], ["0", "zeros"]]
    images = {path.read_bytes() for path in keep.iterdir()}
    assert len(images) == 8


def test_rings_and_strips_of_sdxl_windows_are_measured_with_and_without_synchronising(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = tmp_path / "images"
    options = {"steps": 2, "speed": None, "weights": [0.0, 20.0], "distance_scale": None}
    measure("syncdiffusion-xl", tmp_path, keep=keep, **options)
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert "windows of 128" in title
    found = [row.split()[:2] for row in rows]
    assert found == [["ring", "0"], ["ring", "20"], ["strip", "0"], ["strip", "20"]]
    images = {path.read_bytes() for path in keep.iterdir()}
    assert len(images) == 8
