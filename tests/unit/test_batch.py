"""Many prompts from a file, made by real processes on the tiny family, or by fake models."""

import fcntl
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import distributed, multiprocessing

from panorama.batch import (
    Process,
    add_result,
    locked_folder,
    main,
    make,
    own_device,
    read_lines,
    read_results,
)
from panorama.conditioning import depth
from panorama.images.files import Panorama, read_metadata
from panorama.images.safety import ImageWithheldError
from panorama.jobs import Job
from panorama.request import EVERY_MODE, Request

ROOT = Path(__file__).parents[2]
SMALL = {"width": 320, "height": 256, "num_inference_steps": 2, "sync_threshold": 1}
PROMPTS = ["night over the sea", "dawn over green hills", "noon over desert"]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def files(path: Path) -> list[str]:
    """Return the image of each line."""
    return [line.file for line in read_lines(path)]


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "results.jsonl").read_text().splitlines()]


def launch(*arguments: object, processes: int = 2, code: int = 0) -> str:
    """Run the command, which has to end with a code, and without a launcher's report."""
    result = run_batch(*arguments, PROCESSES=str(processes))
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


def run_batch(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "script" / "batch", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_processes_share_the_lines_and_one_that_fails_does_not_end_the_other(
    tmp_path: Path,
) -> None:
    lines = [SMALL | {"prompt": prompt} for prompt in PROMPTS]
    lines[2]["seed"] = 5
    lines.append({"prompt": ""})
    prompts, folder = write(tmp_path / "prompts.jsonl", lines), tmp_path / "images"
    (folder / files(prompts)[1]).mkdir(parents=True)  # where the second process's only image goes
    launch(prompts, "-o", folder, code=1)
    by_line = {result["line"]: result for result in results(folder)}
    assert sorted(by_line) == [1, 2, 3, 4]
    assert "IsADirectoryError" in by_line.pop(2)["error"]
    assert "prompt=''" in by_line.pop(4)["error"]
    assert by_line[3]["seed"] == 5
    for number, result in by_line.items():
        assert result["inputs"] == lines[number - 1]
        made = read_metadata(folder / result["file"])["inputs"]
        assert (made["prompt"], made["seed"]) == (result["inputs"]["prompt"], result["seed"])
        with Image.open(folder / result["file"]) as image:
            assert image.size == (320, 256)
    assert launch(prompts, "-o", folder, code=1).splitlines()[0] == "2 already made"


def test_processes_make_an_image_together_as_one_does(tmp_path: Path) -> None:
    modes = [
        {"mode": "syncdiffusion", "width": 384},
        {"mode": "syncdiffusion-xl", "width": 768, "height": 512, "sync_weight": 0},
    ]
    lines = [SMALL | {"prompt": PROMPTS[0]} | mode for mode in modes]
    prompts = write(tmp_path / "prompts.jsonl", lines)
    launch(prompts, "-o", tmp_path / "one", processes=1)
    assert launch(prompts, "-o", tmp_path / "two", "--together").count("made") == 2
    for file in files(prompts):
        one, two = (levels(tmp_path / name / file) for name in ("one", "two"))
        assert np.abs(one - two).max() <= 1


def test_processes_choose_the_best_together_as_one_does(tmp_path: Path) -> None:
    line = SMALL | {"prompt": PROMPTS[0], "width": 512, "speed": "fast", "seed": 1}
    prompts = write(tmp_path / "prompts.jsonl", [line])
    launch(prompts, "-o", tmp_path / "one", "--best-of", 2, processes=1)
    launch(prompts, "-o", tmp_path / "two", "--best-of", 2, "--together")
    (one,), (two,) = (results(tmp_path / name) for name in ("one", "two"))
    (loser,) = one["losers"]
    assert {one["seed"], loser["seed"]} == {1, 2}
    assert one["quality"]["intra_lpips"] < loser["quality"]["intra_lpips"]
    assert (two["seed"], two["losers"][0]["seed"]) == (one["seed"], loser["seed"])
    assert two["quality"] == pytest.approx(one["quality"], rel=0.01)
    for name, result in (("one", one), ("two", two)):
        made = read_metadata(tmp_path / name / result["file"])
        assert (made["inputs"]["seed"], made["quality"]) == (result["seed"], result["quality"])


def test_a_killed_process_leaves_its_images_to_the_next(tmp_path: Path) -> None:
    """An image of a seed that the first process made is made better, and then kept."""
    line = SMALL | {"prompt": PROMPTS[0], "width": 512, "speed": "fast", "seed": 1}
    prompts, folder = write(tmp_path / "prompts.jsonl", [line]), tmp_path / "images"
    command = [ROOT / "script" / "batch", prompts, "-o", folder, "--best-of", "3"]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        while not (made := [*folder.glob(".*/[0-9]*.png")]):
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    metadata = read_metadata(made[0])
    better = metadata | {"quality": metadata["quality"] | {"intra_lpips": 0.0}}
    Panorama(Image.new("RGB", (512, 256)), "", better, {}).save(made[0])
    assert run_batch(prompts, "-o", folder, "--best-of", 3).returncode == 0
    (result,) = results(folder)
    assert (result["seed"], len(result["losers"])) == (1, 2)
    assert result["quality"] == better["quality"]
    assert levels(folder / result["file"]).max() == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [".lock", "results.jsonl", result["file"]]
    )


def levels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, np.int16)


BAD = [
    ("{", "must be JSON"),
    ("", "must be JSON"),
    ("\xff", "must be JSON"),
    ("[" * 100_000, "must be JSON"),
    ('{"prompt": ' + "[" * 100_000, "must be JSON"),
    ('{"prompt": ["a"]}', "'prompt': must be a text"),
    ('{"prompt": "a", "seed": {"prompt": 1}}', "'seed': must be a text"),
    ("[]", "object of inputs"),
    ("null", "object of inputs"),
    ('{"width": 512}', "object of inputs"),
    ('["' + "a" * 1_000_000 + '"]', "object of inputs"),
    ('{"prompt": ""}', "prompt=''"),
    ('{"prompt": "a", "colour": "red"}', "'colour'"),
    ('{"prompt": "a", "width": 260}', "try width=256"),
    ('{"prompt": "a", "mode": "cubes"}', "mode='cubes'"),
    ('{"prompt": "a", "output_quality": 5}', "output_quality=5"),
    ('{"prompt": "a", "mode": "sdxl-360", "depth_image": "none.png"}', "file that exists"),
]


@pytest.mark.parametrize(("line", "told"), BAD, ids=range(len(BAD)))
def test_a_bad_line_fails_and_no_other(
    line: str, told: str, tmp_path: Path, fake: "FakeModels", capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "images"
    text = f'{{"prompt": "sea"}}\n{line or "{{}"}\n{{"prompt": "fog"}}\n'
    prompts.write_bytes(text.encode("latin-1"))
    assert main([str(prompts), "-o", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert [text.partition(":")[0] for text in out.splitlines()] == ["line 1", "line 2", "line 3"]
    assert err == ""
    by_line = {result["line"]: result for result in results(folder)}
    assert sorted(by_line) == [1, 2, 3]
    for number in (1, 3):
        assert "error" not in by_line[number]
        assert (folder / by_line[number]["file"]).exists()
    assert told in by_line[2]["error"]
    assert len(by_line[2]["error"]) < 1000
    assert len(list(folder.glob("*.png"))) == 2

    assert main([str(prompts), "-o", str(folder)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "2 already made"
    assert len(out) == 2 and out[1].startswith("line 2: ")


def test_a_line_that_is_nested_to_any_depth_is_a_bad_one(tmp_path, fake, capsys):
    depths = [*range(1, 900, 100), *range(900, 1050)]  # Python gives up somewhere around 1000
    lines = [start + "[" * d + "]" * d + "}" * (start != "") for d in depths for start in STARTS]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(lines))
    assert run(prompts, tmp_path, capsys, code=1) == []
    assert [result["line"] for result in results(tmp_path)] == [*range(1, len(lines) + 1)]
    assert run(prompts, tmp_path, capsys, code=1) == []


STARTS = ("", '{"prompt": ', '{"prompt": "a", "seed": ')


def test_a_bad_line_is_made_when_it_is_corrected(tmp_path, fake, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "sea"}\n{"prompt": "fog"\n')
    assert run(prompts, tmp_path, capsys, code=1) == [1]
    prompts.write_text('{"prompt": "sea"}\n{"prompt": "fog"}\n')
    assert run(prompts, tmp_path, capsys) == [2]


def join(rank: int, ranks: int, folder: Path) -> None:
    """Join a group of processes that meet in a folder."""
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """Yield a group of this process alone."""
    join(0, 1, tmp_path)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_mode_that_the_family_lacks_or_that_has_no_windows_fails_its_line(tmp_path, fake, capsys):
    lines = [{"prompt": "a", "mode": "sdxl-360"}, {"prompt": "b"}]
    for line in read_lines(write(tmp_path / "prompts.jsonl", lines)):
        made = make(line, fake, Process(0, 2, together=True), tmp_path)
        assert made == (line.number == 2)
    assert "mode='sdxl-360'" in results(tmp_path)[0]["error"]
    fake.defaults = {"syncdiffusion": None}
    capsys.readouterr()
    assert run(tmp_path / "prompts.jsonl", tmp_path, capsys, code=1) == []
    assert "the family tiny offers, syncdiffusion;" in results(tmp_path)[-1]["error"]


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"\n\r\n  \n"])
def test_byte_order_marks_empty_lines_and_line_ends_of_windows_do_not_matter(start, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(start + b'{"prompt": "sea"}\r\n{"prompt": "fog"}')
    assert [line.request.prompt for line in read_lines(path)] == ["sea", "fog"]


def test_an_image_has_the_format_of_its_line(tmp_path, fake, capsys):
    formats = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
    lines: list[dict[str, Any]] = [{"prompt": "sea", "output_format": name} for name in formats]
    lines[1]["output_quality"] = 20
    prompts = write(tmp_path / "prompts.jsonl", lines)
    assert run(prompts, tmp_path, capsys) == [1, 2, 3]
    for file, kind in zip(files(prompts), formats.values(), strict=True):
        with Image.open(tmp_path / file) as image:
            assert image.format == kind
            assert kind != "JPEG" or max(image.quantization[0]) > 100
    assert run(prompts, tmp_path, capsys) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.jsonl", "-o", "images"], "No such file"),
        (["prompts.jsonl", "-o", "images", "--family", "nonesuch"], "nonesuch"),
        (["prompts.jsonl", "-o", "prompts.jsonl"], "File exists"),
        (["prompts.jsonl"], "-o/--output"),
    ],
)
def test_a_bad_argument_ends_with_its_reason(arguments, told, tmp_path, fake, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROCESSES", "2")
    write(tmp_path / "prompts.jsonl", [{"prompt": "sea"}])
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err.splitlines()[-1]


def test_the_launcher_adds_nothing_to_an_error(tmp_path):
    result = run_batch(tmp_path / "none.jsonl", "-o", tmp_path, PROCESSES="2")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("No such file") == 1
    assert "Traceback" not in result.stderr and "torch" not in result.stderr


@pytest.mark.parametrize("processes", ["0", "-1", "two", "1.5", ""])
def test_a_bad_number_of_processes_is_refused(processes, tmp_path, fake, capsys, monkeypatch):
    monkeypatch.setenv("PROCESSES", processes)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "sea"}])
    with pytest.raises(SystemExit) as exit_:
        main([str(prompts), "-o", str(tmp_path)])
    assert exit_.value.code == 2
    assert f"PROCESSES={processes!r}: must be an integer" in capsys.readouterr().err


class FakeModels:
    """The tiny family without its networks: black images."""

    family = "tiny"
    failing = ""  # a prompt
    defaults = dict.fromkeys(EVERY_MODE)
    quality: Callable[[int], dict[str, float]] = staticmethod(lambda seed: {})

    def __init__(self) -> None:
        self.seeds: list[int] = []  # of the images that were begun

    def settings(self, mode: str) -> Any:
        from panorama.request import ModeSettings, SpeedSettings

        return ModeSettings(
            width=256,
            height=256,
            guidance_scale=3.0,
            multiple=8,
            smallest=256,
            window=0 if mode == "sdxl-360" else 32,
            speeds={"exact": SpeedSettings(50)},
        )

    def prepare(self, request: Request) -> Job:
        if request.depth_image:
            depth.read(request.depth_image)
        return Job(request.resolve(self.settings(request.mode)))

    def run(self, job: Job) -> Panorama:
        seed = job.request.seed
        self.seeds.append(seed)
        if job.request.prompt == self.failing:
            raise MemoryError("no memory")
        metadata = {"seed": seed, "family": self.family, "quality": self.quality(seed)}
        return Panorama(Image.new("RGB", (8, 8)), "", metadata, {})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeModels:
    models = FakeModels()
    monkeypatch.setattr("panorama.modes.load", lambda family, **_: models)
    monkeypatch.setattr("panorama.weights.require", lambda family, modes: None)
    return models


def run(
    prompts: Path, folder: Path, capsys: pytest.CaptureFixture[str], code: int = 0
) -> list[int]:
    """Make what is missing; returns the numbers of the lines that were made."""
    assert main([str(prompts), "-o", str(folder)]) == code
    printed = [line.split(":") for line in capsys.readouterr().out.splitlines()]
    return [int(line[0].removeprefix("line ")) for line in printed if line[-1] == " made"]


def test_what_is_made_stays_when_lines_move(tmp_path, fake, capsys):
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "images"
    lines = [{"prompt": prompt} for prompt in PROMPTS]
    write(prompts, lines)
    assert run(prompts, folder, capsys) == [1, 2, 3]
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert [result["line"] for result in results(folder)] == [1, 2, 3]

    write(prompts, [{"prompt": "fog"}, *reversed(lines)])
    assert run(prompts, folder, capsys) == [1]
    assert results(folder)[-1]["line"] == 1
    for name, content in before.items():
        assert (folder / name).read_bytes() == content

    (folder / files(prompts)[1]).unlink()
    assert run(prompts, folder, capsys) == [2]
    assert run(prompts, folder, capsys) == []


def test_a_line_keeps_its_file_and_seed_wherever_it_moves(tmp_path):
    line, other = {"prompt": "sea", "width": 512}, {"prompt": "fog", "seed": 3}
    (first,) = read_lines(write(tmp_path / "a.jsonl", [line]))
    moved = read_lines(write(tmp_path / "b.jsonl", [other, dict(reversed(line.items()))]))[1]
    assert (moved.file, moved.request) == (first.file, first.request)
    assert first.request.seed is not None
    assert read_lines(tmp_path / "b.jsonl")[0].request.seed == 3


def test_a_line_that_is_there_twice_gives_two_images(tmp_path, fake, capsys):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "sea"}] * 2)
    first, second = read_lines(prompts)
    assert first.file != second.file
    assert first.request.seed != second.request.seed
    assert run(prompts, tmp_path / "images", capsys) == [1, 2]
    write(prompts, [{"prompt": "sea"}] * 3)
    assert run(prompts, tmp_path / "images", capsys) == [3]


def test_a_failed_line_is_reported_and_tried_again(tmp_path, fake, capsys):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    fake.failing = PROMPTS[1]
    assert run(prompts, tmp_path, capsys, code=1) == [1, 3]
    assert "no memory" in results(tmp_path)[1]["error"]
    fake.failing = ""
    assert run(prompts, tmp_path, capsys) == [2]


def test_the_models_are_those_that_the_lines_and_the_environment_ask_for(
    tmp_path, fake, monkeypatch
):
    loaded: list[dict[str, Any]] = []

    def load(family: str, **options: Any) -> FakeModels:
        loaded.append({"family": family, **options})
        return fake

    monkeypatch.setattr("panorama.modes.load", load)
    monkeypatch.setattr("panorama.batch.own_device", lambda: "own device")
    monkeypatch.setenv("PANORAMA_MAX_COST", "5000")
    monkeypatch.setenv("PANORAMA_FAMILY", "nonesuch")
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "sea", "mode": "syncdiffusion-xl"}])
    assert main([str(prompts), "-o", str(tmp_path), "--family", "tiny"]) == 0
    options = {"modes": ["syncdiffusion-xl"], "device": "own device", "max_cost": 5000}
    assert loaded == [{"family": "tiny", **options}]


@pytest.mark.parametrize(("available", "device"), [(True, "cuda:1"), (False, "None")])
def test_each_process_has_a_gpu_of_its_own(monkeypatch, available, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(own_device()) == device


def test_another_family_makes_its_own(tmp_path, fake, capsys, monkeypatch):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "sea"}])
    assert run(prompts, tmp_path, capsys) == [1]
    fake.family = "full"
    monkeypatch.setenv("PANORAMA_FAMILY", "full")
    assert run(prompts, tmp_path, capsys) == [1]
    assert read_results(tmp_path) == {files(prompts)[0]: "full"}


@pytest.mark.parametrize("torn", ['{"file": "b.p', '{"file": "b.png", "family": "tiny"}', "é"])
@pytest.mark.parametrize("read", [True, False])
def test_results_with_a_torn_end_are_read_and_added_to(tmp_path, torn, read):
    add_result(tmp_path, {"file": "a.png", "family": "tiny"})
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(torn.encode()[:-1] if torn == "é" else torn.encode())
    if read:
        assert read_results(tmp_path) == {"a.png": "tiny"}
    add_result(tmp_path, {"file": "c.png", "family": "tiny"})
    assert read_results(tmp_path) == {"a.png": "tiny", "c.png": "tiny"}


def test_a_results_file_of_only_a_torn_line_has_none(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"file"')
    assert read_results(tmp_path) == {}


@pytest.mark.parametrize("broken", ['{"file": "b.p', "[]", "{}", ""])
def test_results_with_a_broken_line_elsewhere_are_refused_by_its_number(
    broken, tmp_path, fake, capsys
):
    whole = json.dumps({"file": "a.png", "family": "tiny"})
    (tmp_path / "results.jsonl").write_text(f"{whole}\n{broken}\n{whole}\n")
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "sea"}])
    with pytest.raises(SystemExit):
        main([str(prompts), "-o", str(tmp_path)])
    assert "results.jsonl, line 2: " in capsys.readouterr().err


def test_line_separators_of_unicode_end_no_line(tmp_path, fake, capsys):
    prompts, prompt = tmp_path / "prompts.jsonl", "sea\u2028and\x85sky"
    prompts.write_text(json.dumps({"prompt": prompt}, ensure_ascii=False), encoding="utf-8")
    assert run(prompts, tmp_path, capsys) == [1]
    assert run(prompts, tmp_path, capsys) == []
    assert [result["inputs"]["prompt"] for result in results(tmp_path)] == [prompt]


def test_half_a_character_stops_no_other_line(tmp_path, fake, capsys):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "\ud800"}, {"prompt": "sea"}])
    assert 2 in run(prompts, tmp_path, capsys, code=1)
    assert [result["line"] for result in results(tmp_path)] == [1, 2]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    """One bit of a PNG's pixels."""
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("png", empty), ("png", cut), ("png", flip), ("jpg", empty), ("jpg", cut), ("webp", cut)],
)
def test_an_image_that_cannot_be_read_is_made_again(name, damage, tmp_path, fake, capsys):
    lines = [{"prompt": prompt, "output_format": name} for prompt in PROMPTS]
    prompts = write(tmp_path / "prompts.jsonl", lines)
    assert run(prompts, tmp_path, capsys) == [1, 2, 3]
    whole = (tmp_path / files(prompts)[1]).read_bytes()
    damage(tmp_path / files(prompts)[1])
    assert run(prompts, tmp_path, capsys) == [2]
    assert (tmp_path / files(prompts)[1]).read_bytes() == whole


def test_a_folder_that_another_command_works_on_is_refused(tmp_path, fake, capsys):
    prompts, folder = write(tmp_path / "prompts.jsonl", [{"prompt": "sea"}]), tmp_path / "images"
    folder.mkdir()
    with locked_folder(folder):
        with pytest.raises(SystemExit) as exit_:
            main([str(prompts), "-o", str(folder)])
        assert exit_.value.code == 2
        assert f"as process {os.getpid()} on " in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert run(prompts, folder, capsys) == [1]


def test_what_killed_commands_left_in_mid_write_is_removed(tmp_path, fake, capsys):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "sea"}])
    ours, other = tmp_path / f".{files(prompts)[0]}.77.part", tmp_path / ".holiday.png.77.part"
    for path in (ours, other):
        path.write_bytes(b"half")
    assert run(prompts, tmp_path, capsys) == [1]
    assert (ours.exists(), other.exists()) == (False, True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a disk of a few kilobytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_ends_the_command_which_goes_on_when_there_is_room(
    tmp_path, small_disk, fake, capsys
):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"sea {n}"} for n in range(20)])
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 16_000)
    assert main([str(prompts), "-o", str(small_disk)]) == 1
    out, err = capsys.readouterr()
    made = out.count(": made\n")
    assert 0 < made < 20
    assert "No space left on device" in err
    assert re.findall(r"(\d+) of 20 images are left", err) == [str(20 - made)]
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert len(run(prompts, small_disk, capsys)) == 20 - made
    recorded = [result["file"] for result in results(small_disk)]
    assert sorted(recorded) == sorted(files(prompts))
    assert sorted(path.name for path in small_disk.glob("[!.]*.*g*")) == sorted(recorded)


def test_results_are_added_under_a_lock(tmp_path):
    path = tmp_path / "results.jsonl"
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        adding = threading.Thread(target=add_result, args=(tmp_path, {"file": "a.png"}))
        adding.start()
        adding.join(0.3)
        assert adding.is_alive()
        assert path.read_bytes() == b""
    adding.join(60)
    assert path.read_bytes() == b'{"file": "a.png"}\n'


class Unlucky(FakeModels):
    """Models that cannot fetch the LoRA of one line."""

    def prepare(self, request: Request) -> Job:
        if request.prompt == "fog":
            raise ValueError("lora='owner/name': must be on a host that can be reached")
        return super().prepare(request)


def work_together(rank: int, prompts: Path, folder: Path) -> None:
    join(rank, 2, folder)
    models = Unlucky() if rank else FakeModels()
    process = Process(rank, 2, together=True)
    made = [make(line, models, process, folder) for line in read_lines(prompts)]  # type: ignore[arg-type]
    assert made == [True, False, True]
    assert len(models.seeds) == 2  # of images that were begun
    distributed.destroy_process_group()


def test_a_line_that_one_of_the_processes_cannot_prepare_fails_in_all(tmp_path: Path) -> None:
    lines = [{"prompt": prompt} for prompt in ("sea", "fog", "sky")]
    prompts = write(tmp_path / "prompts.jsonl", lines)
    multiprocessing.spawn(work_together, (prompts, tmp_path), nprocs=2)
    errors = [result.get("error") for result in results(tmp_path)]
    assert errors[::2] == [None, None]
    assert errors[1].startswith("ValueError: process 2: lora='owner/name': must ")


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("together", [False, True])
def test_only_processes_that_work_together_share_windows(
    together: bool, tmp_path: Path, fake: FakeModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = read_lines(write(tmp_path / "prompts.jsonl", [{"prompt": "sea"}]))
    entered: list[bool] = []
    monkeypatch.setattr(
        "panorama.sampling.ranks.sharing_windows", lambda: nullcontext(entered.append(True))
    )
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        assert make(line, fake, Process(rank, 2, together), tmp_path / str(rank))
    assert entered == [True, True] * together
    assert [(tmp_path / name / line.file).exists() for name in "01"] == [True, not together]


def test_a_lora_is_a_name_or_after_an_at_sign_a_path(tmp_path):
    names = ("owner/name", "@styles/a.safetensors")
    lines = [{"prompt": "sea", "mode": "sdxl-360", "lora": name} for name in names]
    found = read_lines(write(tmp_path / "prompts.jsonl", lines))
    assert [each.request.lora for each in found] == ["owner/name", Path("styles/a.safetensors")]


def test_a_depth_image_is_a_path(tmp_path):
    inputs = {"prompt": "bedroom", "mode": "sdxl-360", "depth_image": "depth.png"}
    (line,) = read_lines(write(tmp_path / "prompts.jsonl", [inputs]))
    assert line.request.depth_image == Path("depth.png")


# --- the best of several seeds ---

SCORES: dict[int, dict[str, float]] = {
    5: {"intra_lpips": 0.03, "seam_ratio": 2.0},
    6: {"intra_lpips": 0.02, "seam_ratio": 1.6},
    7: {"intra_lpips": 0.05, "seam_ratio": 0.9},
    8: {"intra_lpips": 0.04, "seam_ratio": 1.4},
    9: {"intra_lpips": 0.04, "seam_ratio": 1.1},
}
RING = {"prompt": "sea", "loop_closure": True, "seed": 5}


def best(prompts: Path, folder: Path, count: int = 5, code: int = 0) -> dict[str, Any]:
    """Make the images of a file with --best-of; returns the last result."""
    assert main([str(prompts), "-o", str(folder), "--best-of", str(count)]) == code
    return results(folder)[-1]


@pytest.mark.parametrize(
    ("scores", "order"),
    [
        ({5: 0.3, 6: 0.1, 7: 0.2}, [6, 7, 5]),
        ({5: 0.3, 6: 0.3, 7: 0.3}, [5, 6, 7]),
    ],
)
def test_the_image_whose_windows_are_most_alike_is_kept(
    scores: dict[int, float], order: list[int], tmp_path: Path, fake: FakeModels
) -> None:
    fake.quality = lambda seed: {"intra_lpips": scores[seed], "sharpness": 2.0}
    line = {"prompt": "sea", "width": 512, "seed": 5, "output_format": "jpg"}
    prompts = write(tmp_path / "prompts.jsonl", [line])
    result = best(prompts, tmp_path / "images", 3)
    assert [result["seed"], *(loser["seed"] for loser in result["losers"])] == order
    assert result["quality"] == fake.quality(order[0])
    assert [loser["quality"] for loser in result["losers"]] == [*map(fake.quality, order[1:])]
    (image,) = (tmp_path / "images").glob("*.jpg")
    assert image.name == result["file"] == files(prompts)[0]
    assert read_metadata(image)["seed"] == order[0]
    assert not [path for path in (tmp_path / "images").glob(".*") if path.name != ".lock"]


def test_a_seam_that_shows_loses_and_of_equal_windows_the_better_seam_is_kept(
    tmp_path: Path, fake: FakeModels
) -> None:
    fake.quality = SCORES.__getitem__
    result = best(write(tmp_path / "prompts.jsonl", [RING]), tmp_path)
    assert [result["seed"], *(loser["seed"] for loser in result["losers"])] == [9, 8, 7, 6, 5]


def test_a_sphere_is_chosen_by_its_seam(tmp_path: Path, fake: FakeModels) -> None:
    fake.quality = lambda seed: {"seam_ratio": abs(seed - 6.5), "sharpness": 1.0}
    lines = [{"prompt": "sea", "mode": "sdxl-360", "seed": 4}]
    assert best(write(tmp_path / "prompts.jsonl", lines), tmp_path, 4)["seed"] == 6


def test_a_line_without_a_seed_has_its_own_and_those_that_follow(
    tmp_path: Path, fake: FakeModels
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "sea", "width": 512}])
    (line,) = read_lines(prompts)
    assert isinstance(line.request, Request)
    best(prompts, tmp_path, 3)
    assert fake.seeds == [line.request.seed + k for k in range(3)]


def test_after_the_last_seed_comes_the_first(tmp_path: Path, fake: FakeModels) -> None:
    lines = [RING | {"seed": 2**32 - 2}]
    best(write(tmp_path / "prompts.jsonl", lines), tmp_path, 4)
    assert fake.seeds == [2**32 - 2, 2**32 - 1, 0, 1]


def test_an_image_without_a_seam_and_two_windows_is_refused_before_it_is_made(
    tmp_path: Path, fake: FakeModels
) -> None:
    lines = [{"prompt": "sea"}, {"prompt": "sea", "width": 504}, {"prompt": "sea", "width": 512}]
    prompts = write(tmp_path / "prompts.jsonl", lines)
    best(prompts, tmp_path, 2, code=1)
    errors = [result.get("error", "") for result in results(tmp_path)]
    assert ["--best-of=2: must be 1 for an image" in error for error in errors] == [1, 1, 0]
    assert len(fake.seeds) == 2


def test_withheld_seeds_lose(tmp_path: Path, fake: FakeModels) -> None:
    def quality(seed: int) -> dict[str, float]:
        if seed in withheld:
            raise ImageWithheldError("the image was withheld")
        return SCORES[seed]

    fake.quality, withheld = quality, {5, 9}
    prompts = write(tmp_path / "prompts.jsonl", [RING])
    result = best(prompts, tmp_path)
    assert [result["seed"], *(loser["seed"] for loser in result["losers"])] == [8, 7, 6, 5, 9]
    told = [loser.get("error") for loser in result["losers"]]
    assert told == [None, None, "the image was withheld", "the image was withheld"]

    withheld = set(SCORES)
    (tmp_path / files(prompts)[0]).unlink()
    assert best(prompts, tmp_path, code=1)["error"] == "ImageWithheldError: the image was withheld"


class Killed(BaseException):
    """The end of a process, as far as a test in the same process can have it."""


def killed(prompts: Path, folder: Path, fake: FakeModels, seed: int) -> list[int]:
    """Kill a command when it begins a seed; returns the seeds that it made."""

    def quality(current: int) -> dict[str, float]:
        if current == seed:
            raise Killed
        return SCORES[current]

    fake.quality = quality
    with pytest.raises(Killed):
        main([str(prompts), "-o", str(folder), "--best-of", "5"])
    made, fake.seeds, fake.quality = fake.seeds[:-1], [], SCORES.__getitem__
    return made


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_a_killed_command_goes_on_with_the_seeds_that_are_missing(
    output_format: str, tmp_path: Path, fake: FakeModels
) -> None:
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "images"
    write(prompts, [RING | {"output_format": output_format}])
    assert killed(prompts, folder, fake, 8) == [5, 6, 7]
    assert not [*folder.glob("[!.]*")]  # no image before the best is known
    assert best(prompts, folder)["seed"] == 9
    assert fake.seeds == [8, 9]
    assert len(results(folder)) == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [".lock", "results.jsonl", files(prompts)[0]]
    )


@pytest.mark.parametrize("damage", [empty, cut, flip])
def test_a_seed_whose_image_is_damaged_is_made_again(
    damage: Callable[[Path], None], tmp_path: Path, fake: FakeModels
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [RING])
    killed(prompts, tmp_path, fake, 9)
    (image,) = tmp_path.glob(".*/6.png")
    damage(image)
    best(prompts, tmp_path)
    assert fake.seeds == [6, 9]


def test_a_seed_whose_webp_is_too_large_to_read_is_made_again(
    tmp_path: Path, fake: FakeModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [RING | {"output_format": "webp"}])
    killed(prompts, tmp_path, fake, 9)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    assert best(prompts, tmp_path)["seed"] == 9
    assert fake.seeds == [5, 6, 7, 8, 9]


def test_seeds_of_another_family_and_beyond_the_count_do_not_take_part(
    tmp_path: Path, fake: FakeModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [RING])
    killed(prompts, tmp_path, fake, 9)
    assert best(prompts, tmp_path, 2)["seed"] == 6
    assert fake.seeds == []
    (tmp_path / files(prompts)[0]).unlink()
    killed(prompts, tmp_path, fake, 9)
    fake.family = "full"
    monkeypatch.setenv("PANORAMA_FAMILY", "full")
    best(prompts, tmp_path, 2)
    assert fake.seeds == [5, 6]


@pytest.mark.parametrize("count", [1, 5])
def test_what_is_left_on_the_way_to_other_images_is_removed(
    count: int, tmp_path: Path, fake: FakeModels
) -> None:
    """Also when a command was killed after its last image was recorded."""
    prompts = write(tmp_path / "prompts.jsonl", [RING])
    killed(prompts, tmp_path, fake, 9)
    own, other = tmp_path / f".{'a' * 12}", tmp_path / ".holiday"
    for place in (own, other):
        place.mkdir()
        (place / "5.png").touch()
    best(prompts, tmp_path, count)
    assert (own.exists(), other.exists()) == (False, True)
    assert [path.name for path in tmp_path.glob(".*")] in (
        [".lock", other.name],
        [other.name, ".lock"],
    )
    own.mkdir()
    best(prompts, tmp_path, count)
    assert not own.exists()


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5", ""])
def test_a_bad_number_of_seeds_is_refused(
    count: str, tmp_path: Path, fake: FakeModels, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [RING])
    with pytest.raises(SystemExit) as exit_:
        main([str(prompts), "-o", str(tmp_path), f"--best-of={count}"])
    assert exit_.value.code == 2
    assert f"--best-of={count!r}: must be an integer, at least 1" in capsys.readouterr().err


def test_a_full_disk_on_the_way_to_the_best_loses_nothing(
    tmp_path: Path, small_disk: Path, fake: FakeModels, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.quality = lambda seed: {"seam_ratio": 1 / (1 + seed)}
    prompts = write(tmp_path / "prompts.jsonl", [RING | {"seed": 0}])
    (small_disk / "ballast").write_bytes(b"x" * 16_000)
    assert main([str(prompts), "-o", str(small_disk), "--best-of", "20"]) == 1
    assert "1 of 1 images are left" in capsys.readouterr().err
    made, fake.seeds = fake.seeds[:-1], []
    assert 0 < len(made) < 20
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert best(prompts, small_disk, 20)["seed"] == 19
    assert fake.seeds == [*range(len(made), 20)]
