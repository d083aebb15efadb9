"""LoRAs that users name: fetched from the hub or a URL, by rules, and kept for the next time."""

import hashlib
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from tempfile import NamedTemporaryFile

import httpx2
from huggingface_hub import constants, hf_hub_url

from panorama.conditioning.lora import read_metadata
from panorama.errors import shorten

LARGEST = 2 * 10**9  # bytes of a file
ROOM = 8 * 10**9  # bytes of all files that are kept
DEADLINE = 600  # seconds for a file
REDIRECTS = 5

NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<file>[^?#]+\.safetensors))?")
"""A repository on the hub, and a file in it."""

TRANSLATED = tuple(map(ip_network, ("64:ff9b::/96", "2002::/16", "2001::/32")))
"""IPv6 networks whose addresses embed an IPv4 address, perhaps a private one."""


class FetchError(ValueError):
    """A LoRA cannot be fetched; the message completes "it must ..."."""


def allowed_hosts() -> tuple[str, ...]:
    """Return the hosts of PANORAMA_LORA_HOSTS, by default the hub; "*" stands for any."""
    hub = httpx2.URL(constants.ENDPOINT).host
    names = os.environ.get("PANORAMA_LORA_HOSTS", hub).split(",")
    return tuple(name.strip().lower() for name in names if name.strip())


def default_folder() -> Path:
    """Return the folder of the hub client's cache for files that are not of a repository."""
    return Path(constants.HF_ASSETS_CACHE) / "panorama" / "loras"


def public_address(host: str) -> str:
    """Look up a host; refuse one that has any address inside a private network."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchError(f"be on a host that is known, not {shorten(host)}") from error
    addresses = [ip_address(address[0]) for *_, address in found]
    for address in addresses:
        hidden = any(address in network for network in TRANSLATED)
        if hidden or address.is_multicast or not address.is_global:
            raise FetchError(f"be on a public host, not {shorten(host)}")
    return str(addresses[0])


@dataclass(frozen=True)
class Fetcher:
    """Fetch LoRAs for users who need not be trusted.

    Every connection is to the very address that was checked, after redirects too. No login or token
    of this machine is sent.
    """

    folder: Path = field(default_factory=default_folder)
    hosts: tuple[str, ...] = field(default_factory=allowed_hosts)  # that a user may name
    largest: int = LARGEST
    room: int = ROOM
    address: Callable[[str], str] = public_address  # of a host, or FetchError
    context: ssl.SSLContext = field(default_factory=ssl.create_default_context, repr=False)

    def fetch(self, name: str) -> Path:
        """Return the file of a LoRA, fetched unless it is kept.

        Args:
            name: an https URL, or `owner/name` or `owner/name/file.safetensors` on the hub.

        Raises:
            FetchError: a rule forbids it, or it cannot be fetched.
            LoraError: it is no safetensors.
        """
        url = self.locate(name)
        path = self.folder / f"{hashlib.sha256(str(url).encode()).hexdigest()}.safetensors"
        with suppress(FileNotFoundError):
            os.utime(path)  # mark it as recently used, for `_make_room`
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=self.folder, delete=False) as file:
            part = Path(file.name)
        try:
            self._download(url, part)
            read_metadata(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        self._make_room(path)
        return path

    def locate(self, name: str) -> httpx2.URL:
        """Return the URL that a name stands for, if users may name its host."""
        match = NAME.fullmatch(name)
        try:
            url = httpx2.URL(constants.ENDPOINT if match else name)
        except httpx2.InvalidURL as error:
            raise FetchError("be a URL, or owner/name on the hub") from error
        if not match and not url.host:
            raise FetchError(
                "be an https URL, or owner/name or owner/name/FILE.safetensors on the hub"
            )
        if not self.hosts:
            raise FetchError("not be set here: this deployment fetches no LoRAs")
        if "*" not in self.hosts and url.host not in self.hosts:
            raise FetchError(f"be on {' or '.join(self.hosts)}, not on {shorten(url.host)}")
        if not match:
            return url
        repository = match["repository"]
        return httpx2.URL(hf_hub_url(repository, match["file"] or self._only_file(repository)))

    def _only_file(self, repository: str) -> str:
        """Ask the hub for the one file of a repository that may be a LoRA."""
        if constants.is_offline_mode():
            rule = (
                f"name its file, as in {repository}/FILE.safetensors, while HF_HUB_OFFLINE is set"
            )
            raise FetchError(rule)
        with self._get(httpx2.URL(f"{constants.ENDPOINT}/api/models/{repository}")) as response:
            response.read()
            names = [str(each["rfilename"]) for each in response.json()["siblings"]]
        files = [name for name in names if name.endswith(".safetensors")]
        if len(files) != 1:
            shown = shorten(", ".join(files)) if files else "none"
            raise FetchError(f"name one of the .safetensors files of {repository} ({shown})")
        return files[0]

    def _download(self, url: httpx2.URL, path: Path) -> None:
        """Write the content of a URL to a file."""
        deadline, size = time.monotonic() + DEADLINE, 0
        with self._get(url) as response, path.open("wb") as file:
            announced = int(response.headers.get("Content-Length", 0))
            for chunk in response.iter_raw():
                size += len(chunk)
                if max(size, announced) > self.largest:
                    raise FetchError(f"have at most {self.largest} bytes")
                if time.monotonic() > deadline:
                    raise FetchError(f"be fetched within {DEADLINE} seconds")
                file.write(chunk)

    @contextmanager
    def _get(self, url: httpx2.URL) -> Iterator[httpx2.Response]:
        """Open the answer to a GET request, after redirects."""
        if constants.is_offline_mode():
            raise FetchError("be in the cache already, since HF_HUB_OFFLINE is set")
        # Connections are pooled by address, but a certificate is checked for one name: reuse none.
        limits = httpx2.Limits(max_keepalive_connections=0)
        with httpx2.Client(verify=self.context, trust_env=False, limits=limits) as client:
            try:
                for _ in range(REDIRECTS + 1):
                    response = client.send(self._request(client, url), stream=True)
                    if not response.has_redirect_location:
                        break
                    response.close()
                    url = url.join(response.headers["Location"])
                else:
                    raise FetchError(f"be reached by at most {REDIRECTS} redirects")
                if response.status_code != 200:
                    raise FetchError(
                        f"be public and exist: {url.host} answers {response.status_code}"
                    )
                yield response
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                reason = str(error) or type(error).__name__
                raise FetchError(f"be on a host that can be reached ({shorten(reason)})") from error

    def _request(self, client: httpx2.Client, url: httpx2.URL) -> httpx2.Request:
        """Build a request to the checked address of a URL's host, in the name of that host."""
        if url.scheme != "https":
            raise FetchError(f"be fetched by https, not {shorten(url.scheme)}")
        host = url.raw_host.decode("ascii")
        return client.build_request(
            "GET",
            url.copy_with(host=self.address(host), username=None, password=None),
            headers={"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"},
            extensions={"sni_hostname": host},
        )

    def _make_room(self, newest: Path) -> None:
        """Delete the files that were used longest ago, as far as there is no room for them."""
        files = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process may have moved or deleted it
                status = path.stat()
                files.append((path == newest, status.st_mtime, status.st_size, path))
        total = 0
        for is_newest, _, size, path in sorted(files, reverse=True):
            total += size
            if total > self.room and not is_newest:
                path.unlink(missing_ok=True)
