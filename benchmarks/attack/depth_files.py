"""Corrupt depth images: how many are read, and give other values than the whole file."""

import io
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from benchmarks.goals import Goal
from panorama.conditioning.depth import read

PNG = b"\x89PNG\r\n\x1a\n"
CHECKED = ("png", "png 16 bit", "png palette")
"""The formats whose checksums cover every value. The others have none, or for a part alone."""
GOALS = {f"{name}, changed": Goal(most=0) for name in CHECKED}


def figures(count: int, seed: int) -> dict[str, int]:
    """Return the outcomes of `run` as one table."""
    found = run(count, seed)
    return {f"{name}, {what}": n for name, counts in found.items() for what, n in counts.items()}


def run(count: int, seed: int) -> dict[str, dict[str, int]]:
    """Read corrupt variants of a file of each format.

    Args:
        count: variants in all, spread evenly over the formats.
        seed: of the corruption.

    Returns:
        By format, the number of variants that were `refused`, read with the `same` values, or read
        with `changed` ones.
    """
    chance, whole = Random(seed), files()
    outcomes = {name: Counter(refused=0, same=0, changed=0) for name in whole}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "depth")
        for number in range(count):
            name = list(whole)[number % len(whole)]
            path.write_bytes(whole[name])
            values = read(path).values
            corrupt = chance.choice(PNG_CORRUPTIONS if name in CHECKED else CORRUPTIONS)
            path.write_bytes(different(corrupt, whole[name], chance))
            try:
                found = read(path).values
            except ValueError:
                outcomes[name]["refused"] += 1
                continue
            outcomes[name]["same" if np.array_equal(found, values) else "changed"] += 1
    return {name: dict(counts) for name, counts in outcomes.items()}


def files() -> Mapping[str, bytes]:
    """Return one whole file of each format, of the same depth (48, 64)."""
    rows, columns = np.mgrid[0:48, 0:64]
    wave = (rows + columns) / 110 + np.random.default_rng(0).random((48, 64)) / 50
    grey = np.uint8(wave / wave.max() * 255)
    deep, image = np.uint16(wave / wave.max() * 65535), Image.fromarray(grey)
    palette = image.quantize(64)
    return {
        "png": split(pillow(image, "PNG")),
        "png 16 bit": split(pillow(Image.fromarray(deep), "PNG", compress_level=0)),
        "png palette": pillow(palette, "PNG", transparency=3),
        "tiff": tiff(deep),
        "tiff deflate": tiff(deep, compression="zlib"),
        "jpeg": pillow(image, "JPEG"),
        "webp": pillow(image.convert("RGB"), "WEBP"),
        "webp lossless": pillow(image.convert("RGB"), "WEBP", lossless=True),
    }


def pillow(image: Image.Image, name: str, **options: Any) -> bytes:
    """Return a file that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options: Any) -> bytes:
    """Return a TIFF of some values."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def different(corrupt: Callable[[bytes, Random], bytes], data: bytes, chance: Random) -> bytes:
    """Corrupt a file until it differs."""
    while (found := corrupt(data, chance)) == data:
        pass
    return found


def flip(data: bytes, chance: Random) -> bytes:
    """Flip one bit."""
    place = chance.randrange(len(data))
    flipped = data[place] ^ 1 << chance.randrange(8)
    return data[:place] + bytes([flipped]) + data[place + 1 :]


def truncate(data: bytes, chance: Random) -> bytes:
    """Cut off the end."""
    return data[: chance.randrange(len(data))]


def swap(data: bytes, chance: Random) -> bytes:
    """Exchange two chunks of a PNG, or two blocks of another file."""
    pieces = chunks(data) if data.startswith(PNG) else blocks(data)
    first, second = chance.sample(range(len(pieces)), 2)
    pieces[first], pieces[second] = pieces[second], pieces[first]
    return data[: len(PNG)] * data.startswith(PNG) + b"".join(pieces)


def rewrite(data: bytes, chance: Random) -> bytes:
    """Flip a bit of a PNG's pixels in a valid stream of its own, under the checksum of the old."""
    before, images, after = parts(data)
    stream = flip(zlib.decompress(b"".join(image[8:-4] for image in images)), chance)
    changed = chunk(b"IDAT" + zlib.compress(stream))[:-4] + images[0][-4:]
    return PNG + b"".join([*before, changed, *after])


CORRUPTIONS = (flip, truncate, swap)
PNG_CORRUPTIONS = (*CORRUPTIONS, rewrite)


def blocks(data: bytes) -> list[bytes]:
    """Cut a file into sixteen blocks."""
    size = len(data) // 16 + 1
    return [data[start : start + size] for start in range(0, len(data), size)]


def chunks(data: bytes) -> list[bytes]:
    """Cut a PNG into its chunks, each with its length and checksum."""
    found, start = [], len(PNG)
    while start < len(data):
        end = start + 12 + struct.unpack_from(">I", data, start)[0]
        found.append(data[start:end])
        start = end
    return found


def chunk(body: bytes) -> bytes:
    """Return a chunk of a PNG, given its kind and data."""
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def parts(data: bytes) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Return the chunks of a PNG before its pixels, of its pixels, and after them."""
    every = chunks(data)
    images = [number for number, piece in enumerate(every) if piece[4:8] == b"IDAT"]
    first, end = images[0], images[-1] + 1
    return every[:first], every[first:end], every[end:]


def split(data: bytes) -> bytes:
    """Split the pixels of a PNG over four chunks."""
    before, images, after = parts(data)
    stream = b"".join(image[8:-4] for image in images)
    size = len(stream) // 4 + 1
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    return PNG + b"".join([*before, *(chunk(b"IDAT" + piece) for piece in pieces), *after])
