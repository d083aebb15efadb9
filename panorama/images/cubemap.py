"""The faces of a cube and perspective views of a 360 degree image, for engines that take those."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from equilib import equi2cube
from numpy.typing import NDArray
from PIL import Image

from panorama.images.files import closed_axis, read_whole

Pixels = NDArray[np.uint8]
FACES = {"px": "R", "nx": "L", "py": "U", "ny": "D", "pz": "F", "nz": "B"}
"""The name of each face in equilib."""
AROUND = ("pz", "px", "nz", "nx")  # a quarter turn to the right from one to the next
SMALLEST_SIDE = 16  # pixels


def export(
    image_file: str | os.PathLike[str], folder: str | os.PathLike[str], size: int | None = None
) -> list[Path]:
    """Write the faces of a cube and perspective views of a 360 degree image as PNG files.

    The faces `px`, `nx`, `py`, `ny`, `pz` and `nz` are seen from the middle of the cube: `pz` shows
    the middle of the image and `px` what is right of it. The lower edge of `py` and the upper edge
    of `ny` touch `pz`. The views `view-000` to `view-315` turn right from the middle of the image
    by 45 degrees each. They are 90 degrees wide, in the format 16:9.

    Args:
        image_file: a PNG, JPEG or WebP that closes left to right, twice as wide as high.
        folder: created if it is not there. Files with those names in it are replaced.
        size: width of the faces and the views, pixels; by default a quarter of the image's.

    Returns:
        The paths of the files.

    Raises:
        ValueError: the file is not such an image, or the size is less than 16.
    """
    image = read_whole(Path(image_file).read_bytes(), str(image_file))
    if closed_axis(image) != "x" or image.width != 2 * image.height:
        raise ValueError(
            f"{image_file}: must be a 360 degree image, which closes left to right and is twice as "
            "wide as high; try one of mode=sdxl-360"
        )
    size = image.width // 4 if size is None else size
    if size < SMALLEST_SIDE:
        raise ValueError(f"size={size}: must be at least {SMALLEST_SIDE} pixels; try 512")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, pixels in faces_and_views(np.asarray(image.convert("RGB")), size):
        paths.append(folder / f"{name}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def faces_and_views(image: Pixels, size: int) -> Iterator[tuple[str, Pixels]]:
    """Yield the names and pixels of the faces and views of an image (H, W, 3)."""
    straight, turned = (cube(image, size, yaw) for yaw in (0, 45))
    yield from straight.items()
    height = 2 * round(size * 9 / 32)  # even, as video encoders ask for
    top = (size - height) // 2
    for step in range(8):
        face = (turned if step % 2 else straight)[AROUND[step // 2]]
        yield f"view-{45 * step:03}", face[top : top + height]


def cube(image: Pixels, size: int, yaw: float) -> dict[str, Pixels]:
    """Return the faces (size, size, 3) of a cube that is turned right by an angle, degrees.

    The views are cut from faces too: equilib's `equi2pers` is off by most of a pixel.
    """
    rotation = {"roll": 0.0, "pitch": 0.0, "yaw": np.radians(yaw)}
    pixels = image.transpose(2, 0, 1).astype(np.float32)  # (3, H, W)
    faces = equi2cube(pixels, rotation, w_face=size, cube_format="dict")
    return {
        name: faces[key].transpose(1, 2, 0).round().astype(np.uint8) for name, key in FACES.items()
    }
