"""PNG files that carry what made them, and that viewers open as a 360 where they are one."""

import hashlib
import io
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from panorama.__version__ import __version__
from panorama.request import ResolvedRequest

METADATA_KEY = "panorama"
XMP_KEY = "XML:com.adobe.xmp"  # the iTXt keyword under which the XMP specification puts a packet
XMP_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:GPano="http://ns.google.com/photos/1.0/panorama/"
   {properties}/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def save(
    image: Image.Image, path: str | os.PathLike[str], request: ResolvedRequest, family: str
) -> None:
    """Writes a PNG. The same picture, request and versions give the same bytes.

    Args:
        image: The picture.
        path: Of the file, which appears there whole or not at all.
        request: What the picture was made from.
        family: The model family that made it.
    """
    info = PngInfo()
    info.add_itxt(
        METADATA_KEY,
        json.dumps(_metadata(request, family), ensure_ascii=False, default=fingerprint),
    )
    if gpano := gpano_properties(request):
        properties = "\n   ".join(f"GPano:{k}={quoteattr(str(v))}" for k, v in gpano.items())
        info.add_itxt(XMP_KEY, XMP_PACKET.format(properties=properties))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    write_atomically(Path(path), buffer.getvalue())


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What made a PNG that `save` wrote: its `inputs`, `tokens`, model `family` and `versions`.

    The inputs are those of its mode, as they were used; a file is given by its fingerprint. The
    tokens are what was put in front of the prompt for the LoRA, "" for nothing.

    Raises:
        ValueError: The file is a picture, but not one of ours.
    """
    with PngImageFile(os.fspath(path)) as image:  # not Image.open, which refuses large pictures
        text = image.info  # what stands before the pixels, which are not read
    if METADATA_KEY not in text:
        raise ValueError(f"{path} does not say what made it: it has no {METADATA_KEY!r} text")
    metadata: dict[str, Any] = json.loads(text[METADATA_KEY])
    return metadata


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it appears under its name whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _metadata(request: ResolvedRequest, family: str) -> dict[str, Any]:
    versions = {name: version(name) for name in ("torch", "diffusers")}
    return {
        "inputs": request.mode_inputs(),
        "tokens": request.tokens,
        "family": family,
        "versions": {"panorama": __version__, **versions},
    }


def fingerprint(path: Path) -> str:
    """What stands for a file in the metadata: the hash of its bytes."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def gpano_properties(request: ResolvedRequest) -> dict[str, object]:
    """The GPano fields of a 360 picture, or {} of a picture that they cannot describe.

    A ring that closes left to right, or any picture twice as wide as high, is the middle band
    of an equirectangular picture of its own width. Nothing can be said of a ring that closes
    top to bottom, nor of one higher than that whole picture.

    Source: Google, "Photo Sphere XMP Metadata".
    """
    width, height = request.width, request.height
    full_height = width // 2
    if height > full_height or (request.closed_axis != "x" and height != full_height):
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
