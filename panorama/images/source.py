"""Read an image to start from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from torch import Tensor

from panorama import uploads
from panorama.images.vae import from_pil

FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
MAX_BYTES = 4 * uploads.MAX_PIXELS
WHITE = 65535  # of a grey image of 16 bits


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
        ValueError: the file does not exist, is not a whole image, has neither 8 bits nor 16 in
            grey, or is too small or too large. A file that is too large is not decoded.
    """
    pixels, sha256 = uploads.read("image", path, FORMATS, MAX_BYTES, decode)
    return SourceImage(pixels, sha256)


def decode(data: bytes) -> Tensor:
    """Decode an image file to (1, 3, H, W) in [0, 1]; raise what Pillow raises."""
    with uploads.opened(data, FORMATS) as image:
        if image.mode.startswith(("I", "F")):
            return decode_grey(image)
        rgba = image.convert("RGBA")
        opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
        return from_pil(opaque.convert("RGB"))


def decode_grey(image: Image.Image) -> Tensor:
    """Return a grey image of 16 bits as (1, 3, H, W) in [0, 1]."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    plain = tags.get(BITSPERSAMPLE, (16,)) == (16,) and tags.get(PHOTOMETRIC_INTERPRETATION, 1) == 1
    if image.mode in ("I", "F") or not plain or image.has_transparency_data:
        raise ValueError("its samples have neither 8 bits nor 16 unsigned bits of opaque grey")
    grey = torch.from_numpy(np.asarray(image, np.float32) / np.float32(WHITE))
    return grey.expand(1, 3, -1, -1)
