"""LoRAs that users name, fetched from real servers: what is allowed, what is kept, what is not."""

import hashlib
import http.server
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from panorama import loras
from panorama.conditioning.lora import LoraError
from panorama.images.files import Panorama
from panorama.loras import Fetcher, FetchError, allowed_hosts, public_address
from panorama.modes import Models, load
from panorama.request import Request
from tests import small_sdxl
from tests.loras import CONVOLUTIONS, TEXT, UNET, draw, kohya, peft
from tests.loras import save as save_lora

CERTIFICATE = Path(__file__).parents[1] / "data" / "test_hosts.pem"
FILE = save({"a.lora_A.weight": torch.arange(6.0).reshape(2, 3)})


@dataclass
class Server:
    """An https server by the names hub.test and files.test.

    Attributes:
        answers: Status, headers and content by path.
        requests: Host and path of what was asked for, and all headers.
        pause: Seconds after every byte of content.
        sent: Bytes of content, by all answers.
    """

    port: int = 0
    answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    pause: float = 0.0
    sent: int = 0

    def url(self, path: str, host: str = "files.test") -> str:
        return f"https://{host}:{self.port}{path}"

    def add(self, path: str, content: bytes = FILE, status: int = 200, **headers: str) -> str:
        self.answers[path] = (status, headers, content)
        return self.url(path)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers["Host"].partition(":")[0]
            found.requests.append((host, self.path, dict(self.headers)))
            status, headers, content = found.answers.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # the client may have read enough
                for part in map(bytes, zip(content)) if found.pause else [content]:
                    self.wfile.write(part)
                    found.sent += len(part)
                    time.sleep(found.pause)

        def log_message(self, *_: Any) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.socket = context.wrap_socket(listening.socket, server_side=True)
        found.port = listening.server_port
        endpoint = found.url("", "hub.test")
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield found
        listening.shutdown()
        thread.join()


def address(host: str) -> str:
    """Return the rule, except that the names of the server are public."""
    return "127.0.0.1" if host in ("hub.test", "files.test") else public_address(host)


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    context = ssl.create_default_context(cafile=str(CERTIFICATE))
    hosts = ("hub.test", "files.test")
    return Fetcher(tmp_path / "loras", hosts, address=address, context=context)


def kept(fetcher: Fetcher) -> int:
    return len(list(fetcher.folder.iterdir())) if fetcher.folder.exists() else 0


# --- what is fetched ---


def test_a_url_is_fetched_once(fetcher: Fetcher, server: Server) -> None:
    url = server.add("/style.safetensors")
    path = fetcher.fetch(url)
    assert path.read_bytes() == FILE
    assert fetcher.fetch(url) == path
    assert [path for _, path, _ in server.requests] == ["/style.safetensors"]


@pytest.mark.parametrize("name", ["owner/some.lora/deep/my style.safetensors", "owner/some.lora"])
def test_a_name_is_that_of_a_repository_on_the_hub(
    fetcher: Fetcher, server: Server, name: str
) -> None:
    server.add("/owner/some.lora/resolve/main/deep/my%20style.safetensors")
    files = (
        b'{"siblings": [{"rfilename": "README.md"}, {"rfilename": "deep/my style.safetensors"}]}'
    )
    server.add("/api/models/owner/some.lora", files)
    assert fetcher.fetch(name).read_bytes() == FILE
    assert {host for host, _, _ in server.requests} == {"hub.test"}


@pytest.mark.parametrize(
    ("files", "advice"), [(b"a.safetensors b.safetensors", "a.safetensors, b"), (b"a.ckpt", "none")]
)
def test_a_repository_without_exactly_one_file_needs_its_name(
    fetcher: Fetcher, server: Server, files: bytes, advice: str
) -> None:
    names = b",".join(b'{"rfilename": "%s"}' % name for name in files.split())
    server.add("/api/models/owner/name", b'{"siblings": [%s]}' % names)
    with pytest.raises(FetchError, match=advice):
        fetcher.fetch("owner/name")


def test_a_redirect_is_followed_to_another_host_in_its_own_name(
    fetcher: Fetcher, server: Server
) -> None:
    server.add(
        "/owner/name/resolve/main/a.safetensors", b"", 302, Location=server.url("/cdn/a?b=c")
    )
    server.add("/cdn/a?b=c")
    narrow = replace(fetcher, hosts=("hub.test",))
    assert narrow.fetch("owner/name/a.safetensors").read_bytes() == FILE
    assert [host for host, _, _ in server.requests] == ["hub.test", "files.test"]


def test_neither_a_login_nor_a_proxy_of_this_machine_is_used(
    fetcher: Fetcher, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    fetcher.fetch(server.add("/a.safetensors"))
    server.add("/owner/name/resolve/main/a.safetensors")
    fetcher.fetch("owner/name/a.safetensors")
    for _, _, headers in server.requests:
        assert not {"Authorization", "Cookie"} & set(headers)


# --- what is refused ---


def test_only_https_is_fetched(fetcher: Fetcher, server: Server) -> None:
    for location in ("http://files.test/a.safetensors", "file:///etc/passwd", "ftp://files.test/a"):
        url = server.add("/away", b"", 302, Location=location)
        with pytest.raises(FetchError, match="by https, not"):
            fetcher.fetch(url)
    with pytest.raises(FetchError, match="by https, not 'http'"):
        fetcher.fetch("http://files.test/a.safetensors")
    for name in ("file:///etc/passwd", "/etc/passwd", "../../etc/passwd.safetensors", "sunset", ""):
        with pytest.raises(FetchError, match="owner/name"):
            fetcher.fetch(name)


PRIVATE = {
    "loopback": "127.0.0.1",
    "this host": "0.0.0.0",
    "metadata of a cloud": "169.254.169.254",
    "private": "10.1.2.3",
    "private too": "192.168.0.1",
    "shared": "100.64.0.1",
    "multicast": "224.0.0.1",
    "loopback 6": "::1",
    "mapped": "::ffff:127.0.0.1",
    "link": "fe80::1",
    "unique local": "fd00::1",
    "translated": "64:ff9b::7f00:1",
    "6to4": "2002:7f00:1::",
}


@pytest.mark.parametrize("kind", PRIVATE)
def test_a_private_address_is_refused_by_every_way_to_it(
    fetcher: Fetcher, server: Server, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    found = PRIVATE[kind]
    literal = f"[{found}]" if ":" in found else found
    anywhere = replace(fetcher, hosts=("*",))
    redirect = server.add("/away", b"", 302, Location=f"https://{literal}:{server.port}/x")
    for url in (f"https://{literal}:{server.port}/x", redirect):
        with pytest.raises(FetchError, match="public host"):
            anywhere.fetch(url)
    assert {path for _, path, _ in server.requests} == {"/away"}

    def answer(*_: Any, **__: Any) -> list[Any]:
        return [(0, 0, 0, "", (each, 0)) for each in ("93.184.215.14", found)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    with pytest.raises(FetchError, match=r"public host, not 'rebound\.test'"):
        public_address("rebound.test")


def test_a_public_address_is_the_one_that_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ("93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"):
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda *_, a=found, **__: [(0, 0, 0, "", (a, 0))]
        )
        assert public_address("example.test") == found


def test_a_host_is_looked_up_once_for_each_request(fetcher: Fetcher, server: Server) -> None:
    asked = []

    def look_up(host: str) -> str:
        asked.append(host)
        return address(host)

    server.add("/a", b"", 302, Location="/b")
    server.add("/b")
    replace(fetcher, address=look_up).fetch(server.url("/a"))
    assert asked == ["files.test", "files.test"]


def test_a_certificate_must_be_that_of_the_name(fetcher: Fetcher, server: Server) -> None:
    server.add("/a.safetensors")
    lax = replace(fetcher, hosts=("*",), address=lambda host: "127.0.0.1")
    with pytest.raises(FetchError, match="certificate"):
        lax.fetch(server.url("/a.safetensors", "other.test"))


def test_hosts_are_those_of_the_operator(
    fetcher: Fetcher, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.add("/a.safetensors")
    monkeypatch.delenv("PANORAMA_LORA_HOSTS", raising=False)
    assert allowed_hosts() == ("hub.test",)
    with pytest.raises(FetchError, match=r"be on hub\.test, not on 'files\.test'"):
        replace(fetcher, hosts=allowed_hosts()).fetch(url)
    monkeypatch.setenv("PANORAMA_LORA_HOSTS", "")
    for name in (url, "owner/name"):
        with pytest.raises(FetchError, match="this deployment fetches no LoRAs"):
            replace(fetcher, hosts=allowed_hosts()).fetch(name)
    monkeypatch.setenv("PANORAMA_LORA_HOSTS", "hub.test, Files.test")
    replace(fetcher, hosts=allowed_hosts()).fetch(url)
    monkeypatch.setenv("PANORAMA_LORA_HOSTS", "*")
    replace(fetcher, hosts=allowed_hosts()).fetch(url)


@pytest.mark.parametrize("announced", [True, False])
def test_a_file_that_is_too_large_is_refused(
    fetcher: Fetcher, server: Server, announced: bool
) -> None:
    length = {} if announced else {"Content-Length": ""}
    url = server.add("/a.safetensors", **length)
    replace(fetcher, largest=len(FILE)).fetch(url)
    url = server.add("/b.safetensors", FILE + b" ", **length)
    with pytest.raises(FetchError, match=f"at most {len(FILE)} bytes"):
        replace(fetcher, largest=len(FILE)).fetch(url)
    assert kept(fetcher) == 1


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<!DOCTYPE html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "LFS pointer"),
        (b"PK\x03\x04", "a pickle"),
        (FILE[:-1], "cut off"),
        (b"", "an empty file"),
    ],
)
def test_only_safetensors_are_kept(
    fetcher: Fetcher, server: Server, content: bytes, kind: str
) -> None:
    url = server.add("/a.safetensors", content)
    with pytest.raises(LoraError, match=kind):
        fetcher.fetch(url)
    assert kept(fetcher) == 0
    server.add("/a.safetensors")
    assert fetcher.fetch(url).read_bytes() == FILE


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_an_answer_that_is_an_error_says_so(fetcher: Fetcher, server: Server, status: int) -> None:
    url = server.add("/a.safetensors", status=status)
    with pytest.raises(FetchError, match=rf"files\.test answers {status}"):
        fetcher.fetch(url)
    assert kept(fetcher) == 0


def test_a_connection_that_breaks_leaves_nothing(fetcher: Fetcher, server: Server) -> None:
    url = server.add("/a.safetensors", **{"Content-Length": str(len(FILE) + 10)})
    with pytest.raises(FetchError, match="reached"):
        fetcher.fetch(url)
    assert kept(fetcher) == 0


def test_redirects_end(fetcher: Fetcher, server: Server) -> None:
    url = server.add("/a", b"", 302, Location="/a")
    with pytest.raises(FetchError, match="at most 5 redirects"):
        fetcher.fetch(url)


def test_a_deadline_ends_a_slow_file(
    fetcher: Fetcher, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loras, "DEADLINE", 0.2)
    server.pause = 0.02
    with pytest.raises(FetchError, match=r"within 0\.2 seconds"):
        fetcher.fetch(server.add("/a.safetensors"))
    assert server.sent < len(FILE) / 2
    assert kept(fetcher) == 0


def test_offline_only_what_is_kept_is_found(
    fetcher: Fetcher, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.add("/a.safetensors")
    path = fetcher.fetch(url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetcher.fetch(url) == path
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE"):
        fetcher.fetch(server.add("/b.safetensors"))
    with pytest.raises(FetchError, match=r"name its file, as in owner/name/FILE\.safetensors"):
        Fetcher(fetcher.folder).fetch("owner/name")


# --- what is kept ---


def test_the_files_that_were_used_last_are_kept(fetcher: Fetcher, server: Server) -> None:
    small = replace(fetcher, room=2 * len(FILE))
    first, second, third = (server.add(f"/{name}.safetensors") for name in "abc")
    for age, url in ((300, first), (200, second)):
        path = small.fetch(url)
        os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    small.fetch(first)
    small.fetch(third)
    assert kept(fetcher) == 2
    server.requests.clear()
    small.fetch(first)
    assert not server.requests
    small.fetch(second)
    assert len(server.requests) == 1


def test_several_at_once_get_the_whole_file(fetcher: Fetcher, server: Server) -> None:
    urls = [server.add(f"/{name}.safetensors") for name in "abcd"]
    with ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(fetcher.fetch, urls * 4))
    assert {path.read_bytes() for path in paths} == {FILE}
    assert kept(fetcher) == len(urls)


# --- from a request to its image ---


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Return a family with a LoRA of its own and trigger tokens."""
    folder = tmp_path_factory.mktemp("family")
    small_sdxl.save_family(folder, width=64, height=64, guidance_scale=3.0)
    return load(str(folder))


def make(models: Models, **inputs: Any) -> Panorama:
    """Make a small image."""
    common = {"prompt": "hdri view, bedroom", "mode": "sdxl-360", "seed": 1}
    return models.generate(Request(**{**common, "num_inference_steps": 2, **inputs}))


def test_loras_of_users_leave_nothing_to_the_next_prediction(
    family: Models, fetcher: Fetcher, server: Server, tmp_path: Path
) -> None:
    models, base = replace(family, fetcher=fetcher), family.bases["sdxl-360"]
    first = save_lora(draw(base, UNET, TEXT), tmp_path / "first.safetensors", kohya)
    second = save_lora(draw(base, CONVOLUTIONS), tmp_path / "second.safetensors", peft)
    url = server.add("/second.safetensors", second.read_bytes())
    own, bare = make(models), make(models, lora_scale=0.0)
    styled = [make(models, lora=each).image.tobytes() for each in (first, url)]
    images = {own.image.tobytes(), bare.image.tobytes(), *styled}
    assert len(images) == 4
    fresh = replace(load(family.family), fetcher=fetcher)
    assert make(fresh, lora=url).image.tobytes() == styled[1]
    assert make(models, lora=first).image.tobytes() == styled[0]
    assert make(models).image.tobytes() == own.image.tobytes()
    assert make(models, lora_scale=0.0).image.tobytes() == bare.image.tobytes()
    for lora in (first, url):  # at scale 0 it is that of the base
        image = make(models, lora=lora, lora_scale=0.0).image
        assert image.tobytes() == bare.image.tobytes()


def test_the_metadata_has_the_hash_of_the_file(family: Models, tmp_path: Path) -> None:
    base = family.bases["sdxl-360"]
    path = save_lora(draw(base, UNET), tmp_path / "style.safetensors", kohya)
    metadata = make(family, lora=path, prompt="TOK sea").metadata
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert metadata["inputs"]["lora"] == f"sha256:{digest}"
    assert metadata["tokens"] == ""
    assert make(family).metadata["inputs"]["lora"] is None


def test_what_is_wrong_with_a_lora_is_said_before_any_work(
    family: Models, fetcher: Fetcher, server: Server, tmp_path: Path
) -> None:
    models = replace(family, fetcher=fetcher)
    path = tmp_path / "style.safetensors"
    path.write_bytes(b"<html>")
    page = server.add("/page.safetensors", b"<html>")
    other = server.add("/other.safetensors")
    wrong = {
        path: r"lora='style\.safetensors': must be a LoRA for SDXL .*, not a web page",
        tmp_path / "none.safetensors": r"lora='none\.safetensors': must be a file that exists",
        page: "must be a LoRA for SDXL .*, not a web page",
        other: "must be a LoRA for SDXL .*, not a LoRA that lacks a half of 'a'",
        "https://example.com/a.safetensors": "must be on hub.test or files.test, not on 'example",
        "sunset": "must be an https URL, or owner/name",
    }
    for value, message in wrong.items():
        request = Request(prompt="sea", mode="sdxl-360", lora=value)
        with pytest.raises(ValueError, match=message) as error:
            models.prepare(request)
        assert str(error.value).startswith("lora=") and "\n" not in str(error.value)
        assert str(error.value).endswith("; try 'owner/name/file.safetensors'")
