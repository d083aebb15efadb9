"""Attack script/batch: kills at random moments, two commands at once, and a full disk.

Afterwards every image must be whole and recorded once, and the results readable.
"""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from benchmarks.goals import Goal

ROOT = Path(__file__).parents[2]
SMALL = {"width": 256, "height": 256, "num_inference_steps": 1, "sync_threshold": 0}
STARTING = 8.0  # seconds, about, from the start of the command to its first image
DISK = 192 * 1024  # bytes, enough for one or two images
GOALS = {"passed": Goal(least=1)}
LIMIT = 900.0  # seconds for a command to end


def run(kills: int, seed: int) -> dict[str, Any]:
    """Attack script/batch and return what was found, with "passed"."""
    started = time.monotonic()
    with TemporaryDirectory(prefix="attack-batch-") as name:
        folder = Path(name)
        found = kill_commands(folder / "kills", kills, Random(seed))
        found["full disk"] = fill_disk(folder / "full disk")
    disk = found["full disk"]
    found["passed"] = found["passed"] and (disk is None or disk["passed"])
    return found | {"seconds": round(time.monotonic() - started)}


def kill_commands(folder: Path, kills: int, random: Random) -> dict[str, Any]:
    """Kill the command, start it again each time, at last beside another, and check the folder."""
    # So many that the commands at the end find work left.
    prompts, images = write_prompts(folder, 4 * kills + 20), folder / "images"
    in_mid_work = 0
    for _ in range(kills):
        with command(prompts, images) as (process, log):
            new = random.choice([0, 1, 1, 2])  # images before it is killed
            wait_for_images(process, log, new)
            time.sleep(random.uniform(0, STARTING if not new else 0.5))
            in_mid_work += process.poll() is None and bool(new)
            kill(process)
    with command(prompts, images) as (first, log):
        wait_for_images(first, log, 1)
        os.killpg(first.pid, signal.SIGSTOP)  # or it may be done before the second starts
        with command(prompts, images) as (second, _):
            code, told = second.wait(LIMIT), second.stderr.read() if second.stderr else ""
        os.killpg(first.pid, signal.SIGCONT)
        ended = first.wait(LIMIT)
    refused = (code, ended) == (2, 0) and f"process {first.pid} on" in told
    found = check(prompts, images)
    return {
        "kills": kills,
        "kills between images": in_mid_work,
        **found,
        "second command refused": refused,
        "passed": found["passed"] and refused,
    }


def fill_disk(folder: Path) -> dict[str, Any] | None:
    """Run the command on a disk that is too small, then make room; None without that right."""
    prompts, disk = write_prompts(folder, 6), folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return None
    try:
        with command(prompts, disk) as (process, _):
            code, told = process.wait(LIMIT), process.stderr.read() if process.stderr else ""
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        with command(prompts, disk) as (process, _):
            again = process.wait(LIMIT)
        found = check(prompts, disk)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    told_left = "images are left" in told
    passed = found["passed"] and told_left and (code, again) == (1, 0)
    return {"told how many are left": told_left, **found, "passed": passed}


def write_prompts(folder: Path, count: int) -> Path:
    """Write a file of prompts with characters that other readers take for line ends."""
    folder.mkdir()
    path = folder / "prompts.jsonl"
    lines = ({"prompt": f"sea\u2028number\x85{number}", **SMALL} for number in range(count))
    texts = (json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text("".join(texts), encoding="utf-8")
    return path


@contextmanager
def command(prompts: Path, images: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start the command, with a file of what it prints; it has ended after the block."""
    log = prompts.with_name(f"{time.monotonic_ns()}.log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [ROOT / "script" / "batch", prompts, "-o", images, "--family", "tiny"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    with process:
        try:
            yield process, log
        finally:
            kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a command and its children, if they are there."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_images(process: subprocess.Popen[str], log: Path, count: int) -> None:
    """Wait until the command has made some images, or has ended."""
    end = time.monotonic() + LIMIT
    while process.poll() is None and log.read_text().count(": made\n") < count:
        if time.monotonic() > end:
            raise TimeoutError(f"fewer than {count} images in {LIMIT:g} s: {log.read_text()}")
        time.sleep(0.01)


def check(prompts: Path, images: Path) -> dict[str, Any]:
    """Compare a folder with its prompts, by Pillow and json alone."""
    expected = [json.loads(text) for text in prompts.read_bytes().split(b"\n") if text]
    try:
        texts = (images / "results.jsonl").read_text(encoding="utf-8").splitlines()
        results = [json.loads(text) for text in texts]
    except ValueError:
        results = []
    recorded = Counter(result["file"] for result in results if "error" not in result)
    asked = {json.dumps(result["inputs"], sort_keys=True) for result in results}
    whole = [path for path in images.glob("*.png") if is_whole(path)]
    found = {
        "images": len(expected),
        "whole": len(whole),
        "recorded once": sum(times == 1 for times in recorded.values()),
        "results readable": bool(results),
        "left behind": len([*images.glob(".*.part")]),
    }
    complete = (
        {path.name for path in whole}
        == set(recorded)
        == {path.name for path in images.glob("*.png")}
    )
    asked_all = asked == {json.dumps(line, sort_keys=True) for line in expected}
    counts = found["whole"] == found["recorded once"] == found["images"]
    return found | {"passed": complete and asked_all and counts and not found["left behind"]}


def is_whole(path: Path) -> bool:
    """Return True if Pillow decodes an image of the right size."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.size == (SMALL["width"], SMALL["height"])
    except Exception:
        return False
