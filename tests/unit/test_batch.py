"""Many prompts from a file, made by real processes on the embedded family."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from panorama.batch import main, read_jobs, read_results
from panorama.picture import read_metadata
from panorama.request import Request

ROOT = Path(__file__).parents[2]
SMALL = {"width": 320, "height": 256, "num_inference_steps": 2, "sync_threshold": 1}
PROMPTS = ["night over the sea", "dawn over green hills", "noon over desert"]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def launch(*arguments: object, processes: int = 2, code: int = 0) -> str:
    """Runs the command as script/batch does; it has to end with a code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    result = subprocess.run(
        [sys.executable, *launcher, "-m", "panorama.batch", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == code, result.stderr
    return result.stdout


def test_processes_share_the_lines_and_what_is_made_stays(tmp_path: Path) -> None:
    lines = [SMALL | {"prompt": prompt} for prompt in PROMPTS]
    lines[2]["seed"] = 5
    prompts, folder = write(tmp_path / "prompts.jsonl", lines), tmp_path / "pictures"
    assert sorted(launch(prompts, "-o", folder).splitlines()) == [
        f"0000{number}.png: made" for number in (1, 2, 3)
    ]
    results = [json.loads(text) for text in (folder / "results.jsonl").read_text().splitlines()]
    assert {r["line"]: (r["inputs"], r["seed"]) for r in results} == {
        1: (lines[0], 1),
        2: (lines[1], 2),
        3: (lines[2], 5),
    }
    for result in results:
        made = read_metadata(folder / result["file"])["inputs"]
        assert made["prompt"] == result["inputs"]["prompt"] and made["seed"] == result["seed"]
        with Image.open(folder / result["file"]) as picture:
            assert picture.size == (320, 256)

    before = (folder / "00002.png").read_bytes()
    (folder / "00003.png").unlink()
    lines[0]["prompt"] = "sunset over the sea"
    write(prompts, lines)
    again = launch(prompts, "-o", folder, processes=1).splitlines()
    assert again == ["00001.png: made", "00003.png: made"]
    assert (folder / "00002.png").read_bytes() == before
    assert read_metadata(folder / "00001.png")["inputs"]["prompt"] == "sunset over the sea"


def test_one_process_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    lines = [SMALL | {"prompt": prompt} for prompt in PROMPTS]
    prompts, folder = write(tmp_path / "prompts.jsonl", lines), tmp_path / "pictures"
    (folder / "00002.png").mkdir(parents=True)  # where the second process's only picture goes
    made = launch(prompts, "-o", folder, code=1).splitlines()
    assert sorted(line for line in made if line.endswith(": made")) == [
        "00001.png: made",
        "00003.png: made",
    ]
    assert any(line.startswith("00002.png: IsADirectoryError") for line in made)


def test_another_family_makes_its_own(tmp_path: Path) -> None:
    result = {"file": "00001.png", "family": "full", "inputs": {"prompt": "sea"}}
    (tmp_path / "results.jsonl").write_text(json.dumps(result) + "\n")
    assert read_results(tmp_path) == {}
    (tmp_path / "00001.png").touch()
    assert read_results(tmp_path) == {"00001.png": ("full", {"prompt": "sea"})}


def test_processes_make_a_picture_together_as_one_does(tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [SMALL | {"prompt": PROMPTS[0], "width": 384}])
    launch(prompts, "-o", tmp_path / "one", processes=1)
    assert launch(prompts, "-o", tmp_path / "two", "--together") == "00001.png: made\n"
    pictures = [levels(tmp_path / name / "00001.png") for name in ("one", "two")]
    assert pictures[0].shape == (256, 384, 3)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def levels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture, np.int16)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting"),
        ("[]", "line 2: []: must be an object of inputs"),
        ('{"width": 512}', "must be an object of inputs"),
        ('{"prompt": ""}', "line 2: prompt='': prompt must not be empty"),
        ('{"prompt": "a", "colour": "red"}', "line 2: colour: no such input; there are prompt"),
        ('{"prompt": "a", "width": 260}', "line 2: width=260: width must be a multiple of 8"),
        ('{"prompt": "a", "mode": "sdxl-360"}', "line 2: mode='sdxl-360': has no windows"),
    ],
)
def test_a_bad_line_is_refused_by_its_number_before_anything_is_made(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"prompt": "sea"}}\n{line}\n')
    with pytest.raises(SystemExit) as exit_:
        main([str(prompts), "-o", str(tmp_path / "pictures"), "--together"])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()


def test_what_fails_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [SMALL | {"prompt": prompt, "width": 256} for prompt in PROMPTS[:2]]
    prompts, folder = write(tmp_path / "prompts.jsonl", lines), tmp_path / "pictures"

    def failing(self: object, request: Request, **_: object) -> Image.Image:
        if request.prompt == PROMPTS[0]:
            raise MemoryError("no memory")
        return Image.new("RGB", (256, 256))

    with monkeypatch.context() as patch:
        patch.setattr("panorama.models.Models.generate", failing)
        assert main([str(prompts), "-o", str(folder)]) == 1
    assert "00001.png: MemoryError: no memory\n00002.png: made" in capsys.readouterr().out
    assert set(read_results(folder)) == {"00002.png"}
    assert main([str(prompts), "-o", str(folder)]) == 0
    assert set(read_results(folder)) == {"00001.png", "00002.png"}


def test_a_depth_image_is_a_path(tmp_path: Path) -> None:
    line = {"prompt": "bedroom", "mode": "sdxl-360", "depth_image": "depth.png"}
    (job,) = read_jobs(write(tmp_path / "prompts.jsonl", [line]))
    assert job.request.depth_image == Path("depth.png")
