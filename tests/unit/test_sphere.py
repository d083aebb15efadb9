"""Faces of a sphere: against a plain loop, and back."""

from math import atan2, cos, hypot, pi, radians, sin, tan

import numpy as np
import pytest
import torch
from torch import Tensor

from panorama.images.sphere import Face

both = pytest.mark.parametrize("up", [True, False])


def ramp(height: int = 128, width: int = 256) -> Tensor:
    """Return the direction (x, y, z) of every pixel, z up: smooth everywhere on the sphere."""
    angles = pi * (torch.arange(height) + 0.5) / height
    azimuths = 2 * pi * ((torch.arange(width) + 0.5) / width - 0.5)
    z = angles.cos()[:, None].expand(height, width)
    return torch.stack(
        [angles.sin()[:, None] * azimuths.sin(), angles.sin()[:, None] * azimuths.cos(), z]
    )[None]


@both
@pytest.mark.parametrize("field", [60.0, 90.0, 110.0])
def test_a_face_sees_the_direction_of_each_of_its_pixels(up: bool, field: float) -> None:
    side = 16
    seen = Face(up, side, field).show(ramp())[0]
    reach = tan(radians(field) / 2)
    for row in range(side):
        for column in range(side):
            right = reach * (2 * (column + 0.5) / side - 1)
            down = reach * (2 * (row + 0.5) / side - 1)
            ahead = down if up else -down  # the middle column lies below the zenith
            length = hypot(1, right, down)
            expected = [right / length, ahead / length, (1 if up else -1) / length]
            np.testing.assert_allclose(seen[:, row, column], expected, atol=2e-3)


@both
def test_rolling_by_a_quarter_turns_a_face(up: bool) -> None:
    image = torch.rand(1, 3, 64, 128)
    face = Face(up, 32)
    turned = torch.rot90(face.show(image), 1 if up else -1, (2, 3))
    torch.testing.assert_close(face.show(image.roll(32, -1)), turned, atol=1e-6, rtol=0)


@both
@pytest.mark.parametrize("field", [90.0, 100.0])
def test_a_change_is_added_at_its_place_and_nowhere_else(up: bool, field: float) -> None:
    image, face = torch.rand(1, 1, 128, 256), Face(up, 64, field)
    # A spot right of the middle, 20 degrees from the pole.
    spot, away = torch.zeros(1, 1, 64, 64), tan(radians(20)) / face.reach
    places = 2 * (torch.arange(64) + 0.5) / 64 - 1
    spot[0, 0] = torch.exp(-((places[None] - away) ** 2 + places[:, None] ** 2) / 0.005)
    change = face.blend(image, spot) - image
    row, column = divmod(int(change.argmax()), 256)
    degrees = 180 * (row + 0.5) / 128
    assert abs((degrees if up else 180 - degrees) - 20) < 2
    assert abs(360 * ((column + 0.5) / 256 - 0.5) - 90) < 3  # right is a quarter turn from ahead
    assert change.max() == pytest.approx(1, abs=0.05)
    beyond = round(128 * 62 / 180)
    rows = change.abs().amax((0, 1, 3)) if up else change.abs().amax((0, 1, 3)).flip(0)
    assert (rows[beyond:] == 0).all()


@both
def test_no_change_leaves_the_image_and_a_constant_one_fades_out(up: bool) -> None:
    image, face = torch.rand(1, 3, 128, 256), Face(up, 64)
    assert torch.equal(face.blend(image, torch.zeros(1, 3, 64, 64)), image)
    change = face.blend(torch.zeros(1, 1, 128, 256), torch.ones(1, 1, 64, 64))[0, 0]
    rows = change if up else change.flip(0)
    assert (rows[: 128 // 9] == 1).all()  # 20 degrees around the pole
    assert rows.min() >= 0 and rows.max() <= 1
    assert rows.diff(dim=0).max() <= 1e-6  # never grows away from the pole
    assert change.diff(dim=0).abs().max() < 0.2


def test_the_azimuth_of_both_faces_agrees_with_a_pixel_of_the_image() -> None:
    """One bright pixel lies where trigonometry says, seen from above and from below."""
    for up in (True, False):
        image = torch.zeros(1, 1, 64, 128)
        row, column = (10, 37) if up else (53, 37)
        image[..., row, column] = 1
        face = Face(up, 64)
        seen = face.show(image)[0, 0]
        y, x = divmod(int(seen.argmax()), 64)
        angle = pi * (row + 0.5) / 64 if up else pi - pi * (row + 0.5) / 64
        azimuth = 2 * pi * ((column + 0.5) / 128 - 0.5)
        right, ahead = tan(angle) * sin(azimuth), tan(angle) * cos(azimuth)
        down = ahead if up else -ahead
        expected = [(v / face.reach + 1) / 2 * 64 - 0.5 for v in (down, right)]
        np.testing.assert_allclose([y, x], expected, atol=1.5)
        assert atan2(right, ahead) == pytest.approx(azimuth)
