"""Depth images: read, checked, and resized to a canvas that may close."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, ImageOps
from tifffile import EXTRASAMPLE, PHOTOMETRIC, TiffFile, TiffPage

from panorama import uploads
from panorama.sampling.canvas import Axis

MAX_BYTES = 8 * uploads.MAX_PIXELS  # four channels of 16 bits, uncompressed
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""The formats that are read. Pillow hands some others to external programs."""
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""The first bytes of a TIFF or BigTIFF, by byte order."""
WHITES = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 65535, "F": 1}
"""The brightest value of the Pillow modes that have more than 8 bits."""
LUMINANCE = np.array([299, 587, 114], np.float32) / 1000  # of RGB, ITU-R 601-2, as in Pillow
ROUNDING = 1e-3  # how far rounding, as in half precision, may put floats outside of [0, 1]
NARROW = 0.1  # a smaller range of nearness is too flat to follow
COLOURED = 0.1  # above this mean difference between the channels, an image counts as coloured

logger = logging.getLogger(__name__)
logging.getLogger("tifffile").addHandler(logging.NullHandler())  # or it prints of broken files


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


@dataclass(frozen=True, eq=False)
class Brightness:
    """The brightness of a file's pixels: 0 is black, and 1 white."""

    values: NDArray[np.float32]  # (H, W); floats of a file may lie outside of [0, 1]
    colour: float = 0.0  # mean difference between a pixel's channels


def read(path: Path, kind: str = "nearness") -> DepthImage:
    """Read a depth image of one of `FORMATS`.

    Colour is read by its brightness. Transparent pixels count as black. The orientation in the EXIF
    data is applied, and the first of several images in a file is taken. A warning is logged if the
    image is coloured, or uses little of the scale from black to white.

    Args:
        path: the file.
        kind: what brightness means, a key of `KINDS`.

    Returns:
        The depth, with the precision of the file if it is a TIFF or has one channel (16 bits, or
        32 as floating point), else with 8 bits.

    Raises:
        ValueError: the file does not exist, is not a whole image, is too small or too large, or its
            values are not of that kind. A file that is too large is not decoded.
    """
    brightness, sha256 = uploads.read("depth_image", path, FORMATS, MAX_BYTES, decode)
    try:
        values = KINDS[kind](brightness.values)
    except ValueError as error:
        raise ValueError(f"depth_image={path.name!r}: {error}") from error
    warn_of_little_depth(values, brightness.colour)
    return DepthImage(values, sha256)


def decode(data: bytes) -> Brightness:
    """Decode the brightness of an image file; raise what its reader raises."""
    if data.startswith(TIFF):
        with TiffFile(BytesIO(data)) as file:
            page = file.pages.first
            if page.photometric in SAMPLES_OF:
                return decode_tiff(page, len(data))
    with uploads.opened(data, FORMATS) as image:
        white = WHITES.get(image.mode, 255)
        values = np.asarray(grey(image), np.float32) / np.float32(white)
        return Brightness(values, colour_of(image))


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


def colour_of(image: Image.Image) -> float:
    """Return the mean difference between the channels of an image, 1 from black to white."""
    if image.mode in ("1", "L", "LA", *WHITES):
        return 0.0
    return float(np.ptp(np.asarray(image.convert("RGB")), axis=-1).mean() / 255)


SAMPLES_OF = {PHOTOMETRIC.MINISWHITE: 1, PHOTOMETRIC.MINISBLACK: 1, PHOTOMETRIC.RGB: 3}
"""The number of grey or colour samples of a TIFF's pixel. Pillow reads the other kinds."""
ALPHAS: Mapping[tuple[int, ...], bool] = {
    (): False,
    (EXTRASAMPLE.ASSOCALPHA,): False,  # colours are multiplied by it already
    (EXTRASAMPLE.UNASSALPHA,): True,
}
"""The samples that a TIFF's pixel may have besides, and whether to multiply by them."""


def decode_tiff(page: TiffPage, size: int) -> Brightness:
    """Decode the brightness of a page of a TIFF of `size` bytes, in any type of number."""
    uploads.check_size(page.imagewidth, page.imagelength)
    channels, white = SAMPLES_OF[PHOTOMETRIC(page.photometric)], white_of(page)
    expected = channels + len(page.extrasamples)
    if page.extrasamples not in ALPHAS or page.samplesperpixel != expected or page.imagedepth > 1:
        raise ValueError(f"its pixels have {page.samplesperpixel} samples, not grey or RGB")
    starts, counts = page.dataoffsets, page.databytecounts
    ends = [start + count for start, count in zip(starts, counts, strict=False)]
    if len(starts) != len(counts) or max(ends, default=size + 1) > size:
        raise ValueError("the file is truncated")
    with np.errstate(over="ignore"):  # in double precision, a missing distance may be -1.8e308
        samples = page.asarray().astype(np.float32) / np.float32(white)
    if "S" not in page.axes:
        samples = samples[..., None]
    elif page.axes.startswith("S"):  # channel by channel
        samples = np.moveaxis(samples, 0, -1)
    colours = samples[..., :channels]  # (H, W, 1 or 3)
    values = np.asarray(colours @ LUMINANCE if channels == 3 else colours[..., 0], np.float32)
    if page.photometric == PHOTOMETRIC.MINISWHITE:
        values = 1 - values
    if ALPHAS[page.extrasamples]:
        values = values * samples[..., channels]
    colour = float(np.ptp(colours, axis=-1).mean()) if channels == 3 else 0.0
    return Brightness(turned(values, page), colour)


def white_of(page: TiffPage) -> float:
    """Return the brightest value of a TIFF's type of number."""
    kind, bits = page.dtype.kind if page.dtype else "", page.bitspersample
    if kind not in ("b", "i", "u", "f"):
        raise ValueError(f"its samples have {bits} bits and are not real numbers")
    return 1.0 if kind == "f" else float(2 ** (bits - (kind == "i")) - 1)


def turned(values: NDArray[np.float32], page: TiffPage) -> NDArray[np.float32]:
    """Apply the orientation of a TIFF's page to values (H, W)."""
    image = Image.fromarray(np.ascontiguousarray(values))
    image.getexif()[ExifTags.Base.Orientation] = page.tags.valueof("Orientation", 1)
    return np.asarray(ImageOps.exif_transpose(image))


def nearness(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Clip brightness to nearness in [0, 1]; refuse values outside by more than `ROUNDING`."""
    least, greatest = float(values.min()), float(values.max())
    if not (least >= -ROUNDING and greatest <= 1 + ROUNDING):  # refuses NaN too
        raise ValueError(
            f"its brightness must be from black to white, not from {least:g} to {greatest:g}, "
            "where white is 1; try depth_kind='distance' if it holds distances"
        )
    return values.clip(0, 1)


def inverted(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return nearness from brightness that grows with distance."""
    return 1 - nearness(values)


def from_distance(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the nearness of distances of any unit: their inverse, from farthest to nearest.

    ControlNets are trained on such nearness (MiDaS, arXiv 1907.01341). Infinite distances are the
    farthest. So are those that were not measured: NaN, 0 and less.
    """
    measured = values > 0
    inverse = np.divide(1, values, out=np.zeros(values.shape), where=measured, dtype=np.float64)
    if not measured.any() or np.ptp(inverse[measured]) == 0:
        raise ValueError(
            "with depth_kind='distance', depth_image must hold at least two positive distances; "
            "try depth_kind='nearness'"
        )
    if lacking := 1 - measured.mean():
        logger.warning(
            "depth_image: %.1f%% of its distances are not above 0, and count as the farthest",
            100 * lacking,
        )
    farthest = inverse[measured].min()
    scaled: NDArray[np.float32] = (inverse - farthest) / (inverse.max() - farthest)
    return scaled.clip(0, 1).astype(np.float32)


KINDS: Mapping[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "nearness": nearness,
    "inverted": inverted,
    "distance": from_distance,
}
"""Functions from brightness to nearness in [0, 1], by `depth_kind`."""


def warn_of_little_depth(values: NDArray[np.float32], colour: float) -> None:
    """Log a warning if nearness (H, W) hardly varies, or if its image is strongly coloured."""
    if (span := float(np.ptp(values))) < NARROW:
        logger.warning(
            "depth_image: it uses %.1f%% of the scale from black to white, so there is little to "
            "follow; stretch it over the whole scale",
            100 * span,
        )
    if colour > COLOURED:
        logger.warning(
            "depth_image: it is coloured, and only its brightness is read; a colour map is no "
            "depth, so save it in grey"
        )


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


def warn_of_open_edges(name: str, values: NDArray[np.float32], closed: Axis) -> None:
    """Log a warning if the edges of an input's image do not meet along the axis that closes.

    Edges count as open if they differ on average by more than 2 of 255 grey levels, and by more
    than four times the mean difference of neighbouring pixels.

    Args:
        name: the input.
        values: (H, W) or (H, W, 3) in [0, 1].
        closed: the axis that closes.
    """
    if not closed:
        return
    rows = values if closed == "y" else values.swapaxes(0, 1)
    step = float(np.abs(rows[0] - rows[-1]).mean())
    usual = float(np.abs(np.diff(rows, axis=0)).mean())
    if step > max(2 / 255, 4 * usual):
        logger.warning(
            "%s: its %s edges differ by %.3f of the range from black to white, "
            "neighbouring pixels by %.3f; the panorama cannot be seamless there",
            name,
            {"x": "left and right", "y": "top and bottom"}[closed],
            step,
            usual,
        )
