"""Fetching: the real client against a hub on loopback, with all that can go wrong."""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from safetensors.numpy import save

from panorama.download import token_for
from panorama.fetch import Job, offers
from panorama.manifest import File, Part, Source
from panorama.weights import Pin, Pins
from tests.hub import Fault, Hub, running_hub

from .conftest import wait_until

ROOT = Path(__file__).parents[2]
COMMIT = "c" * 40
FILES = {
    "config.json": b'{"sizes": [1, 2, 3]}',
    "model.safetensors": save({"w": np.arange(60_000, dtype=np.float32)}),
    "merges.txt": b"a b\nc d\n",
}
MODEL = "small/mode/model.safetensors"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_manifest(
    folder: Path, *sources: str, pinned: bool = True, sized: bool | None = None
) -> None:
    """A family `small` of three files, their hashes and sizes known or not."""
    entries = []
    for name, content in FILES.items():
        known = f', sha256 = "{sha256(content)}"' if pinned else ""
        known += f", size = {len(content)}" if (pinned if sized is None else sized) else ""
        entries.append(f'{{ name = "{name}"{known} }}')
    folder.mkdir(exist_ok=True)
    (folder / "manifest.toml").write_text(
        f"""
        [small.part]
        modes = ["mode"]
        licence = "MIT"
        sources = [{", ".join(sources)}]
        as = "mode/{{}}"
        files = [{", ".join(entries)}]
        """
    )


FIRST = f'{{ repository = "first/model", revision = "{COMMIT}" }}'
SECOND = '{ repository = "second/model" }'


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.add("first/model", FILES, COMMIT)
        yield hub


@pytest.fixture
def other() -> Iterator[Hub]:
    """Another hub, or a private mirror of one."""
    with running_hub() as hub:
        hub.add("first/model", FILES, COMMIT)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A weights folder whose manifest knows every hash."""
    write_manifest(tmp_path / "weights", FIRST)
    return tmp_path / "weights"


def environment(hub: Hub, folder: Path, **more: str) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "PANORAMA_WEIGHTS": str(folder), "PYTHONPATH": str(ROOT)}
    timeouts = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    return {**os.environ, **own, **timeouts, "HF_HOME": str(folder / "home"), **more}


def fetch(
    hub: Hub, folder: Path, *arguments: str, **more: str
) -> "subprocess.CompletedProcess[str]":
    """The command line, with a hub in the place of the public one."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "panorama.fetch", *arguments],
        env=environment(hub, folder, **more),
        capture_output=True,
        text=True,
        timeout=60,
    )


def stored(folder: Path) -> dict[str, bytes]:
    """Everything under a final name."""
    home = folder / "small" / "mode"
    return {path.name: path.read_bytes() for path in home.rglob("*") if path.is_file()}


def assert_no_bad_file(folder: Path) -> None:
    for name, content in stored(folder).items():
        assert content == FILES[name], name


def test_every_file_comes_verified_and_is_not_fetched_again(hub: Hub, folder: Path) -> None:
    result = fetch(hub, folder)
    assert (result.returncode, stored(folder)) == (0, FILES), result.stderr
    pins = json.loads((folder / "small" / "weights.lock").read_text())
    assert pins["mode/model.safetensors"] == {
        "commit": COMMIT,
        "made_from": None,
        "sha256": sha256(FILES["model.safetensors"]),
        "size": len(FILES["model.safetensors"]),
        "source": "first/model",
    }
    asked = len(hub.requests)
    result = fetch(hub, folder)
    assert result.returncode == 0, result.stderr
    assert "verified" in result.stdout
    assert len(hub.requests) == asked
    assert not (folder / "small" / ".fetch").exists()


def test_a_redirect_is_followed_without_the_token(hub: Hub, folder: Path) -> None:
    assert fetch(hub, folder, HF_TOKEN="hf_secret").returncode == 0
    direct, redirected = (
        [r for r in hub.asked("GET", "model.safetensors") if r.path.startswith("/large") is large]
        for large in (False, True)
    )
    assert [r.headers.get("authorization") for r in direct] == ["Bearer hf_secret"]
    assert [r.headers.get("authorization") for r in redirected] == [None]


FLIP = dict(change=lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
FAULTS = {
    "a flipped byte": (Fault(**FLIP), "sent sha256"),
    "a flipped byte, and a hash to match": (
        Fault(("HEAD", "GET"), honest=False, **FLIP),
        "offers sha256",
    ),
    "a connection that breaks": (Fault(cut=0), "RemoteProtocolError"),
    "a truncated file": (Fault(change=lambda content: content[:-5]), "416"),
    "a connection that stalls again and again": (
        Fault(cut=20_000, stall=1.5),
        "ended after 100000 of",
    ),
    "a truncated file, and a size to match": (
        Fault(("HEAD", "GET"), change=lambda content: content[:-5], honest=False),
        f"offers size {len(FILES['model.safetensors']) - 5}, but the manifest says",
    ),
    "a longer file": (Fault(change=lambda content: content + b"more"), "sent more than the"),
    "another commit": (
        Fault(("HEAD",), headers={"X-Repo-Commit": "d" * 40}),
        f"serves commit {'d' * 40} for {COMMIT}",
    ),
    "no hub": (Fault(("HEAD",), status=200, headers={"ETag": '"1"'}), "so it is no hub"),
    "404": (Fault(("HEAD", "GET"), status=404), "404"),
    "404 after all": (Fault(("GET",), status=404), "404"),
    "500": (Fault(("HEAD", "GET"), status=500), "500"),
    "an error that is no object": (Fault(status=400, body=b'["no", "such"]'), "400"),
    "403": (Fault(("HEAD", "GET"), status=403), "403"),
    "429 for a day": (
        Fault(("HEAD", "GET"), status=429, headers={"Retry-After": "86400"}),
        "429",
    ),
    "a hang": (Fault(("HEAD",), delay=2.5), "Timeout"),
    "a hang after all": (Fault(("GET",), delay=2.5), "Timeout"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_one_server_does_wrong_the_next_makes_good(
    hub: Hub, other: Hub, folder: Path, kind: str
) -> None:
    fault, message = FAULTS[kind]
    other.faults["model.safetensors"] = fault
    result = fetch(hub, folder, PANORAMA_MIRROR=other.url)
    assert result.returncode == 0, result.stderr
    assert stored(folder) == FILES
    assert f"mode/model.safetensors: {other.url}" in result.stderr
    assert message in result.stderr
    assert hub.asked("GET", "model.safetensors")
    assert not hub.asked("GET", "config.json")


@pytest.mark.parametrize("kind", FAULTS)
def test_what_every_server_does_wrong_is_a_clear_error_and_leaves_no_bad_file(
    hub: Hub, folder: Path, kind: str
) -> None:
    fault, message = FAULTS[kind]
    hub.faults["model.safetensors"] = fault
    result = fetch(hub, folder)
    assert result.returncode == 1
    error = result.stderr[result.stderr.index("fetch-weights: ") :]
    assert "1 of 3 files cannot be had:\n  mode/model.safetensors\n" in error
    assert message in error
    assert "Traceback" not in error
    assert_no_bad_file(folder)
    assert "model.safetensors" not in stored(folder)
    hub.faults.clear()
    assert fetch(hub, folder).returncode == 0
    assert stored(folder) == FILES


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "2"}, {"RateLimit": '"resolvers";r=0;t=2', "Retry-After": "900"}]
)
def test_a_busy_server_is_waited_for_as_long_as_it_asks(
    hub: Hub, folder: Path, headers: dict[str, str]
) -> None:
    hub.faults["model.safetensors"] = Fault(("HEAD",), times=1, status=429, headers=headers)
    begin = time.monotonic()
    result = fetch(hub, folder)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - begin > 2
    assert "waiting for 2 s" in result.stderr
    assert len(hub.asked("HEAD", "model.safetensors")) == 2


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_connection_that_breaks_once_is_made_anew(hub: Hub, folder: Path, method: str) -> None:
    hub.faults["model.safetensors"] = Fault((method,), times=1, hang_up=True)
    result = fetch(hub, folder)
    assert result.returncode == 0, result.stderr
    assert "waiting for 1 s" in result.stderr
    assert stored(folder) == FILES


def test_a_broken_connection_is_resumed_where_it_broke(hub: Hub, folder: Path) -> None:
    path = f"/large/first/model/resolve/{COMMIT}/model.safetensors"
    hub.faults[path] = Fault(times=2, cut=100_000)
    result = fetch(hub, folder)
    assert result.returncode == 0, result.stderr
    ranges = [r.headers.get("range") for r in hub.asked("GET", path)]
    assert ranges == [None, "bytes=100000-", "bytes=200000-"]


def test_what_came_of_one_mode_stays_while_another_is_fetched(hub: Hub, folder: Path) -> None:
    path = folder / "manifest.toml"
    text = path.read_text()
    other = text.replace("small.part", "small.more").replace('"mode"', '"other"')
    path.write_text(text + other.replace("mode/{}", "other/{}").replace("first/", "second/"))
    hub.add("second/model", FILES, COMMIT)
    large = f"large/second/model/resolve/{COMMIT}/model.safetensors"
    hub.faults["/" + large] = Fault(times=1, cut=100_000)
    hub.faults[large] = Fault(times=1, status=404)
    assert fetch(hub, folder, "--mode", "other").returncode == 1
    assert fetch(hub, folder, "--mode", "mode").returncode == 0
    assert stored(folder) == FILES
    assert fetch(hub, folder).returncode == 0
    ranges = [r.headers.get("range") for r in hub.asked("GET", large)]
    assert ranges == [None, "bytes=100000-", "bytes=100000-"]
    assert not (folder / "small" / ".fetch").exists()


def test_what_a_bad_mirror_left_does_not_spoil_a_good_one(
    hub: Hub, other: Hub, folder: Path
) -> None:
    """It sends other bytes under the right ETag and breaks; the good one goes on from there."""
    path = f"large/first/model/resolve/{COMMIT}/model.safetensors"
    other.faults["/" + path] = Fault(times=1, cut=100_000, change=lambda c: bytes(len(c)))
    other.faults[path] = Fault(status=404)  # from then on
    result = fetch(hub, folder, PANORAMA_MIRROR=other.url)
    assert result.returncode == 0, result.stderr
    assert stored(folder) == FILES
    ranges = [r.headers.get("range") for r in hub.asked("GET", path)]
    assert ranges == ["bytes=100000-", None]


def test_a_file_that_spoils_in_its_place_is_found_and_fetched_again(hub: Hub, folder: Path) -> None:
    assert fetch(hub, folder).returncode == 0
    path = folder / MODEL
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = fetch(hub, folder, "--offline")
    assert result.returncode == 1
    assert "has no verified copy of\n  mode/model.safetensors of part" in result.stderr
    assert fetch(hub, folder).returncode == 0
    assert stored(folder) == FILES


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    write_manifest(tmp_path / "weights", FIRST, pinned=False)
    huge = {"X-Linked-Size": str(10**18)}
    hub.faults["model.safetensors"] = Fault(("HEAD",), headers=huge)
    result = fetch(hub, tmp_path / "weights")
    assert result.returncode == 1
    assert "1.00EB are to be fetched, but only" in result.stderr
    assert not [r for r in hub.requests if r.method == "GET" and "resolve" in r.path]


def test_a_disk_that_fills_up_meanwhile_is_an_error_and_leaves_no_bad_file(
    hub: Hub, folder: Path
) -> None:
    code = (
        "import resource, sys; from panorama.fetch import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(main([]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(hub, folder), capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "File too large; choose another folder with --dir or PANORAMA_WEIGHTS" in result.stderr
    assert_no_bad_file(folder)
    assert fetch(hub, folder).returncode == 0
    assert stored(folder) == FILES


def test_what_was_first_seen_is_pinned(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    write_manifest(folder, SECOND, pinned=False)
    hub.add("second/model", FILES, "1" * 40)
    assert fetch(hub, folder).returncode == 0

    hub.add("second/model", {**FILES, "merges.txt": b"e f\n"}, "2" * 40)
    (folder / "small/mode/merges.txt").unlink()
    result = fetch(hub, folder)
    assert result.returncode == 0, result.stderr
    assert stored(folder) == FILES  # still the first commit's

    changed = FILES["model.safetensors"][:-1] + b"!"
    for commit in ("1" * 40, "2" * 40):
        hub.add("second/model", {**FILES, "model.safetensors": changed}, commit)
    (folder / MODEL).unlink()
    result = fetch(hub, folder)
    assert result.returncode == 1
    assert f"sha256 {sha256(changed)}, but weights.lock says" in result.stderr
    assert "model.safetensors" not in stored(folder)


def test_what_has_changed_is_accepted_once_its_pins_are_deleted(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    write_manifest(folder, SECOND, pinned=False)
    hub.add("second/model", FILES, "1" * 40)
    assert fetch(hub, folder).returncode == 0

    changed = {**FILES, "merges.txt": b"e f\n"}
    hub.add("second/model", changed, "2" * 40)
    lock = folder / "small" / "weights.lock"
    pins = json.loads(lock.read_text())
    kept = {target: pin for target, pin in pins.items() if pin["source"] != "second/model"}
    lock.write_text(json.dumps(kept))
    assert fetch(hub, folder).returncode == 0
    assert stored(folder) == changed
    assert {pin["commit"] for pin in json.loads(lock.read_text()).values()} == {"2" * 40}


def test_another_revision_in_the_manifest_is_another_file(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    write_manifest(folder, FIRST, pinned=False)
    assert fetch(hub, folder).returncode == 0

    changed = {**FILES, "merges.txt": b"e f\n"}
    hub.add("first/model", changed, "d" * 40)
    write_manifest(folder, FIRST.replace(COMMIT, "d" * 40), pinned=False)
    result = fetch(hub, folder, "--offline")
    assert result.returncode == 1
    assert f"mode/merges.txt of part, from first/model at {'d' * 40}" in result.stderr
    assert fetch(hub, folder).returncode == 0
    assert stored(folder) == changed


def test_what_nothing_is_known_of_is_not_whole(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    write_manifest(folder, FIRST, pinned=False)
    assert fetch(hub, folder).returncode == 0
    (folder / "small" / "weights.lock").unlink()
    assert fetch(hub, folder, "--offline").returncode == 1
    assert fetch(hub, folder).returncode == 0
    assert fetch(hub, folder, "--offline").returncode == 0


def test_a_size_is_held_to_where_no_hash_is_known(hub: Hub, other: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    write_manifest(folder, FIRST, pinned=False, sized=True)
    longer = save({"w": np.arange(70_000, dtype=np.float32)})
    other.add("first/model", {**FILES, "model.safetensors": longer}, COMMIT)
    result = fetch(hub, folder, PANORAMA_MIRROR=other.url)
    assert result.returncode == 0, result.stderr
    assert f"offers size {len(longer)}, but the manifest says" in result.stderr
    assert stored(folder) == FILES


@pytest.mark.parametrize("name", FILES)
def test_without_a_known_hash_a_damaged_file_does_not_pass(
    hub: Hub, tmp_path: Path, name: str
) -> None:
    write_manifest(tmp_path / "weights", FIRST, pinned=False)
    hub.faults[name] = (
        Fault(**FLIP)
        if name == "model.safetensors"
        else Fault(change=lambda content: content.replace(b"1", b"7").replace(b"a b", b"a z"))
    )
    result = fetch(hub, tmp_path / "weights")
    assert result.returncode == 1
    assert_no_bad_file(tmp_path / "weights")
    assert name not in stored(tmp_path / "weights")


def test_what_is_no_safetensors_file_does_not_pass(hub: Hub, tmp_path: Path) -> None:
    write_manifest(tmp_path / "weights", FIRST, pinned=False)
    hub.add("first/model", {**FILES, "model.safetensors": FILES["model.safetensors"][:-8]}, COMMIT)
    result = fetch(hub, tmp_path / "weights")
    assert result.returncode == 1
    assert "is no .safetensors file" in result.stderr
    assert "model.safetensors" not in stored(tmp_path / "weights")


def test_two_fetches_at_once_share(hub: Hub, folder: Path) -> None:
    large = f"/large/first/model/resolve/{COMMIT}/model.safetensors"
    hub.faults[large] = Fault(hold=Event())

    def start() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", "panorama.fetch"],
            env=environment(hub, folder, HF_HUB_DOWNLOAD_TIMEOUT="60"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    both = [start()]
    wait_until(lambda: hub.asked("GET", large))
    both.append(start())
    assert both[1].stderr
    waiting = both[1].stderr.readline().decode()
    assert "waiting for it" in waiting
    hub.faults[large].hold.set()
    errors = [process.communicate(timeout=60)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert stored(folder) == FILES
    assert "waiting for it" not in errors[0]
    assert len([r for r in hub.asked("GET", "model.safetensors") if "large" in r.path]) == 1


FORK_FETCHES = """
import os, sys
from panorama import fetch
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        os._exit(fetch.main([]))
    print(child, flush=True)
    sys.stdin.readline()  # until it is reaped its number is no other process's
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_at_any_moment_it_leaves_no_bad_file_and_the_next_goes_on(
    hub: Hub, tmp_path: Path
) -> None:
    """Processes fork from one that has its modules, so that kills hit what matters."""
    hub.pause = 0.02
    chance, killed, partial, round_ = random.Random(0), 0, 0, 0
    folder = tmp_path / "0"
    write_manifest(folder, FIRST)
    while killed < 40:
        folder = tmp_path / str(round_)
        write_manifest(folder, FIRST, pinned=round_ % 2 == 0)
        round_ += 1
        parent = subprocess.Popen(
            [sys.executable, "-c", FORK_FETCHES],
            env=environment(hub, folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with parent:
            assert parent.stdin and parent.stdout
            code = None
            while code != 0:
                print(file=parent.stdin, flush=True)
                child = int(parent.stdout.readline())
                time.sleep(chance.uniform(0, 0.5))
                if killed < 40:
                    os.kill(child, signal.SIGKILL)
                print(file=parent.stdin, flush=True)
                code = int(parent.stdout.readline())
                assert code in (0, -signal.SIGKILL)
                killed += code != 0
                partial += bool(list((folder / "small" / ".fetch").glob("*.part")))
                assert_no_bad_file(folder)
            parent.stdin.close()
        assert stored(folder) == FILES
    assert partial >= 10
    assert any("range" in r.headers for r in hub.requests)
    assert fetch(hub, folder, "--offline").returncode == 0


def test_offline_makes_no_request(hub: Hub, folder: Path) -> None:
    by_option = fetch(hub, folder, "--offline")
    by_variable = fetch(hub, folder, HF_HUB_OFFLINE="1")
    for result in (by_option, by_variable):
        assert result.returncode == 1
        assert f"mode/model.safetensors of part, from first/model at {COMMIT}" in result.stderr
    assert f"{folder / 'small'} has no verified copy of" in by_option.stderr
    assert f"script/fetch-weights --dir {folder} fetches them" in by_option.stderr
    assert f"offline, and {folder / 'small'} lacks" in by_variable.stderr
    assert hub.requests == []


def test_offline_writes_nothing(hub: Hub, folder: Path) -> None:
    assert fetch(hub, folder, "--offline").returncode == 1
    assert not (folder / "small").exists()
    assert fetch(hub, folder).returncode == 0
    (folder / "small" / ".fetch.lock").unlink()
    before = {path: path.stat().st_mtime_ns for path in (folder / "small").rglob("*")}
    result = fetch(hub, folder, "--offline")
    assert result.returncode == 0, result.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "small").rglob("*")} == before


def test_a_file_system_without_locks_is_an_error(hub: Hub, folder: Path) -> None:
    code = """
import errno, fcntl, sys
def flock(*_): raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = flock
from panorama.fetch import main
sys.exit(main([]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(hub, folder), capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "Function not implemented; choose another folder" in result.stderr
    assert "Traceback" not in result.stderr
    assert stored(folder) == {}


def test_room_is_asked_for_where_there_is_none(hub: Hub, folder: Path) -> None:
    (folder / "small").mkdir()
    (folder / "small" / "weights.lock.part").symlink_to("/dev/full")
    result = fetch(hub, folder)
    assert result.returncode == 1
    assert "No space left on device; make room there, or choose another folder" in result.stderr
    assert stored(folder) == {}


PIN = Pin(3, "1" * 64, "first/model", COMMIT)


@pytest.mark.parametrize(
    ("pin", "source", "known", "same"),
    [
        (PIN, Source("first/model", COMMIT), {}, True),
        (PIN, Source("first/model"), {}, True),
        (PIN, Source("first/model", "d" * 40), {}, False),
        (PIN, Source("second/model", COMMIT), {}, False),
        (PIN, Source("second/model"), {"sha256": "1" * 64}, True),
        (PIN, Source("first/model", COMMIT), {"sha256": "2" * 64}, False),
        (replace(PIN, made_from="2" * 64), Source(url="https://a/b"), {"sha256": "2" * 64}, True),
        (replace(PIN, made_from="2" * 64), Source(url="https://a/b"), {"sha256": "1" * 64}, False),
    ],
)
def test_a_pin_counts_as_long_as_the_manifest_asks_for_what_was_seen(
    pin: Pin, source: Source, known: dict[str, str], same: bool
) -> None:
    file = File("a.safetensors", "a.safetensors", **known)
    assert pin.is_of(Part("part", ("mode",), "MIT", (file,), (source,)), file) is same


def test_list_says_what_comes_from_where_how_large_under_which_licence(
    hub: Hub, folder: Path
) -> None:
    result = fetch(hub, folder, "--list")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"small, in {folder / 'small'}:"
    assert lines[1] == f"part (mode): MIT, from first/model at {COMMIT}"
    url = f"{hub.url}/first/model/resolve/{COMMIT}/model.safetensors"
    assert f"      240kB  mode/model.safetensors  from {url}"[4:] in result.stdout
    assert lines[-1] == "3 files to fetch, 240kB"
    assert not [r for r in hub.requests if r.method == "GET" and "resolve" in r.path]
    assert fetch(hub, folder).returncode == 0
    listed = fetch(hub, folder, "--list").stdout.splitlines()
    assert listed[-1] == "0 files to fetch"
    assert [line.split()[-1] for line in listed[2:-1]] == ["here"] * 3


def test_a_server_that_cannot_be_reached_is_not_asked_for_every_file(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    with socket.socket() as taken:  # a port at which nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        result = fetch(hub, folder, PANORAMA_MIRROR=url)
    assert result.returncode == 0, result.stderr
    assert f"{url}/first/model/resolve" in result.stderr  # the log says whom it waits for
    file = File("a.txt", "a.txt")
    source = Source(url=url.replace("http", "https") + "/folder")
    down: set[str] = set()
    jobs = [Job(Part("part", ("mode",), "MIT", (file,), (source,)), file) for _ in range(2)]
    for job in jobs:
        assert list(offers(job, Pins(tmp_path), down)) == []
    assert "could not be reached before" not in jobs[0].failures[0]
    assert "could not be reached before" in jobs[1].failures[0]


def test_a_mode_that_is_not_there_is_refused(hub: Hub, folder: Path) -> None:
    result = fetch(hub, folder, "--mode", "flat")
    assert result.returncode == 2
    assert "--mode flat: must be one of mode" in result.stderr


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mirror.example", "PANORAMA_MIRROR='mirror.example': must be a URL; https://mirror"),
        (
            "https://me:secret@mirror.example/hub",
            "PANORAMA_MIRROR: must have no user and no password, which logs would show; "
            "https://mirror.example might do",
        ),
    ],
)
def test_a_mirror_that_is_no_url_or_has_a_password_is_refused(
    hub: Hub, folder: Path, url: str, message: str
) -> None:
    result = fetch(hub, folder, PANORAMA_MIRROR=url)
    assert result.returncode == 1
    assert message in result.stderr
    assert "secret" not in result.stderr
    assert not [r for r in hub.requests if "resolve" in r.path]


def test_a_file_of_a_server_that_is_no_hub_may_be_elsewhere_and_its_size_untold(
    hub: Hub, folder: Path
) -> None:
    write_manifest(folder, '{ url = "https://files.invalid/models" }')
    for name, content in FILES.items():
        hub.plain[f"files.invalid/models/{name}"] = content
    location = {"Location": f"{hub.other_url}/files.invalid/models/model.safetensors"}
    hub.faults["model.safetensors"] = Fault(("HEAD",), status=302, headers=location)
    result = fetch(hub, folder, PANORAMA_MIRROR=hub.url)
    assert result.returncode == 0, result.stderr
    assert stored(folder) == FILES


def test_a_plain_server_that_says_0_is_bounded_by_what_is_known(hub: Hub, folder: Path) -> None:
    """It tells no size, and would send without end."""
    write_manifest(folder, '{ url = "https://files.invalid/models" }')
    for name, content in FILES.items():
        hub.plain[f"files.invalid/models/{name}"] = content
    hub.faults["model.safetensors"] = Fault(("HEAD",), status=200)
    result = fetch(hub, folder, PANORAMA_MIRROR=hub.url)
    assert result.returncode == 0, result.stderr
    assert stored(folder) == FILES
    (folder / MODEL).unlink()
    hub.plain["files.invalid/models/model.safetensors"] += b"more"
    result = fetch(hub, folder, PANORAMA_MIRROR=hub.url)
    assert result.returncode == 1
    assert f"sent more than the {len(FILES['model.safetensors'])} bytes" in result.stderr


def test_without_an_etag_nothing_is_joined_to_what_came_before(hub: Hub, folder: Path) -> None:
    """Nobody could say whether both halves are of the same file."""
    write_manifest(folder, '{ url = "https://files.invalid/models" }', pinned=False)
    for name, content in FILES.items():
        hub.plain[f"files.invalid/models/{name}"] = content
    path = "/files.invalid/models/model.safetensors"
    hub.faults[path] = Fault(times=1, cut=100_000)
    result = fetch(hub, folder, PANORAMA_MIRROR=hub.url)
    assert result.returncode == 0, result.stderr
    assert [r.headers.get("range") for r in hub.asked("GET", path)] == [None, None]
    assert stored(folder) == FILES


@pytest.mark.parametrize(
    ("source", "mirror", "token"),
    [
        (Source("a/b"), None, None),
        (Source(url="https://a/b"), None, False),
        (Source("a/b"), "https://mirror.example", None),
        (Source(url="https://a/b"), "https://mirror.example", None),
        (Source("a/b"), "http://127.0.0.1:5000", None),
        (Source("a/b"), "http://mirror.example", False),
        (Source("a/b"), "http://localhost.example", False),
    ],
)
def test_the_token_goes_to_the_hub_and_to_a_mirror_that_nobody_listens_to(
    source: Source, mirror: str | None, token: bool | None
) -> None:
    assert token_for(source, mirror) is token


def test_a_pickle_that_is_not_the_known_one_is_never_opened(hub: Hub, tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    payload = f"cposix\nsystem\n(S'touch {opened}'\ntR.".encode()  # a pickle is a program
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "manifest.toml").write_text(
        f"""
        [small.lpips]
        modes = ["mode"]
        licence = "MIT"
        sources = [{{ url = "https://files.invalid/models" }}]
        convert = "lpips"
        files = [{{ name = "v.pth", as = "mode/v.safetensors", sha256 = "{sha256(b"true")}" }}]
        """
    )
    hub.plain["files.invalid/models/v.pth"] = payload
    result = fetch(hub, folder, PANORAMA_MIRROR=hub.url)
    assert result.returncode == 1
    assert f"sent sha256 {sha256(payload)}, but the manifest says" in result.stderr
    assert not opened.exists()
    assert stored(folder) == {}
