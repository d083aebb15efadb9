"""Depth images: read, checked, and resized to a canvas that may close."""

import hashlib
import logging
import warnings
from dataclasses import dataclass
from io import BytesIO
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageOps

from panorama.sampling.canvas import Axis

SMALLEST_SIDE = 16  # pixels
MAX_PIXELS = 8192 * 4096
MAX_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits, uncompressed
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""The formats that are read. Pillow hands some others to external programs."""
WHITES = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 65535, "F": 1}
"""The brightest value of the Pillow modes that have more than 8 bits."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class DepthImage:
    """A depth image, read once."""

    values: NDArray[np.float32]  # (H, W) in [0, 1], 1 is nearest
    sha256: str  # of the file

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, pixels."""
        height, width = self.values.shape
        return width, height


def read(path: Path) -> DepthImage:
    """Read a depth image of one of `FORMATS`.

    Colour is read by its brightness. Transparent pixels count as black. The orientation in the EXIF
    data is applied, and the first of several images in a file is taken.

    Args:
        path: the file.

    Returns:
        The depth, with the precision of the file if it has one channel (16 bits, or 32 as
        floating point), else with 8 bits.

    Raises:
        ValueError: the file does not exist, is not a whole image, or is too small or too large. A
            file that is too large is not decoded.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"it has {size} bytes")
        data = path.read_bytes()
        values = decode(data)
    except Exception as error:  # Pillow's readers raise all kinds of errors on a broken file
        reason = str(error).replace(str(path), path.name)
        raise ValueError(
            f"depth_image={path.name!r}: depth_image must be a whole image of at most "
            f"{MAX_PIXELS} pixels and {MAX_BYTES} bytes, as {', '.join(FORMATS)} ({reason}); "
            "try a PNG"
        ) from error
    height, width = values.shape
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"depth_image={path.name!r}: depth_image must have at least {SMALLEST_SIDE} pixels a "
            f"side, not {width} x {height}; try one of the panorama's own size"
        )
    return DepthImage(values, hashlib.sha256(data).hexdigest())


def decode(data: bytes) -> NDArray[np.float32]:
    """Decode the brightness (H, W) in [0, 1] of an image file; raise what Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(BytesIO(data), formats=FORMATS) as image:  # reads only the header
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            white = WHITES.get(image.mode, 255)
            ImageOps.exif_transpose(image, in_place=True)
            values = np.asarray(grey(image), np.float32)
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(f"brightness from {values.min()} to {values.max()}, not 0 to {white}")
    return values / np.float32(white)


def grey(image: Image.Image) -> Image.Image:
    """Convert an image to its brightness, black where it is transparent."""
    if image.mode in WHITES:
        if image.has_transparency_data:
            raise ValueError("a transparent colour in more than 8 bits")
        return image
    if not image.has_transparency_data:
        return image.convert("L")
    image = image.convert("RGBA")
    return ImageChops.multiply(image.convert("L"), image.getchannel("A"))


def resize(
    depth: NDArray[np.float32], height: int, width: int, closed: Axis
) -> NDArray[np.float32]:
    """Resample depth (H, W) to (height, width), around the axis that closes."""
    rows, columns = depth.shape
    if (rows, columns) == (height, width):
        return depth
    # As many rows and columns as the filter reaches, from the opposite edge.
    above = ceil(rows / height) + 1 if closed == "y" else 0
    beside = ceil(columns / width) + 1 if closed == "x" else 0
    image = Image.fromarray(np.pad(depth, ((above, above), (beside, beside)), mode="wrap"))
    box = (beside, above, beside + columns, above + rows)
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR, box))


def warn_of_open_edges(depth: NDArray[np.float32], closed: Axis) -> None:
    """Log a warning if the edges of depth (H, W) do not meet along the axis that closes.

    Edges count as open if they differ on average by more than 2 of 255 grey levels, and by more
    than four times the mean difference of neighbouring pixels.
    """
    if not closed:
        return
    rows = depth if closed == "y" else depth.T
    step = float(np.abs(rows[0] - rows[-1]).mean())
    usual = float(np.abs(np.diff(rows, axis=0)).mean())
    if step > max(2 / 255, 4 * usual):
        logger.warning(
            "depth_image: its %s edges differ by %.3f of the range from black to white, "
            "neighbouring pixels by %.3f; the panorama cannot be seamless there",
            {"x": "left and right", "y": "top and bottom"}[closed],
            step,
            usual,
        )
