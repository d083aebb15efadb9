"""The faces of a cube and the perspective views of a 360 degree image."""

from collections.abc import Callable
from math import pi
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import panorama
from panorama.images.__main__ import main
from panorama.images.files import Panorama
from panorama.images.sphere import Face

Array = NDArray[np.float64]
WIDTH, SIDE = 512, 128
VIEWS = [f"view-{angle:03}" for angle in range(0, 360, 45)]
NAMES = ["nx", "ny", "nz", "px", "py", "pz", *VIEWS]
# The axes of each face, x right, y up and z to the middle of the image: its right, its upper end,
# and what it faces. They are those of OpenGL's cube maps.
AXES = {
    "px": ((0, 0, -1), (0, 1, 0), (1, 0, 0)),
    "nx": ((0, 0, 1), (0, 1, 0), (-1, 0, 0)),
    "py": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "ny": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "pz": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "nz": ((-1, 0, 0), (0, 1, 0), (0, 0, -1)),
}


def compass() -> Image.Image:
    """Return an image whose colours are the direction (x, y, z) of every pixel."""
    elevation = pi * (0.5 - (np.arange(WIDTH // 2) + 0.5) / (WIDTH // 2))[:, None]
    azimuth = 2 * pi * ((np.arange(WIDTH) + 0.5) / WIDTH - 0.5)
    x, z = np.cos(elevation) * np.sin(azimuth), np.cos(elevation) * np.cos(azimuth)
    y = np.sin(elevation).repeat(WIDTH, 1)
    return Image.fromarray(np.round(np.stack([x, y, z], -1) * 127 + 127).astype(np.uint8))


def rays(height: int, width: int, right: Array, up: Array, ahead: Array) -> Array:
    """Return the direction (H, W, 3) of every pixel of a view that is 90 degrees wide."""
    across = 2 * (np.arange(width) + 0.5) / width - 1
    above = height / width * (1 - 2 * (np.arange(height) + 0.5) / height)
    rays = ahead + across[None, :, None] * right + above[:, None, None] * up
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


def read(path: Path) -> Array:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.float64)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Array]:
    """Return a function that reads a file that was exported of the compass, as directions."""
    folder = tmp_path_factory.mktemp("exported")
    Panorama(compass(), "x", {}, {}).save(folder / "out.png")
    paths = panorama.export(folder / "out.png", folder / "faces")
    assert sorted(paths) == sorted((folder / "faces").iterdir())
    assert sorted(path.stem for path in paths) == NAMES
    return lambda name: (read(folder / "faces" / f"{name}.png") - 127) / 127


@pytest.mark.parametrize("name", AXES)
def test_a_face_sees_along_its_axis(exported, name):
    expected = rays(SIDE, SIDE, *np.array(AXES[name], dtype=float))
    np.testing.assert_allclose(exported(name), expected, atol=1.1 / 127)


@pytest.mark.parametrize("name", VIEWS)
def test_views_turn_to_the_right(exported, name):
    angle = np.radians(int(name.removeprefix("view-")))
    ahead = np.array([np.sin(angle), 0, np.cos(angle)])
    right = np.array([np.cos(angle), 0, -np.sin(angle)])
    expected = rays(72, SIDE, right, np.array([0, 1, 0]), ahead)
    np.testing.assert_allclose(exported(name), expected, atol=1.1 / 127)


@pytest.mark.parametrize(("name", "up"), [("py", True), ("ny", False)])
def test_the_poles_are_those_that_are_redrawn(exported, name, up):
    image = torch.from_numpy(np.array(compass())).permute(2, 0, 1)[None].double()
    face = Face(up, SIDE, 90).show(image)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(exported(name), (face - 127) / 127, atol=1.1 / 127)


def test_the_seam_is_seen_like_the_middle(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 128, 3)).astype(np.uint8)
    for name, values in (("a", noise), ("b", np.roll(noise, 64, axis=1))):
        Panorama(Image.fromarray(values), "x", {}, {}).save(tmp_path / f"{name}.png")
        panorama.export(tmp_path / f"{name}.png", tmp_path / name)
    for seam, middle in (("nz", "pz"), ("view-180", "view-000"), ("view-225", "view-045")):
        found, expected = (
            read(tmp_path / "a" / f"{seam}.png"),
            read(tmp_path / "b" / f"{middle}.png"),
        )
        np.testing.assert_allclose(found, expected, atol=1)


def test_script_export_writes_a_folder_beside_the_image(tmp_path, capsys):
    Panorama(compass(), "x", {}, {}).save(tmp_path / "out.jpg")
    assert main(["export", str(tmp_path / "out.jpg"), "--size", "40"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(paths) == [tmp_path / "out" / f"{name}.png" for name in NAMES]
    assert read(tmp_path / "out" / "px.png").shape == (40, 40, 3)
    assert read(tmp_path / "out" / "view-045.png").shape == (22, 40, 3)
    assert main(["export", str(tmp_path / "out.jpg"), "-o", str(tmp_path / "a" / "b")]) == 0
    assert read(tmp_path / "a" / "b" / "px.png").shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.png"], "none.png: must be a file that exists"),
        (["strip.png"], "strip.png: must be a 360 degree image, which closes left to right and is"),
        (["open.png"], "open.png: must be a 360 degree image"),
        (["text.png"], "text.png: must be a whole PNG, JPEG or WebP image"),
        (["out.png", "--size", "15"], "size=15: must be at least 16 pixels; try 512"),
        (["out.png", "-o", "text.png"], "text.png"),
    ],
)
def test_a_bad_command_gets_one_line(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 32)).save("out.png")
    Panorama(Image.new("RGB", (128, 32)), "x", {}, {}).save("strip.png")
    Panorama(Image.new("RGB", (64, 32)), "", {"closed": ""}, {}).save("open.png")
    Path("text.png").write_text("an image")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as exit_:
        main(["export", *arguments])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("export: ") and told in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
