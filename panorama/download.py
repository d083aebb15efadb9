"""One file from one server: what the server offers, the transfer, and whether it is the file."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, parse_ratelimit_headers
from huggingface_hub.utils.sha import git_hash

from panorama.files import BadFileError, Known, measure, size_of
from panorama.manifest import Source

logger = logging.getLogger(__name__)

BUSY = (408, 429, 500, 502, 503, 504)
PAUSES = (1.0, 2.0)
"""Seconds to wait, attempt by attempt, for a server that does not say how long."""
LONGEST_PAUSE = 300
"""Seconds; a server that asks for more is given up. The hub counts requests in such windows."""
CONNECTIONS = 5
"""How many may break before a transfer is given up, each having brought something."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LARGEST_BLOB = 16 * 2**20
"""Bytes; the hub keeps larger files outside of git, and names them by their SHA-256."""

Result = TypeVar("Result")
OnBytes = Callable[[int], None]
"""Called with how many bytes came in; an exception that it raises ends the transfer."""


FAILURES = (
    httpx2.HTTPError,
    FileMetadataError,
    OfflineModeIsEnabled,
    BadFileError,
    ConnectionError,
)
"""What one server can do wrong while another may serve the file yet."""
UNREACHABLE = (httpx2.ConnectError, httpx2.ConnectTimeout)
"""Of these, what does not depend on the file."""


@dataclass(frozen=True)
class Offer:
    """A file as a server announces it.

    Attributes:
        source: Whose file it is.
        url: Where the transfer begins.
        headers: Of the request.
        size: Bytes, or None if the server does not say.
        etag: The server's name for these very bytes, or "".
        commit: Of the repository, or None if the source is not one.
    """

    source: Source
    url: str
    headers: Mapping[str, str]
    size: int | None
    etag: str
    commit: str | None


def ask(source: Source, name: str, revision: str | None, mirror: str | None, known: Known) -> Offer:
    """Asks a server for a file without transferring it.

    Args:
        source: Where the file is.
        name: Of the file.
        revision: A commit; None for the newest, or if the source is no repository.
        mirror: The URL of a server that is asked in place of the source's own; None for that.
        known: What the file has to be.

    Raises:
        BadFileError: It offers something else.
        httpx2.HTTPError: It does not offer the file.
    """
    token = token_for(source, mirror)
    url = locate(source, name, revision, mirror)
    seen = patiently(
        url, lambda: get_hf_file_metadata(url, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    )
    if source.repository:
        if seen.commit_hash is None:
            raise BadFileError("does not name a commit, so it is no hub")
        if revision not in (None, seen.commit_hash):
            raise BadFileError(f"serves commit {seen.commit_hash} for {revision}")
        url = locate(source, name, seen.commit_hash, mirror)
    etag = seen.etag or ""
    for field, offered, wanted in (
        ("size", seen.size or None, known.size),
        ("sha256", etag if is_sha256(etag) else None, known.sha256),
    ):
        if None not in (offered, wanted) and offered != wanted:
            raise BadFileError(f"offers {field} {offered}, but {known.by} says {wanted}")
    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}
    # A server that says 0 does not know: no file is empty.
    return Offer(source, url, headers, seen.size or known.size, etag, seen.commit_hash)


def token_for(source: Source, mirror: str | None) -> Literal[False] | None:
    """Whether a server gets the hub's token: None for yes, False for no, as the hub's client says.

    It is for the hub and for a private mirror, but goes in clear text no further than loopback.
    """
    if mirror is None:
        return None if source.repository else False
    parts = urlsplit(mirror)
    return None if parts.scheme == "https" or parts.hostname in LOOPBACK else False


def locate(source: Source, name: str, revision: str | None, mirror: str | None) -> str:
    """The URL of a file. A mirror has what is not on the hub below the name of its host."""
    if source.repository:
        return hf_hub_url(source.repository, name, revision=revision, endpoint=mirror)
    url = f"{source.url}/{name}"
    return f"{mirror}/{url.removeprefix('https://')}" if mirror else url


def is_sha256(etag: str) -> bool:
    """Whether an ETag is the SHA-256 that the hub gives to a large file."""
    return len(etag) == 64 and set(etag) <= set("0123456789abcdef")


def patiently(url: str, call: Callable[[], Result]) -> Result:
    """Calls a server, again after a pause if it is busy or the connection breaks.

    Args:
        url: what is asked for, to be told of.
        call: what asks.

    Raises:
        httpx2.HTTPError: It still is, or does, or wants a pause longer than `LONGEST_PAUSE`.
    """
    for pause in PAUSES:
        try:
            return call()
        except (httpx2.HTTPStatusError, HfHubHTTPError) as error:
            seconds = max(pause, asked_pause(error.response.headers))
            if error.response.status_code not in BUSY or seconds > LONGEST_PAUSE:
                raise
            problem: Exception = error
        except httpx2.TransportError as error:
            seconds, problem = pause, error
        logger.info("%s: %s; waiting for %g s", url, summary(problem), seconds)
        time.sleep(seconds)
    return call()


def asked_pause(headers: Mapping[str, str]) -> float:
    """The seconds for which a busy server asks to be left alone; 0 if it does not."""
    limit = parse_ratelimit_headers(headers)
    if limit and limit.remaining == 0:
        return limit.reset_in_seconds
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else 0


def summary(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def transfer(offer: Offer, path: Path, on_bytes: OnBytes) -> None:
    """Fetches a file, from where an earlier transfer ended.

    Args:
        offer: What to fetch.
        path: Of what an earlier transfer of these bytes left, if there was one.
        on_bytes: Told of every piece.

    Raises:
        BadFileError: The server sent more than it offered, or less in `CONNECTIONS` connections.
        httpx2.HTTPError: The transfer failed.
    """
    for _ in range(CONNECTIONS):
        if offer.size is None or size_of(path) != offer.size:
            patiently(offer.url, lambda: receive(offer, path, on_bytes))
        if offer.size in (None, size_of(path)):
            return
    raise BadFileError(f"ended after {size_of(path)} of {offer.size} bytes, {CONNECTIONS} times")


def receive(offer: Offer, path: Path, on_bytes: OnBytes) -> None:
    """Adds to a file what one connection brings, which is less than all of it if it breaks.

    Raises:
        BadFileError: The server sent what it did not offer.
        httpx2.HTTPError: It sent nothing.
    """
    # Without a size and an ETag nobody knows whether what is there belongs to what comes.
    start = size_of(path) if offer.size is not None and offer.etag else 0
    headers = {**offer.headers, **({"Range": f"bytes={start}-"} if start else {})}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", offer.url, headers=headers, timeout=timeout) as response:
        response.raise_for_status()  # the hub's own reads the body, which may be anything
        if response.status_code != 206:
            start = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise BadFileError(f"sent another range than bytes {start}-")
        end = start
        with path.open("ab" if start else "wb") as file:
            try:
                for piece in response.iter_bytes():
                    end += len(piece)
                    if offer.size is not None and end > offer.size:
                        raise BadFileError(f"sent more than the {offer.size} bytes that it offered")
                    file.write(piece)
                    on_bytes(len(piece))
            except httpx2.TransportError as error:
                if end == start or offer.size is None:
                    raise
                logger.info("%s: %s; it broke at %d bytes", offer.url, summary(error), end)


def verify(path: Path, offer: Offer, known: Known) -> Known:
    """Holds a file to what is known of it, and to what its server said.

    Returns:
        Its size and SHA-256.

    Raises:
        BadFileError: It is not the file.
    """
    seen = measure(path)
    offered = Known("the server", offer.size, offer.etag if is_sha256(offer.etag) else None)
    for claim in (known, offered):
        if claim.size not in (None, seen.size):
            raise BadFileError(f"sent {seen.size} bytes, but {claim.by} says {claim.size}")
        if claim.sha256 not in (None, seen.sha256):
            raise BadFileError(f"sent sha256 {seen.sha256}, but {claim.by} says {claim.sha256}")
    is_blob = offer.commit and len(offer.etag) == 40 and size_of(path) <= LARGEST_BLOB
    if is_blob and offer.etag != git_hash(path.read_bytes()):
        raise BadFileError(f"sent another file than its ETag {offer.etag} names")
    return seen
