"""A server's worker: its folder, its end after SIGTERM, and texts without folders."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from panorama.worker import OwnFolder, drain_seconds, hide_folders

ROOT = Path(__file__).parents[2]
OWNER = """
import time
from panorama.worker import OwnFolder
folder = OwnFolder()
print(folder.path, flush=True)
time.sleep(60)
"""
TERMINATION = """
import time
from panorama import worker
worker.GRACE = 0.2
termination = worker.Termination(float({seconds}))
with termination.prediction():
    print("running", flush=True)
    time.sleep({duration})
    print(termination.over.is_set(), flush=True)
time.sleep(60)
"""


@contextmanager
def python(code: str) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that runs code, and has ended after the block."""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of temporary files, here and in new processes."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_folders_of_dead_processes_are_removed_and_of_live_ones_are_not(temporary):
    other = temporary / "panorama-plans"
    other.mkdir()
    with python(OWNER) as live, python(OWNER) as dead:
        folders = [Path(first_line(process)) for process in (live, dead)]
        for folder in folders:
            (folder / "image.png").touch()
        dead.send_signal(signal.SIGKILL)
        dead.wait(60)
        assert all(folder.exists() for folder in folders)
        own = OwnFolder()
        assert sorted(temporary.iterdir()) == sorted([other, folders[0], own.path])
        assert (folders[0] / "image.png").exists()
        own.remove()
        assert sorted(temporary.iterdir()) == sorted([other, folders[0]])


def test_a_folder_of_its_own_is_not_taken_for_a_dead_ones(temporary):
    first, second = OwnFolder(), OwnFolder()
    assert first.path != second.path
    assert first.path.is_dir()
    first.remove()
    second.remove()


def test_a_link_is_not_followed(temporary):
    (temporary / "precious").mkdir()
    (temporary / "precious" / "file").touch()
    (temporary / "panorama-outputs-link").symlink_to(temporary / "precious")
    OwnFolder().remove()
    assert (temporary / "precious" / "file").exists()


def test_sigterm_ends_an_idle_process():
    with python(TERMINATION.format(seconds=60, duration=0)) as process:
        assert [first_line(process), first_line(process)] == ["running", "False"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


def test_sigterm_lets_a_prediction_end():
    with python(TERMINATION.format(seconds=60, duration=1)) as process:
        assert first_line(process) == "running"
        process.send_signal(signal.SIGTERM)
        assert first_line(process) == "False"
        assert process.wait(30) == 128 + signal.SIGTERM


def test_sigterm_ends_a_prediction_whose_time_is_over():
    with python(TERMINATION.format(seconds=0.1, duration=60)) as process:
        assert first_line(process) == "running"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "soon"])
def test_a_bad_number_of_seconds_is_refused(text, monkeypatch):
    monkeypatch.setenv("PANORAMA_DRAIN_SECONDS", text)
    with pytest.raises(ValueError, match=f"PANORAMA_DRAIN_SECONDS='{text}': must .*try 30"):
        drain_seconds()


@pytest.mark.parametrize(("text", "seconds"), [("", 30), ("0", 0), ("2.5", 2.5)])
def test_the_seconds_are_those_of_the_environment(text, seconds, monkeypatch):
    monkeypatch.setenv("PANORAMA_DRAIN_SECONDS", text)
    assert drain_seconds() == seconds


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[Errno 2] No such file: '/tmp/x y/a.png' -> '/b/c.png'", "'a.png' -> 'c.png'"),
        ("cannot open /opt/weights/unet/a.safetensors", "cannot open a.safetensors"),
        ("torch at /src/c10/alloc.cpp:42", "torch at alloc.cpp:42"),
        (f'File "{os.__file__}", line 3', 'File "os.py", line 3'),
        (f'File "{pytest.__file__}"', 'File "pytest/__init__.py"'),
        ("try https://example.com/a/b or and/or, 3/4", "https://example.com/a/b or and/or, 3/4"),
    ],
)
def test_a_text_names_no_folder(text, shown):
    assert shown in hide_folders(text)
    assert "/tmp" not in hide_folders(text)
