"""Image files that say what made them, and that viewers show as a 360 degree image."""

import io
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.WebPImagePlugin import WebPImageFile

if TYPE_CHECKING:
    from panorama.sampling.canvas import Axis  # imports torch, which reading a file does not need

METADATA_KEY = "panorama"  # of a PNG's text
ASCII = b"ASCII\0\0\0"  # how an EXIF comment in ASCII begins
QUALITY = 95  # of a JPEG or WebP
XMP_KEY = "XML:com.adobe.xmp"  # the iTXt keyword that the XMP specification reserves for a packet
XMP_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:GPano="http://ns.google.com/photos/1.0/panorama/"
   {properties}/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


@dataclass(frozen=True)
class Panorama:
    """A finished panorama."""

    image: Image.Image  # RGB
    closed: "Axis"  # along which it closes, "" for none
    metadata: Mapping[str, Any]  # ready for JSON; see `read_metadata`
    seconds: Mapping[str, float]  # time by stage, such as "denoise", "upscale" and "decode"

    @property
    def quality(self) -> Mapping[str, float]:
        """The measures of the image, by name; see docs/quality.md."""
        quality: Mapping[str, float] = self.metadata.get("quality", {})
        return quality

    def save(self, path: str | os.PathLike[str], quality: int = QUALITY) -> None:
        """Write the image with its metadata, whole or not at all.

        Equal panoramas give equal bytes.

        Args:
            path: its ending decides the format: one of `SUFFIXES`.
            quality: of a JPEG or WebP, 1 to 100.

        Raises:
            ValueError: the path ends otherwise.
        """
        path = Path(path)
        if path.suffix.lower() not in SUFFIXES:
            endings = ", ".join(SUFFIXES)
            raise ValueError(f"{path}: must be a file that ends in {endings}; try {path}.png")
        write_atomically(path, self.encode(SUFFIXES[path.suffix.lower()], quality))

    def encode(self, output_format: str = "png", quality: int = QUALITY) -> bytes:
        """Return the bytes of a file of the image with its metadata, in one of `FORMATS`."""
        xmp = xmp_packet(gpano_properties(*self.image.size, self.closed))
        buffer = io.BytesIO()
        self.image.save(buffer, **FORMATS[output_format](self.metadata, xmp, quality))
        return buffer.getvalue()


def png_options(metadata: Mapping[str, Any], xmp: str, quality: int) -> dict[str, Any]:
    """Return the arguments that make Pillow write a PNG, which has no quality."""
    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(dict(metadata), ensure_ascii=False))
    if xmp:
        info.add_itxt(XMP_KEY, xmp)
    return {"format": "PNG", "pnginfo": info}


def exif_options(name: str, metadata: Mapping[str, Any], xmp: str, quality: int) -> dict[str, Any]:
    """Return the arguments that make Pillow write a format that has EXIF, and XMP of its own."""
    exif = Image.Exif()
    comment = ASCII + json.dumps(dict(metadata)).encode("ascii")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    options = {"format": name, "quality": quality, "exif": exif}
    return options | {"xmp": xmp.encode()} if xmp else options


Options = Callable[[Mapping[str, Any], str, int], dict[str, Any]]
FORMATS: Mapping[str, Options] = {
    "png": png_options,
    "jpg": partial(exif_options, "JPEG"),
    "webp": partial(exif_options, "WEBP"),
}
"""Pillow's options for each format, from the metadata, an XMP packet or "", and the quality."""
SUFFIXES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
"""The format of a file, by the ending of its name."""
READERS = (PngImageFile, JpegImageFile, WebPImageFile)
"""Read no pixels before `load`. `Image.open` would refuse large images."""


def open_image(file: str | os.PathLike[str] | bytes) -> ImageFile:
    """Open an image by its path or its bytes.

    Raises:
        ValueError: it is not an image of one of `FORMATS`.
        DecompressionBombError: it is a WebP of more than twice Pillow's `MAX_IMAGE_PIXELS`.
    """
    for reader in READERS:  # each raises SyntaxError for another format
        with suppress(SyntaxError, KeyError, ValueError):
            return reader(io.BytesIO(file) if isinstance(file, bytes) else os.fspath(file))
    raise ValueError("it is none of them")


def read_whole(data: bytes, name: str) -> ImageFile:
    """Read an image with its pixels.

    Raises:
        ValueError: it is not a whole image; the error calls it by the name.
    """
    try:
        image = open_image(data)
        image.load()
    except Exception as error:  # Pillow raises all kinds of errors on a broken file
        raise ValueError(
            f"{name}: must be a whole PNG, JPEG or WebP image ({error}); try output.png"
        ) from error
    return image


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the metadata of an image that `Panorama.save` wrote.

    Returns:
        The `inputs` that its mode takes, as they were used, with files replaced by their hashes;
        the axis along which it is `closed`, "x", "y" or "" for none; the LoRA's `tokens` that
        preceded the prompt, "" for none; the model `family`; `versions`; the `device` that made
        the image, and the `threads` of its CPU; the `quality` of the image.

    Raises:
        ValueError: the file is not an image with such metadata.
        OSError: it cannot be read, or is a damaged WebP.
        DecompressionBombError: it is a WebP of more than twice Pillow's `MAX_IMAGE_PIXELS`.
    """
    with suppress(ValueError), open_image(path) as image:
        if metadata := metadata_of(image):
            return metadata
    raise ValueError(f"{path}: must be an image made by panorama; try one that Panorama.save wrote")


def metadata_of(image: Image.Image) -> dict[str, Any]:
    """Return the metadata of an opened image, {} if `Panorama.save` did not write it."""
    with suppress(KeyError, ValueError):
        exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
        text = image.info.get(METADATA_KEY) or exif[ExifTags.Base.UserComment][len(ASCII) :]
        metadata = json.loads(text)
        return metadata if isinstance(metadata, dict) else {}
    return {}


def closed_axis(image: Image.Image) -> "Axis":
    """Return the axis along which an opened image closes, "" for none.

    Its metadata say so, or its GPano fields. An image with neither closes left to right if it is
    twice as wide as high, as 360 degree images are.
    """
    if (closed := metadata_of(image).get("closed")) in ("", "x", "y"):
        return closed  # type: ignore[no-any-return]  # one of these texts
    xmp = image.info.get("xmp", b"").decode(errors="replace")
    found = re.findall(r'GPano:(?:FullPano|CroppedAreaImage)WidthPixels(?:="|>)(\d+)', xmp)
    whole = len(set(found)) == 1 if found else image.width == 2 * image.height
    return "x" if whole else ""


def is_whole(path: Path) -> bool:
    """Return True if a file is a whole image: a PNG by its checksums, others by their pixels."""
    try:
        with open_image(path) as image:
            image.verify() if isinstance(image, PngImageFile) else image.load()
    except Image.DecompressionBombError:
        return True  # a WebP too large for Pillow to decode: take it as whole, or it is made again
    except Exception:  # Pillow raises all kinds of errors on a broken file
        return False
    return True


def check_place(path: Path, legal: str) -> None:
    """Raise ValueError, with a legal path, if no file can be written to the path of `-o`."""
    if not path.parent.is_dir():
        raise ValueError(f"-o {path}: must be in a folder that exists; try {legal}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"-o {path}: must be writable; try {legal}")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it appears under its name whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path, names: str = "*") -> None:
    """Remove what killed processes left of files whose names match a pattern, in mid-write."""
    for part in folder.glob(f".{names}.part"):
        part.unlink(missing_ok=True)


def xmp_packet(properties: Mapping[str, object]) -> str:
    """Return GPano fields as an XMP packet, "" without fields."""
    lines = (f"GPano:{name}={quoteattr(str(value))}" for name, value in properties.items())
    return XMP_PACKET.format(properties="\n   ".join(lines)) if properties else ""


def gpano_properties(width: int, height: int, closed: "Axis") -> dict[str, object]:
    """Return the GPano fields of an image, {} if they cannot describe it.

    An image that closes left to right is the middle band of an equirectangular image of its own
    width, unless it is higher than that whole image. Only such a band is a 360 degree image.

    Source: Google, "Photo Sphere XMP Metadata".
    """
    full_height = width // 2
    if closed != "x" or height > full_height:
        return {}
    return {
        "ProjectionType": "equirectangular",
        "UsePanoramaViewer": "True",
        "FullPanoWidthPixels": width,
        "FullPanoHeightPixels": full_height,
        "CroppedAreaImageWidthPixels": width,
        "CroppedAreaImageHeightPixels": height,
        "CroppedAreaLeftPixels": 0,
        "CroppedAreaTopPixels": (full_height - height) // 2,
    }
