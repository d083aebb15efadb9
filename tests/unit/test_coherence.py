"""The measures of `script/coherence`, and what it makes to measure."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import coherence, spheres
from benchmarks.metrics import (
    SCHARR,
    discontinuity_score,
    equatorial_energy,
    low_pass_psnr,
    polar_energy,
)
from panorama.modes import load
from panorama.quality import seam_ratio
from tests.small_sdxl import save_family
from weights.train.depths import DepthReader


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
    coherence.TABLES[mode][0](arguments)


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


def test_low_pass_psnr_ignores_details_and_sees_a_shift_of_colour() -> None:
    base = torch.rand(1, 3, 8, 16, generator=torch.Generator().manual_seed(2))
    details = torch.tensor([[0.1, -0.1], [-0.1, 0.1]]).repeat(8, 16)
    larger = base.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert low_pass_psnr(larger + details, base) > 100
    assert low_pass_psnr(larger + 0.1, base) == pytest.approx(20, abs=0.01)


def test_a_sphere_of_the_same_details_everywhere_has_the_same_energy_at_its_poles() -> None:
    """Noise on a sphere, against the same noise stretched along the rows near the poles."""
    height = 128
    grid = torch.rand(1, 3, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    angles = (torch.arange(height) + 0.5) * torch.pi / height
    azimuths = (torch.arange(2 * height) + 0.5) * torch.pi / height
    z, x, y = (
        angles.cos()[:, None].expand(-1, 2 * height),
        angles.sin()[:, None] * azimuths.cos(),
        angles.sin()[:, None] * azimuths.sin(),
    )
    sphere = torch.nn.functional.grid_sample(
        grid, torch.stack([x, y, z], -1)[None, None], align_corners=False
    )[:, :, 0]
    noise = torch.rand(1, 3, height, 2 * height)
    assert polar_energy(sphere) == pytest.approx(equatorial_energy(sphere), rel=0.1)
    assert polar_energy(noise) < 0.8 * equatorial_energy(noise)  # interpolated, so smoother


def test_spheres_are_measured_in_every_version_beside_their_renders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_family(tmp_path, width=256, height=128, guidance_scale=3.0)
    models = load(str(tmp_path), device="cpu", modes=["sdxl-360"])
    renders = torch.rand(2, 1, 3, 256, 512, generator=torch.Generator().manual_seed(4))
    found = [spheres.Scene("sea", r, r[0, 0, ::2, ::2]) for r in renders]
    kept: dict[str, Tensor] = {}

    def keep(image: Tensor, name: str) -> None:
        kept[name] = image

    make = spheres.Maker(models, 4, keep)
    spheres.print_spheres(make, found)
    spheres.print_depths(make, found, DepthReader().eval())
    _, *rows = capsys.readouterr().out.splitlines()
    assert len(kept) == 2 * len(spheres.VERSIONS) + 4
    assert len({tuple(image.shape) for image in kept.values()}) == 3
    values = {row[:34].strip(): row[34:].split() for row in rows[:-2]}
    assert all(len(row) == len(spheres.VERSIONS) for row in values.values())
    assert values["repetition over the base"][0] == "1.000"
    assert values["low-pass PSNR to the base, dB"][0] == "inf"
    larger = [image for name, image in kept.items() if name.startswith("upscale 2-")]
    psnr = sum(low_pass_psnr(x, s.base) for x, s in zip(larger, found, strict=True)) / 2
    assert values["low-pass PSNR to the base, dB"][1] == f"{psnr:.3f}"
    assert values["sharpness over renders"][2] == "nan"
