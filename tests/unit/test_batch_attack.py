"""The attack on script/batch, with few kills, and whether it sees what went wrong."""

import json
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from benchmarks.attack.batch_runs import SMALL, check, kill_commands, write_prompts


@pytest.mark.timeout(900)
def test_images_are_whole_and_made_once_whatever_is_killed(tmp_path):
    found = kill_commands(tmp_path / "kills", 2, Random(0))
    assert found["passed"], found
    assert found["images"] == found["whole"] == found["recorded once"] == 28


@pytest.mark.parametrize("wrong", ["", "empty", "twice", "torn", "unrecorded", "left"])
def test_the_check_sees_what_is_wrong(wrong, tmp_path: Path):
    prompts, images = write_prompts(tmp_path / "run", 2), tmp_path / "images"
    images.mkdir()
    lines = [json.loads(text) for text in prompts.read_bytes().split(b"\n") if text]
    results = [{"file": f"{n}.png", "inputs": line} for n, line in enumerate(lines)]
    for result in results:
        Image.new("RGB", (SMALL["width"], SMALL["height"])).save(images / str(result["file"]))
    if wrong == "empty":
        (images / "0.png").write_bytes(b"")
    if wrong == "left":
        (images / ".0.png.1.part").touch()
    texts = [json.dumps(result) + "\n" for result in results]
    texts += texts[:1] * (wrong == "twice") + ['{"file"'] * (wrong == "torn")
    (images / "results.jsonl").write_text("".join(texts[wrong == "unrecorded" :]))
    assert check(prompts, images)["passed"] == (wrong == "")
