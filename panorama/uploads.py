"""Read the image files that users give, whole or not at all."""

import hashlib
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageOps

T = TypeVar("T")

SMALLEST_SIDE = 16  # pixels
MAX_PIXELS = 8192 * 4096


def read(
    name: str,
    path: Path,
    formats: Collection[str],
    max_bytes: int,
    decode: Callable[[bytes], T],
) -> tuple[T, str]:
    """Read and decode the image file of an input.

    Args:
        name: the input.
        path: the file.
        formats: the formats that `decode` takes.
        max_bytes: the size of the largest file that is read.
        decode: may raise any exception on a file that is broken.

    Returns:
        What `decode` returns, and the SHA-256 of the file.

    Raises:
        ValueError: the file does not exist, is too large, or cannot be decoded.
    """
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is none of that name"
        raise ValueError(
            f"{name}={path.name!r}: must be a file that exists ({found}); try the path of an image"
        )
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise ValueError(f"it has {size} bytes")
        data = path.read_bytes()
        return decode(data), hashlib.sha256(data).hexdigest()
    except Exception as error:  # the readers raise all kinds of errors on a broken file
        reason = str(error).replace(str(path), path.name)
        raise ValueError(
            f"{name}={path.name!r}: must be a whole image of at least {SMALLEST_SIDE} "
            f"pixels a side, at most {MAX_PIXELS} pixels and {max_bytes} bytes, as "
            f"{', '.join(formats)} ({reason}); try a PNG"
        ) from error


@contextmanager
def opened(data: bytes, formats: Collection[str]) -> Iterator[Image.Image]:
    """Open an image file with Pillow, turned as its EXIF data says; raise what Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(BytesIO(data), formats=list(formats)) as image:  # reads only the header
            check_size(image.width, image.height)
            image.verify()  # a PNG's checksums and its end, which decoding skips
        with Image.open(BytesIO(data), formats=list(formats)) as image:
            ImageOps.exif_transpose(image, in_place=True)
            yield image


def check_size(width: int, height: int) -> None:
    """Raise ValueError for an image that has too few pixels, or too many to decode."""
    if min(width, height) < SMALLEST_SIDE or width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels")
