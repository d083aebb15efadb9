"""Depth images: read, checked, and resized around a panorama that closes left to right."""

import logging
import warnings
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageOps

SMALLEST_SIDE = 16  # pixels
MAX_PIXELS = 8192 * 4096
MAX_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits, uncompressed
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""What is read. Pillow hands some of its other formats to programs outside."""
WHITES = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 65535, "F": 1}
"""The brightest value of the Pillow modes that have more than 8 bits."""

logger = logging.getLogger(__name__)


def read(path: Path) -> NDArray[np.float32]:
    """Reads a depth image of one of `FORMATS`.

    Colour is read by its brightness. What is transparent counts as black. A picture is turned the
    way up that its file says, and of several in one file it is the first.

    Args:
        path: of the file.

    Returns:
        Depth (H, W) in [0, 1], brighter is nearer; of 16 bits, or of 32 as floating point, where
        the file has one channel, and of 8 otherwise.

    Raises:
        ValueError: there is no such file, it is no whole picture, or one too small or too large.
            What is too large is not decoded.
    """
    try:
        depth = decode(path)
    except Exception as error:  # Pillow's readers raise whatever comes up in a broken file
        reason = str(error).replace(str(path), path.name)
        raise ValueError(
            f"depth_image={path.name!r}: depth_image must be a whole picture of at most "
            f"{MAX_PIXELS} pixels and {MAX_BYTES} bytes, as {', '.join(FORMATS)} ({reason}); "
            "a PNG would do"
        ) from error
    height, width = depth.shape
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"depth_image={path.name!r}: depth_image must have at least {SMALLEST_SIDE} pixels a "
            f"side, not {width} x {height}; one of the panorama's own size would do"
        )
    return depth


def decode(path: Path) -> NDArray[np.float32]:
    """The brightness (H, W) in [0, 1] of a picture; what Pillow raises if it is none."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"it has {size} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:  # which reads no more than its header
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            white = WHITES.get(image.mode, 255)
            ImageOps.exif_transpose(image, in_place=True)
            values = np.asarray(grey(image), np.float32)
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(f"brightness from {values.min()} to {values.max()}, not 0 to {white}")
    return values / np.float32(white)


def grey(image: Image.Image) -> Image.Image:
    """The brightness of a picture, black where it is transparent."""
    if image.mode in WHITES:
        if image.has_transparency_data:
            raise ValueError("a transparent colour in more than 8 bits")
        return image
    if not image.has_transparency_data:
        return image.convert("L")
    image = image.convert("RGBA")
    return ImageChops.multiply(image.convert("L"), image.getchannel("A"))


def resize(depth: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Resamples depth (H, W) to (height, width); beyond an edge it goes on at the opposite one."""
    rows, columns = depth.shape
    if (rows, columns) == (height, width):
        return depth
    margin = ceil(columns / width) + 1  # columns that the filter reaches
    image = Image.fromarray(np.pad(depth, ((0, 0), (margin, margin)), mode="wrap"))
    box = (margin, 0, margin + columns, rows)
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR, box))


def warn_of_step(depth: NDArray[np.float32]) -> None:
    """Logs a warning if the left and right edges of depth (H, W) don't meet.

    They don't where they differ by more than 2 grey levels of 255, and by more than four times
    what neighbouring columns do, on average over the rows.
    """
    step = float(np.abs(depth[:, 0] - depth[:, -1]).mean())
    usual = float(np.abs(np.diff(depth, axis=1)).mean())
    if step > max(2 / 255, 4 * usual):
        logger.warning(
            "depth_image: its left and right edges differ by %.3f of the range from black to "
            "white, neighbouring columns by %.3f; the panorama can't be seamless there",
            step,
            usual,
        )
