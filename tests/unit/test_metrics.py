"""The measures of panoramas show what they are named after."""

import pytest
import torch

from benchmarks.metrics import edge_ratio, repetition, variety
from panorama.base_model import BaseModel
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.views import Fixed, Sliding
from tests.small_sd2 import build
from weights.train.recognise import Judge

WINDOW = 64


def noise(width: int, seed: int = 0) -> torch.Tensor:
    """Draw an image (1, 3, 32, width) of noise."""
    return torch.rand(1, 3, 32, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ring", [True, False])
def test_an_image_of_equal_tiles_repeats_itself(ring: bool) -> None:
    tile = noise(WINDOW)
    assert repetition(torch.cat([tile] * 6, -1), WINDOW, ring=ring) == pytest.approx(
        1 if ring else 5 / 6, abs=0.05
    )
    assert repetition(noise(6 * WINDOW), WINDOW, ring=ring) < 0.1


@pytest.mark.parametrize("ring", [True, False])
def test_repetition_is_the_correlation_of_its_definition(ring: bool) -> None:
    image = noise(4 * WINDOW)
    grey = torch.einsum("chw,c->hw", image[0], torch.tensor([0.299, 0.587, 0.114]))
    size = WINDOW // 2 + 1
    places = torch.arange(-(size // 2), 4 * WINDOW + size // 2)
    width = 4 * WINDOW
    places = places % width if ring else width - 1 - (width - 1 - places.abs()).abs()
    average = grey[:, places].unfold(-1, size, 1).mean(-1)
    details = grey - average
    moves = range(WINDOW // 2, width // 2 + 1 if ring else width)
    found = []
    for move in moves:
        moved = details.roll(-move, -1) if ring else details[:, move:]
        found.append(float((details[:, : moved.shape[-1]] * moved).sum()))
    expected = max(found) / float(details.square().sum())
    assert repetition(image, WINDOW, ring=ring) == pytest.approx(expected, abs=1e-4)


def test_panels_at_fixed_windows_have_edges_and_smooth_images_none() -> None:
    base: BaseModel = build()
    side = base.window * base.factor
    settings = Settings(
        prompt="sea", height=side, width=4 * side, num_inference_steps=8, layout=Fixed(base.window)
    )
    panels = torch.tensor([0.2, 0.5, 0.3, 0.9]).repeat_interleave(side).expand(1, 3, side, -1)
    even = torch.linspace(0, 1, 4 * side).expand(1, 3, side, -1)
    pipeline = Pipeline(base)
    # All steps are at 3 edges, of 4 * window - 1 places between cells.
    expected = (4 * base.window - 1) / 3
    assert edge_ratio(panels, pipeline, settings) == pytest.approx(expected, rel=1e-4)
    grid = (even * 4 * base.window).floor()  # steps between all cells, as decoders make them
    for smooth in (even, grid):
        assert edge_ratio(smooth, pipeline, settings) == pytest.approx(1, rel=1e-3)
    ring = Settings(prompt="sea", height=side, width=4 * side, closed="x", layout=Sliding(None))
    assert edge_ratio(panels, pipeline, ring) < 4


def test_variety_is_the_mean_distance_between_panoramas() -> None:
    judge = Judge()
    first, second = (noise(3 * 32, seed)[0].split(32, -1) for seed in (0, 1))
    panoramas = [torch.stack(first), torch.stack(second)]
    with torch.no_grad():
        expected = float(judge.distance(*panoramas).mean())
    assert variety(judge, panoramas) == pytest.approx(expected)
    same = torch.stack([first[0]] * 3)
    assert variety(judge, [same, same]) == pytest.approx(0, abs=1e-6)
