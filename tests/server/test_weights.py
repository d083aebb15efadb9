"""Fetching: the real client against a hub on loopback, with all that can go wrong."""

import hashlib
import io
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.numpy import save

from panorama import weights
from panorama.sampling.perceptual import LPIPS
from panorama.weights import WeightsError
from panorama.weights.__main__ import main
from tests import small_full
from tests.hub import Fault, Hub, running_hub

from .conftest import wait_until

ROOT = Path(__file__).parents[2]
COMMIT = "c" * 40
HALF, SINGLE = "unet/model.fp16.safetensors", "unet/model.safetensors"
FILES = {
    "unet/config.json": b'{"sizes": [1, 2, 3]}',
    HALF: save({"w": np.arange(60_000, dtype=np.float32)}),
    "tokenizer/merges.txt": b"a b\nc d\n",
}
FIRST = f'{{ repository = "first/model", revision = "{COMMIT}" }}'
SECOND = f'{{ repository = "second/model", revision = "{COMMIT}" }}'
LARGE = f"/large/first/model/resolve/{COMMIT}/{HALF}"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_manifest(folder: Path, *sources: str, hashes: bool = True) -> None:
    """Write the manifest of a family `small` of one part, its hashes known or not."""
    known = {name: f', sha256 = "{sha256(data)}"' if hashes else "" for name, data in FILES.items()}
    files = (f'{{ name = "{name}", size = {len(FILES[name])}{known[name]} }}' for name in FILES)
    folder.mkdir(exist_ok=True)
    (folder / "manifest.toml").write_text(
        f"""
        [small.part]
        base = "sd2"
        modes = ["syncdiffusion"]
        licence = "MIT"
        sources = [{", ".join(sources)}]
        files = [{", ".join(files)}]
        """
    )


def point_at(hub_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do in this process what HF_ENDPOINT does before huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", hub_url)
    template = f"{hub_url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        for repository in ("first/model", "second/model"):
            hub.add(repository, FILES, COMMIT)
        yield hub


@pytest.fixture
def folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache whose manifest knows one source and every hash. The client never waits."""
    folder = tmp_path / "weights"
    write_manifest(folder, FIRST)
    point_at(hub.url, monkeypatch)
    monkeypatch.setenv("PANORAMA_WEIGHTS", str(folder))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return folder


def lose_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a silent server .3 s. Only where a test needs it: a busy machine may be as slow."""
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.3)
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.3)


def stored() -> dict[str, bytes]:
    """Return the content of the family's components, by file name."""
    found = weights.components("small", "sd2")
    return {
        f"{name}/{path.name}": path.read_bytes()
        for name, place in found.items()
        for path in place.iterdir()
    }


def blob(folder: Path, content: bytes, repository: str = "first--model") -> Path:
    return folder / f"models--{repository}" / "blobs" / sha256(content)


def transfers(hub: Hub, repository: str = "first/model") -> int:
    """Count the requests for the large file of a repository."""
    return len(hub.asked("GET", f"/large/{repository}/resolve/{COMMIT}/{HALF}"))


def test_a_fresh_fetch_is_verified_and_the_next_makes_no_request(hub, folder, capsys):
    with pytest.raises(WeightsError, match="lacks 3 files of small"):
        weights.require("small")
    assert main([]) == 0
    assert "verified" in capsys.readouterr().out
    assert stored() == FILES
    weights.require("small", thorough=True)
    asked = len(hub.requests)
    assert main([]) == 0
    weights.ensure_weights("small")
    assert len(hub.requests) == asked


def test_a_redirect_is_followed_without_the_token(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    weights.ensure_weights("small")
    tokens = {"HEAD": set(), "GET": set()}
    for request in hub.asked("HEAD", HALF) + hub.asked("GET", HALF):
        tokens[request.method].add(request.headers.get("authorization"))
    assert tokens == {"HEAD": {"Bearer hf_secret"}, "GET": {None}}


FLIP = dict(change=lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
FAULTS = {
    "a flipped byte": (Fault(**FLIP), "but the manifest says"),
    "a flipped byte and a hash to match": (
        Fault(("HEAD", "GET"), honest=False, **FLIP),
        "but the manifest says",
    ),
    "a truncated file": (Fault(change=lambda content: content[:-5]), "should be of size"),
    "a truncated file and a size to match": (
        Fault(("HEAD", "GET"), change=lambda content: content[:-5], honest=False),
        "but the manifest says",
    ),
    "a longer file": (Fault(change=lambda content: content + b"more"), "should be of size"),
    "a connection that breaks": (Fault(cut=0), "complete message body"),
    "a connection that is closed": (Fault(hang_up=True), "disconnected"),
    "a stalled transfer": (Fault(delay=0.6), "timed out"),
    "404": (Fault(("HEAD", "GET"), status=404), "404 Not Found"),
    "500": (Fault(("HEAD", "GET"), status=500), "500 Internal"),
    "500 after all": (Fault(status=500), "500 Internal"),
    "403": (Fault(("HEAD", "GET"), status=403), "403"),
    "gated": (
        Fault(("HEAD", "GET"), status=401, headers={"X-Error-Code": "GatedRepo"}),
        "gated repo",
    ),
    "no hub": (Fault(("HEAD",), status=200, headers={"ETag": '"1"'}), "X-Repo-Commit"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_one_source_does_wrong_the_next_makes_good(hub, folder, kind, caplog, monkeypatch):
    fault, message = FAULTS[kind]
    if fault.delay:
        lose_patience(monkeypatch)
    write_manifest(folder, FIRST, SECOND)
    hub.faults[f"first/model/resolve/{COMMIT}/{HALF}"] = fault
    weights.ensure_weights("small")
    weights.require("small", thorough=True)
    assert stored() == FILES
    assert "second--model" in str(weights.components("small", "sd2")["unet"])
    assert message in caplog.text


@pytest.mark.parametrize("kind", FAULTS)
def test_what_every_source_does_wrong_is_an_error_and_leaves_no_bad_file(
    hub, folder, kind, monkeypatch
):
    fault, message = FAULTS[kind]
    if fault.delay:
        lose_patience(monkeypatch)
    write_manifest(folder, FIRST, SECOND)
    hub.faults[HALF] = fault
    with pytest.raises(WeightsError, match="sd2: no source has all of it") as caught:
        weights.ensure_weights("small")
    first, second = str(caught.value).splitlines()[1:]
    assert "first/model" in first and message in first
    assert "second/model" in second and message in second
    with pytest.raises(WeightsError):
        weights.components("small", "sd2")
    hub.faults.clear()
    weights.ensure_weights("small")
    weights.require("small", thorough=True)


def test_wrong_bytes_are_fetched_once_more_then_the_error_has_both_hashes(hub, folder):
    hub.faults[HALF] = Fault(**FLIP)
    with pytest.raises(WeightsError) as caught:
        weights.ensure_weights("small")
    for content in (FILES[HALF], FLIP["change"](FILES[HALF])):
        assert sha256(content) in str(caught.value)
    assert transfers(hub) == 2
    assert not blob(folder, FILES[HALF]).exists()

    hub.faults[HALF] = Fault(times=1, **FLIP)
    weights.ensure_weights("small")
    assert transfers(hub) == 4
    assert stored() == FILES


@pytest.mark.parametrize("name", FILES)
def test_without_a_hash_in_the_manifest_the_hubs_own_is_checked(hub, folder, name):
    write_manifest(folder, FIRST, hashes=False)
    change = {HALF: FLIP["change"]}.get(name, lambda content: content[:-3] + b"7" + content[-2:])
    hub.faults[name] = Fault(change=change)
    with pytest.raises(WeightsError, match="but the hub says"):
        weights.ensure_weights("small")
    hub.faults.clear()
    weights.ensure_weights("small")
    assert stored() == FILES


@pytest.mark.parametrize("hashes", [True, False])
def test_a_mirror_may_name_a_file_by_what_is_no_hash(hub, folder, hashes):
    """Only the manifest's hash can then be compared."""
    write_manifest(folder, FIRST, hashes=hashes)
    hub.faults[HALF] = Fault(("HEAD",), headers={"X-Linked-ETag": '"version-7"'})
    weights.ensure_weights("small", thorough=True)
    assert stored() == FILES
    (folder / "models--first--model" / "blobs" / "version-7").write_bytes(b"spoilt")
    assert main(["--offline"]) == (1 if hashes else 0)


def test_a_blob_that_spoils_is_found_offline_and_fetched_again(hub, folder, capsys):
    weights.ensure_weights("small")
    path = blob(folder, FILES[HALF])
    path.write_bytes(FLIP["change"](FILES[HALF]))
    asked = len(hub.requests)
    assert main(["--offline"]) == 1
    error = capsys.readouterr().err
    assert f"lacks 1 files of small, 240kB, such as {HALF}" in error
    assert sha256(path.read_bytes()) in error
    assert len(hub.requests) == asked
    assert path.read_bytes() == FLIP["change"](FILES[HALF])

    assert main([]) == 0
    assert stored() == FILES
    assert transfers(hub) == 2
    assert not hub.asked("GET", "merges.txt")[1:]


def test_a_spoilt_blob_is_replaced_from_the_next_source(hub, folder):
    write_manifest(folder, FIRST, SECOND)
    weights.ensure_weights("small")
    blob(folder, FILES[HALF]).write_bytes(b"spoilt")
    hub.faults[f"first/model/resolve/{COMMIT}/{HALF}"] = Fault(("HEAD", "GET"), status=500)
    weights.ensure_weights("small", thorough=True)
    assert stored() == FILES
    assert transfers(hub, "second/model") == 1


def test_what_the_cache_has_of_a_later_source_is_not_fetched_from_the_first(hub, folder):
    write_manifest(folder, SECOND)
    weights.ensure_weights("small")
    asked = len(hub.requests)
    write_manifest(folder, FIRST, SECOND)
    weights.ensure_weights("small", thorough=True)
    assert len(hub.requests) == asked


def test_a_broken_connection_is_resumed_where_it_broke(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # from 10 MB
    hub.faults[LARGE] = Fault(times=2, cut=100_000)
    weights.ensure_weights("small")
    ranges = [request.headers.get("range") for request in hub.asked("GET", LARGE)]
    assert ranges == [None, "bytes=100000-", "bytes=200000-"]
    assert stored() == FILES


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_busy_server_is_waited_for_as_long_as_it_asks(hub, folder, method, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    headers = {"Retry-After": "7"}
    hub.faults[HALF] = Fault((method,), times=2, status=429, headers=headers)
    weights.ensure_weights("small")
    assert 8 in waits  # one more than asked
    assert stored() == FILES


def test_single_precision_is_taken_where_a_source_has_no_half(hub, folder):
    single = save({"w": np.arange(70_000, dtype=np.float32)})
    files = {name: content for name, content in FILES.items() if name != HALF}
    hub.add("first/model", {**files, SINGLE: single, "unet/model.bin": b"a pickle"}, COMMIT)
    write_manifest(folder, FIRST, SECOND)
    weights.ensure_weights("small")
    assert stored() == {**files, SINGLE: single}
    assert not hub.asked("GET", "model.bin")
    asked = len(hub.requests)
    weights.ensure_weights("small", thorough=True)
    assert len(hub.requests) == asked

    blob(folder, single).write_bytes(b"spoilt")
    with pytest.raises(WeightsError):
        weights.require("small", thorough=True)
    weights.require("small")  # which reads nothing


@pytest.mark.parametrize("known", ["manifest", "hub"])
def test_a_verified_file_is_read_again_only_if_it_has_changed(hub, folder, known):
    """By hashes of the manifest, or of the hub alone."""
    if known == "hub":
        write_manifest(folder, FIRST, hashes=False)
    weights.ensure_weights("small")
    path = blob(folder, FILES[HALF])
    weights.verify("small")
    weights.verify("small")
    record = folder / "models--first--model" / "panorama-verified"
    assert len(record.read_text().splitlines()) == len(FILES)

    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    spoilt = bytes([FILES[HALF][0] ^ 1]) + FILES[HALF][1:]
    path.write_bytes(spoilt)
    with pytest.raises(WeightsError, match=rf"(?s){re.escape(HALF)}: has hash.*fetch-weights"):
        weights.verify("small")
    os.utime(path, ns=times)  # as if it were the file that was verified: it is not read
    weights.verify("small")
    assert len(record.read_text().splitlines()) == len(FILES)
    record.unlink()
    with pytest.raises(WeightsError, match=re.escape(HALF)):
        weights.verify("small")
    weights.ensure_weights("small", thorough=True)
    weights.verify("small")


def test_without_a_place_to_remember_every_file_is_read_each_time(hub, folder):
    weights.ensure_weights("small")
    record = folder / "models--first--model" / "panorama-verified"
    record.symlink_to(folder / "missing" / "record")  # root may write anywhere else
    weights.verify("small")
    path = blob(folder, FILES[HALF])
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(FILES[HALF][:-1] + b"~")
    os.utime(path, ns=times)
    with pytest.raises(WeightsError, match=re.escape(HALF)):
        weights.verify("small")


def test_a_spoilt_half_precision_file_leaves_nothing_that_a_loader_may_find(hub, folder):
    weights.ensure_weights("small")
    blob(folder, FILES[HALF]).write_bytes(b"spoilt")
    files = {name: content for name, content in FILES.items() if name != HALF}
    hub.add("first/model", {**files, SINGLE: FILES[HALF]}, COMMIT)
    weights.ensure_weights("small", thorough=True)
    assert stored() == {**files, SINGLE: FILES[HALF]}


def test_a_missing_configuration_is_no_reason_to_take_another_file(hub, folder):
    hub.add("first/model", {name: data for name, data in FILES.items() if name == HALF}, COMMIT)
    with pytest.raises(WeightsError, match=r"unet/config\.json"):
        weights.ensure_weights("small")


@pytest.mark.parametrize("place", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "login"])
def test_an_expired_token_is_named_and_left_out(hub, folder, place, monkeypatch, caplog):
    hub.expired_tokens.add("hf_expired")
    if place == "login":
        Path(constants.HF_TOKEN_PATH).write_text("hf_expired")
        place = constants.HF_TOKEN_PATH
    else:
        monkeypatch.setenv(place, "hf_expired")
    weights.ensure_weights("small")
    assert stored() == FILES
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.getMessage() == f"{hub.url} refuses the token of {place}; trying without"
    assert "hf_expired" not in caplog.text
    refused = [r for r in hub.requests if "authorization" in r.headers]
    assert len(refused) == 1


def test_a_component_may_be_a_single_file(hub, folder):
    hub.add("first/model", {"x.pti": FILES[HALF]}, COMMIT)
    (folder / "manifest.toml").write_text(
        f"""
        [small.lora]
        base = "sdxl"
        modes = ["sdxl-360"]
        licence = "MIT"
        sources = [{FIRST}]
        files = [{{ name = "x.pti", component = "lora.safetensors" }}]
        """
    )
    weights.ensure_weights("small")
    (path,) = weights.components("small", "sdxl").values()
    assert path.name == "x.pti"
    assert path.read_bytes() == FILES[HALF]
    assert list(weights.components("small", "sdxl")) == ["lora.safetensors"]


def test_verifying_writes_nothing_and_asks_nobody(hub, folder, monkeypatch, capsys):
    before = sorted(folder.rglob("*"))
    assert main(["--offline"]) == 1
    assert sorted(folder.rglob("*")) == before
    error = capsys.readouterr().err
    assert f"{folder} lacks 3 files of small, 240kB, such as unet/config.json" in error
    assert f"script/fetch-weights --dir {folder}" in error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main([]) == 1
    assert "lacks 3 files" in capsys.readouterr().err
    assert hub.requests == []


def test_a_cache_that_cannot_be_written_serves_what_it_has(hub, folder):
    weights.ensure_weights("small")
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    weights.ensure_weights("small", thorough=True)
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("name", ["plain", "link"])
def test_snapshots_of_plain_files_are_read_too(hub, folder, tmp_path, name):
    """As Cog mounts managed weights, or a cache is copied without its links."""
    weights.ensure_weights("small")
    asked, place = len(hub.requests), f"models--first--model/snapshots/{COMMIT}"
    shutil.copytree(folder / place, tmp_path / "plain" / place)
    (tmp_path / "link").symlink_to("plain")
    cache = tmp_path / name
    assert main(["--dir", str(cache)]) == 0
    assert len(hub.requests) == asked
    (cache / place / HALF).write_bytes(b"spoilt")
    assert main(["--dir", str(cache), "--offline"]) == 1
    assert main(["--dir", str(cache)]) == 0


def test_a_folder_is_chosen_by_argument(hub, folder, tmp_path, capsys):
    place = tmp_path / "elsewhere"
    assert main(["--dir", str(place)]) == 0
    assert os.environ["PANORAMA_WEIGHTS"] == str(folder)
    assert (main(["--offline", "--dir", str(place)]), main(["--offline"])) == (0, 1)
    assert blob(place, FILES[HALF]).exists()


def test_the_users_own_cache_is_the_default(hub, folder, tmp_path, monkeypatch):
    own = tmp_path / "own"
    weights.ensure_weights("small", folder=own)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(own))
    monkeypatch.setattr(weights, "BUNDLED", folder)
    monkeypatch.delenv("PANORAMA_WEIGHTS")
    weights.ensure_weights("small", thorough=True)
    assert stored() == FILES
    assert len(hub.requests) == asked


def test_list_makes_no_request(hub, folder, capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"sd2, from first/model at {COMMIT}: MIT, for syncdiffusion"
    assert f"     240kB  {HALF}" in lines
    assert lines[-1] == f"240kB to fetch into {folder}"
    assert hub.requests == []
    weights.ensure_weights("small")
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"     240kB  {HALF}, here" in lines
    assert lines[-1] == f"0.00B to fetch into {folder}"


def test_a_mode_that_is_not_there_is_refused(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--mode", "flat"])
    assert "--mode flat: must be one of syncdiffusion" in capsys.readouterr().err


def test_a_disk_without_room_is_named(hub, folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_download, "_chmod_and_move", refuse)
    with pytest.raises(WeightsError, match="No space left on device"):
        weights.ensure_weights("small")


def test_only_what_killed_processes_left_is_deleted(hub, folder):
    repository = folder / "models--first--model"
    places = (f"blobs/{'0' * 64}.%s.incomplete", f"snapshots/{COMMIT}/vgg16.pth.%s.partial")
    old, new = ([repository / (place % age) for place in places] for age in ("old", "new"))
    for path in (*old, *new):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for path in old:
        os.utime(path, (0, 0))
    weights.ensure_weights("small")
    assert [path.exists() for path in (*old, *new)] == [False, False, True, True]


COMMAND = """
import runpy, sys, time
time.sleep = lambda seconds: None
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def environment(url: str, folder: Path, **more: str) -> dict[str, str]:
    own = {"HF_ENDPOINT": url, "PANORAMA_WEIGHTS": str(folder), "PYTHONPATH": str(ROOT)}
    return {**os.environ, **own, "HF_HOME": str(folder / "home"), **more}


@pytest.mark.parametrize(
    "command", [("panorama.weights",), ("panorama", "-i", "prompt=sea")], ids=lambda c: c[0]
)
def test_without_a_network_there_is_one_cause_and_one_remedy(tmp_path, command):
    with socket.socket() as taken:  # a port at which nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", COMMAND, *command],
            env=environment(url, tmp_path, PANORAMA_FAMILY="full"),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert result.returncode in (1, 2)
    lines = result.stderr.splitlines()
    assert len(lines) <= 10
    assert sum("cannot be reached" in line for line in lines) == 1
    assert url in result.stderr
    assert str(tmp_path) in lines[-1]


def test_a_hub_that_never_answers_cannot_be_reached(hub, folder, monkeypatch):
    lose_patience(monkeypatch)
    write_manifest(folder, FIRST, SECOND)
    hub.faults["config.json"] = Fault(("HEAD",), delay=0.6)
    with pytest.raises(WeightsError, match="cannot be reached"):
        weights.ensure_weights("small")
    assert not hub.asked("HEAD", f"second/model/resolve/{COMMIT}/unet/config.json")


def test_two_fetches_at_once_share(hub, folder):
    hub.faults[LARGE] = Fault(hold=Event())

    def start() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", "panorama.weights"],
            env=environment(hub.url, folder, HF_HUB_DOWNLOAD_TIMEOUT="60"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    both = [start()]
    wait_until(lambda: hub.asked("GET", LARGE))
    both.append(start())
    wait_until(lambda: len(hub.asked("HEAD", HALF)) == 2)
    hub.faults[LARGE].hold.set()
    errors = [process.communicate(timeout=60)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert stored() == FILES
    assert transfers(hub) == 1


FORK_FETCHES = """
import os, sys
from panorama.weights.__main__ import main
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        os._exit(main([]))
    print(child, flush=True)
    sys.stdin.readline()  # until it is reaped its number is no other process's
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_at_any_moment_the_next_fetch_verifies(hub, folder, monkeypatch):
    """Processes fork from one that has its modules, so that kills hit what matters."""
    hub.pause = 0.02
    chance, partial = random.Random(0), 0
    parent = subprocess.Popen(
        [sys.executable, "-c", FORK_FETCHES],
        env=environment(hub.url, folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with parent:
        assert parent.stdin and parent.stdout
        for kill in [True] * 10 + [False]:
            print(file=parent.stdin, flush=True)
            child = int(parent.stdout.readline())
            Event().wait(chance.uniform(0.05, 0.35))
            if kill:
                os.kill(child, signal.SIGKILL)
            print(file=parent.stdin, flush=True)
            assert int(parent.stdout.readline()) == (-signal.SIGKILL if kill else 0)
            partial += any(folder.glob("*/blobs/*.incomplete"))
        parent.stdin.close()
    assert partial >= 5
    weights.require("small", thorough=True)
    assert stored() == FILES


def write_vgg16_manifest(hub: Hub, folder: Path, pickle: bytes, sha256_of: bytes) -> None:
    hub.plain[f"models/{small_full.VGG16_NAME}"] = pickle
    (folder / "manifest.toml").write_text(
        f"""
        [small.vgg16]
        base = "perceptual"
        component = "vgg16.pth"
        modes = ["syncdiffusion"]
        licence = "MIT"
        sources = [
            {{ repository = "torchvision/vgg16", revision = "{COMMIT}", url = "{hub.url}/models" }}
        ]
        files = [{{ name = "{small_full.VGG16_NAME}", sha256 = "{sha256(sha256_of)}" }}]
        """
    )


@pytest.fixture(scope="module")
def vgg16() -> bytes:
    return small_full.vgg16()


def load_perceptual() -> LPIPS:
    return LPIPS.from_vgg16(weights.components("small", "perceptual")["vgg16.pth"])


def test_a_pickle_that_is_not_the_known_one_is_not_kept(hub, folder):
    write_vgg16_manifest(hub, folder, b"unknown", b"known")
    hashes = f'expected "{sha256(b"known")}", got "{sha256(b"unknown")}"'
    with pytest.raises(WeightsError, match=hashes):
        weights.ensure_weights("small")
    assert not list(folder.rglob("*.pth*"))
    with pytest.raises(WeightsError, match="lacks files of perceptual"):
        load_perceptual()


def test_the_known_pickle_is_opened_without_running_it(hub, folder, tmp_path):
    opened = tmp_path / "opened"
    payload = f"cposix\nsystem\n(S'touch {opened}'\ntR.".encode()  # a pickle is a program
    write_vgg16_manifest(hub, folder, payload, payload)
    weights.ensure_weights("small")
    with pytest.raises(Exception, match="Weights only"):
        load_perceptual()
    assert not opened.exists()


def test_vgg16_is_verified_like_what_the_hub_has(hub, folder, vgg16):
    write_vgg16_manifest(hub, folder, vgg16, vgg16)
    weights.ensure_weights("small")
    weights.require("small", thorough=True)
    first = load_perceptual().stages[0][0].weight
    torch.testing.assert_close(first.data, torch.load(io.BytesIO(vgg16))["features.0.weight"])
    asked = len(hub.requests)
    weights.ensure_weights("small", thorough=True)
    assert len(hub.requests) == asked

    path = weights.components("small", "perceptual")["vgg16.pth"]
    path.write_bytes(b"spoilt")
    with pytest.raises(WeightsError):
        weights.require("small", thorough=True)
    weights.ensure_weights("small", thorough=True)
    assert path.read_bytes() == vgg16
    assert len(hub.requests) == asked + 1


@pytest.mark.parametrize("right", [True, False])
def test_what_torch_has_in_its_own_cache_is_used_if_it_is_right(hub, folder, vgg16, right):
    write_vgg16_manifest(hub, folder, vgg16, vgg16)
    known = Path(torch.hub.get_dir()) / "checkpoints" / small_full.VGG16_NAME
    known.parent.mkdir(parents=True)
    known.write_bytes(vgg16 if right else b"wrong")
    weights.ensure_weights("small")
    weights.require("small", thorough=True)
    assert len(hub.requests) == (0 if right else 1)
    assert known.exists()


def test_the_shared_store_of_the_client_does_not_bring_back_a_spoilt_blob(hub, folder):
    """The client may keep a blob once for several repositories, as a link to a common file."""
    weights.ensure_weights("small")
    path, common = blob(folder, FILES[HALF]), folder / "blobs" / "aa" / "common"
    common.parent.mkdir(parents=True)
    shutil.move(path, common)
    path.symlink_to(os.path.relpath(common, path.parent))
    weights.require("small", thorough=True)
    common.write_bytes(b"spoilt")
    weights.ensure_weights("small", thorough=True)
    assert stored() == FILES
    assert not common.exists()
