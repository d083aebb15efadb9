"""One HTML file that shows an image from inside, without a server and without a network."""

import io
import json
import os
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from html import escape
from importlib.resources import files
from math import atan, cos, degrees, pi, radians, tan
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.ImageFile import ImageFile

from panorama.images.files import (
    QUALITY,
    Panorama,
    closed_axis,
    metadata_of,
    read_whole,
    write_atomically,
)

if TYPE_CHECKING:
    from panorama.sampling.canvas import Axis  # imports torch, which takes seconds

PAGE = ".html"  # the ending of a page
STRIP_HEIGHT = 60.0  # degrees that an open strip covers from top to bottom, unless it is long
STRIP_WIDTH = 330.0  # degrees that it covers at most from end to end
LONGEST_TITLE = 80  # characters
WEBP_SIDE = 16383  # pixels
ENCODE: Mapping[str, Mapping[str, Any]] = {
    "PNG": {"format": "WEBP", "lossless": True, "method": 3, "quality": 30},  # quality: effort
    "JPEG": {"format": "JPEG", "quality": QUALITY},
    "WEBP": {"format": "WEBP", "quality": QUALITY},
}
"""Pillow's options for an image in the page, by the format of its file."""


@dataclass(frozen=True)
class Scene:
    """The surface around the viewer that shows an image: a sphere or a cylinder."""

    width: float  # degrees; 360 closes, and more overlaps
    height: float  # degrees
    radius: float = 0  # of the cylinder, in pixels; 0 for a sphere

    def settings(self) -> dict[str, Any]:
        """Return the settings of pannellum that show the image and nothing beyond it."""
        settings = {
            "autoLoad": True,
            "ignoreGPanoXMP": True,
            "haov": self.width,
            "vaov": self.height,
            "minHfov": min(30, self.height / 2),
        }
        if not self.radius:
            return settings
        end, top = self.width / 2, self.height / 2
        settings |= {"minPitch": -top, "maxPitch": top, "avoidShowingBackground": True}
        if self.width >= 360:
            return settings
        # Pannellum moves a view inwards, so that its corners stay inside, by at most this factor.
        widest = self.width / (2 - cos(radians(top)))
        return settings | {"minYaw": -end, "maxYaw": end, "maxHfov": min(120, widest)}


@dataclass(frozen=True)
class Embedded:
    """An image as the page holds it."""

    scene: Scene | None  # None to show it flat
    media_type: str
    data: bytes


def arrange(width: int, height: int, closed: "Axis") -> Scene | None:
    """Return how an image lies around the viewer, None for a tall one, which is shown flat."""
    if height > width:
        return None
    if closed == "x" and width == 2 * height:
        return Scene(360, 180)
    radius = width / (2 * pi)
    if closed != "x":
        radius = max(height / 2 / tan(radians(STRIP_HEIGHT / 2)), width / radians(STRIP_WIDTH))
    angle = 360 if closed == "x" else degrees(width / radius)
    return Scene(angle, 2 * degrees(atan(height / 2 / radius)), radius)


def bend(image: Image.Image, scene: Scene) -> Image.Image:
    """Resample an image on a cylinder to rows of equal angles, as pannellum takes them."""
    rows = round(scene.radius * radians(scene.height))
    angles = (radians(scene.height) * (row / rows - 0.5) for row in range(rows + 1))
    edges = [image.height / 2 + scene.radius * tan(angle) for angle in angles]
    edges[0], edges[-1] = 0, image.height
    bent = Image.new("RGB", (image.width, rows))
    for row in range(rows):
        box = (0, edges[row], image.width, edges[row + 1])
        bent.paste(image.resize((image.width, 1), Image.Resampling.BICUBIC, box), (0, row))
    return bent


def overlap(image: Image.Image) -> Image.Image:
    """Add a copy of each outer column on the other side, for pannellum to interpolate the seam."""
    wide = Image.new("RGB", (image.width + 2, image.height))
    wide.paste(image, (1, 0))
    wide.paste(image.crop((image.width - 1, 0, image.width, image.height)), (0, 0))
    wide.paste(image.crop((0, 0, 1, image.height)), (image.width + 1, 0))
    return wide


def embed(image: ImageFile, data: bytes, scene: Scene | None) -> Embedded:
    """Prepare an image for the page, given the bytes of its file.

    A PNG becomes a lossless WebP, which is smaller. JPEG and WebP files stay as they are, unless
    they lie on a cylinder.
    """
    kind = image.format or ""
    options = ENCODE[kind]
    if options["format"] == kind and not (scene and scene.radius):
        return Embedded(scene, Image.MIME[kind], data)
    pixels = image.convert("RGB")
    if scene and scene.radius:
        pixels = bend(pixels, scene)
    if scene and scene.width == 360:
        pixels = overlap(pixels)
        scene = replace(scene, width=360 * pixels.width / image.width)
    if options["format"] == "WEBP" and max(pixels.size) > WEBP_SIDE:
        options = {"format": "PNG"}
    buffer = io.BytesIO()
    pixels.save(buffer, **options)
    return Embedded(scene, Image.MIME[options["format"]], buffer.getvalue())


def view(image: Panorama | str | os.PathLike[str], html_file: str | os.PathLike[str]) -> None:
    """Write an HTML file that shows an image from inside, whole or not at all.

    Args:
        image: a panorama, or the path of a PNG, JPEG or WebP file.
        html_file: the path to write to.

    Raises:
        ValueError: the file is not a whole image.
    """
    if isinstance(image, Panorama):
        data, name = image.encode(), "panorama"
    else:
        data, name = Path(image).read_bytes(), str(image)
    write_atomically(Path(html_file), page(data, name))


def page(data: bytes, name: str = "panorama") -> bytes:
    """Return the HTML file of an image, given the bytes of its own file.

    Raises:
        ValueError: it is not a whole image; the error calls it by the name.
    """
    image = read_whole(data, name)
    embedded = embed(image, data, arrange(*image.size, closed_axis(image)))
    metadata = metadata_of(image)
    facts = list_facts(image.size, metadata)
    library, script = read_part("pannellum/pannellum.js"), read_part("viewer.js")
    text = Template(read_part("viewer.html")).substitute(
        title=escape(facts.get("Prompt", Path(name).name)[:LONGEST_TITLE]),
        facts="".join(
            f"<dt>{label}</dt><dd>{escape(fact)}</dd>\n" for label, fact in facts.items()
        ),
        metadata=escape(json.dumps(metadata, indent=2, ensure_ascii=False)),
        licence=read_part("pannellum/COPYING"),
        hashes=f"{content_hash(library)} {content_hash(script)}",
        library=library,
        library_style=read_part("pannellum/pannellum.css"),
        script=script,
        settings=json.dumps(embedded.scene and embedded.scene.settings()),
        media_type=embedded.media_type,
        image=b64encode(embedded.data).decode(),
    )
    return text.encode("utf-8", "replace")


def list_facts(size: tuple[int, int], metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts about how an image was made, by label, from its metadata."""
    inputs, versions = (metadata.get(name) for name in ("inputs", "versions"))
    inputs = inputs if isinstance(inputs, dict) else {}
    versions = versions if isinstance(versions, dict) else {}
    facts = {
        "Prompt": inputs.get("prompt"),
        "Negative prompt": inputs.get("negative_prompt"),
        "Mode": inputs.get("mode"),
        "Seed": inputs.get("seed"),
        "Family": metadata.get("family"),
        "Version": versions.get("panorama"),
        "Size": f"{size[0]} x {size[1]}",
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def read_part(name: str) -> str:
    """Read a part of the page, which lies beside this file."""
    return files("panorama.images").joinpath(name).read_text("utf-8")


def content_hash(script: str) -> str:
    """Return a script's hash as a source of a Content Security Policy."""
    return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"
