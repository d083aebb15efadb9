"""Read an image to start from."""

import hashlib
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
MAX_PIXELS = 8192 * 4096
MAX_BYTES = 4 * MAX_PIXELS
SMALLEST_SIDE = 16  # pixels


@dataclass(frozen=True, eq=False)
class SourceImage:
    """An image to start from, read once."""

    pixels: Tensor  # (1, 3, H, W) in [0, 1]
    sha256: str  # of the file

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, pixels."""
        height, width = self.pixels.shape[-2:]
        return width, height


def read(path: Path) -> SourceImage:
    """Read an image of one of `FORMATS` as RGB, on black where it is transparent.

    The orientation in its EXIF data is applied.

    Raises:
        ValueError: the file does not exist, is not a whole image, or is too small or too large.
            A file that is too large is not decoded.
    """
    if not path.is_file():
        raise ValueError(f"image={path.name!r}: must be a file that exists; try output.png")
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"it has {size} bytes")
        data = path.read_bytes()
        pixels = decode(data)
    except Exception as error:  # Pillow raises all kinds of errors on a broken file
        reason = str(error).replace(str(path), path.name)
        raise ValueError(
            f"image={path.name!r}: must be a whole image of at least {SMALLEST_SIDE} pixels a "
            f"side, at most {MAX_PIXELS} pixels and {MAX_BYTES} bytes, as {', '.join(FORMATS)} "
            f"({reason}); try a PNG"
        ) from error
    return SourceImage(pixels, hashlib.sha256(data).hexdigest())


def decode(data: bytes) -> Tensor:
    """Decode an image file to (1, 3, H, W) in [0, 1]; raise what Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(BytesIO(data), formats=FORMATS) as image:  # reads only the header
            if min(image.size) < SMALLEST_SIDE or image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            image.verify()  # a PNG's checksums and its end, which decoding skips
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)
            rgba = image.convert("RGBA")
            opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
            pixels = torch.from_numpy(np.array(opaque.convert("RGB")))  # (H, W, 3)
    return pixels.permute(2, 0, 1)[None] / 255
