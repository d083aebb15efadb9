"""Read an image to start from."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from panorama import uploads
from panorama.images.vae import from_pil

FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
MAX_BYTES = 4 * uploads.MAX_PIXELS


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
    pixels, sha256 = uploads.read("image", path, FORMATS, MAX_BYTES, decode)
    return SourceImage(pixels, sha256)


def decode(data: bytes) -> Tensor:
    """Decode an image file to (1, 3, H, W) in [0, 1]; raise what Pillow raises."""
    with uploads.opened(data, FORMATS) as image:
        rgba = image.convert("RGBA")
        opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
        return from_pil(opaque.convert("RGB"))
