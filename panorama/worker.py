"""Tools of a server's worker: a folder for files, an orderly end, and discreet errors."""

import fcntl
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from threading import Event, Thread

from panorama.errors import shorten

FOLDER = "panorama-outputs-"  # how the names of temporary folders begin
GRACE = 5.0  # seconds for Cog to send an answer
FOLDERS = re.compile(r"""(?<=['"])/[^'"\n]*/|(?<![\w:/.'"])/(?:[^\s'"/:]+/)+""")
"""The folders of an absolute path, in quotes or between words."""


class OwnFolder:
    """A temporary folder of this process.

    The process locks it for as long as it lives. Creating one removes those of dead processes.
    """

    def __init__(self) -> None:
        for path in Path(gettempdir()).glob(f"{FOLDER}*"):
            if (lock := _lock(path)) is not None:
                _remove(path, lock)
        lock = None
        # Another process may take a folder for a dead one's before it is locked.
        while lock is None:
            self.path = Path(mkdtemp(prefix=FOLDER))
            lock = _lock(self.path)
        self._lock = lock

    def remove(self) -> None:
        """Remove the folder, if it is there."""
        _remove(self.path, self._lock)


def _lock(path: Path) -> int | None:
    """Return a descriptor that locks a folder until it is closed, None if that cannot be."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # it is gone, or another user's
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.lstat()  # it may have gone before it was locked
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(path: Path, lock: int) -> None:
    """Remove a folder, and then unlock it."""
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def drain_seconds() -> float:
    """Return PANORAMA_DRAIN_SECONDS, 30 if it is not set; ValueError if it is no such number."""
    text = os.environ.get("PANORAMA_DRAIN_SECONDS") or "30"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(
            f"PANORAMA_DRAIN_SECONDS={shorten(text)}: must be a number of seconds, at least 0; "
            "try 30"
        )
    return seconds


class Termination:
    """End the process after a SIGTERM, but give a running prediction some seconds to finish first.

    Python runs signal handlers in the main thread, but Cog's main thread never returns to Python.
    So another thread reads the signal's number from a pipe.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.over = Event()  # a running prediction has to stop
        self._idle = Event()
        self._idle.set()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        Thread(target=self._watch, args=(reader,), name="sigterm", daemon=True).start()

    @contextmanager
    def prediction(self) -> Iterator[None]:
        """Delay the end of the process while a prediction runs, up to `seconds` after SIGTERM."""
        self._idle.clear()
        try:
            yield
        finally:
            self._idle.set()

    def _watch(self, reader: int) -> None:
        """End the process after a SIGTERM."""
        while os.read(reader, 1) != bytes([signal.SIGTERM]):
            pass
        self._idle.wait(self.seconds)
        self.over.set()
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)


def hide_folders(text: str) -> str:
    """Return a text without this machine's folders, except those inside a module's package."""
    for root in sorted(filter(None, sys.path), key=len, reverse=True):
        text = text.replace(f"{root}/", "")
    return FOLDERS.sub("", text)
