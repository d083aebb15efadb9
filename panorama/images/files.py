"""PNG files that say what made them, and that viewers show as a 360 degree image."""

import io
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

if TYPE_CHECKING:
    from panorama.sampling.canvas import Axis  # imports torch, which reading a file does not need

METADATA_KEY = "panorama"
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
    seconds: Mapping[str, float]  # time by stage: "denoise", "decode" and "check"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG with its metadata, whole or not at all. Equal panoramas give equal bytes."""
        info = PngInfo()
        info.add_itxt(METADATA_KEY, json.dumps(dict(self.metadata), ensure_ascii=False))
        if gpano := gpano_properties(*self.image.size, self.closed):
            properties = "\n   ".join(f"GPano:{k}={quoteattr(str(v))}" for k, v in gpano.items())
            info.add_itxt(XMP_KEY, XMP_PACKET.format(properties=properties))
        buffer = io.BytesIO()
        self.image.save(buffer, format="PNG", pnginfo=info)
        write_atomically(Path(path), buffer.getvalue())


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the metadata of a PNG that `Panorama.save` wrote.

    Returns:
        The `inputs` that its mode takes, as they were used, with files replaced by their hashes;
        the LoRA's `tokens` that preceded the prompt, "" for none; the model `family`; `versions`;
        the `device` that made the image, and the `threads` of its CPU.

    Raises:
        ValueError: the file is not a PNG with such metadata.
    """
    # Image.open refuses large images; this reads no pixels, and raises SyntaxError for no PNG.
    with suppress(SyntaxError, KeyError, ValueError), PngImageFile(os.fspath(path)) as image:
        metadata: dict[str, Any] = json.loads(image.info[METADATA_KEY])
        return metadata
    raise ValueError(f"{path}: must be a PNG made by panorama; try one that Panorama.save wrote")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it appears under its name whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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
