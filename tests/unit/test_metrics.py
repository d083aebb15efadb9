"""The measures of panoramas show what they are named after."""

import pytest
import torch

from benchmarks.metrics import repetition, variety
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


def test_variety_is_the_mean_distance_between_panoramas() -> None:
    judge = Judge()
    first, second = (noise(3 * 32, seed)[0].split(32, -1) for seed in (0, 1))
    panoramas = [torch.stack(first), torch.stack(second)]
    with torch.no_grad():
        expected = float(judge.distance(*panoramas).mean())
    assert variety(judge, panoramas) == pytest.approx(expected)
    same = torch.stack([first[0]] * 3)
    assert variety(judge, [same, same]) == pytest.approx(0, abs=1e-6)
