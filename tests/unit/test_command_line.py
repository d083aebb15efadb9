"""The command line, with fake models but for one run."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from panorama.__main__ import main, parse_inputs
from panorama.images.files import Panorama, read_metadata
from panorama.request import INPUTS, Request

ROOT = Path(__file__).parents[2]


def test_values_get_the_types_of_their_inputs():
    pairs = ["prompt=a=b", "width=512", "sync_weight=3.5", "loop_closure=True", "negative_prompt="]
    assert parse_inputs(pairs) == {
        "prompt": "a=b",
        "width": 512,
        "sync_weight": 3.5,
        "loop_closure": True,
        "negative_prompt": "",
    }
    request = Request(**parse_inputs(["prompt=1", "width=512.0", "sync_weight=3"]))
    assert (request.prompt, request.width, request.sync_weight) == ("1", 512, 3.0)


def test_a_file_is_marked_by_an_at_sign():
    pairs = ["prompt=@a", "mode=sdxl-360", "depth_image=@a/depth.png", "lora=@a/b.safetensors"]
    inputs = parse_inputs(pairs)
    assert inputs["prompt"] == "@a"
    assert inputs["depth_image"] == Path("a/depth.png")
    assert inputs["lora"] == Path("a/b.safetensors")
    assert parse_inputs(["prompt=a", "lora=a/b.safetensors"])["lora"] == "a/b.safetensors"


@pytest.mark.parametrize(
    ("arguments", "named", "told"),
    [
        ([], "prompt", "try -i prompt="),
        ([""], "prompt=''", "empty"),
        (["sea", "-i", "prompt=a"], "prompt", "once"),
        (["sunset", "over", "the", "sea"], "prompt: must be one", "quotes; try 'sunset over the"),
        (["width=512"], "'width=512'", "must follow -i; try -i 'width=512'"),
        (["seed=1", "width=512"], "'seed=1 width=512'", "try -i 'seed=1'"),
        (["-i", "prompt="], "prompt=''", "empty"),
        (["-i", "prompt"], "-i 'prompt'", "NAME=VALUE"),
        (["-i", "prompt=a", "-i", "prompt=b"], "prompt", "once"),
        (["-i", "prompt=a", "-i", "colour=red"], "-i 'colour'", "negative_prompt"),
        (["-i", "prompt=a", "-i", "width=wide"], "width='wide'", "integer; try 1024"),
        (["-i", "prompt=a", "-i", "seed=none"], "seed='none'", "integer; try 1"),
        (["-i", "prompt=a", "-i", "width=512.5"], "width=512.5", "integer; try 1024"),
        (["-i", "prompt=a", "-i", "guidance_scale=nan"], "guidance_scale=nan", "at least 0.0"),
        (["-i", "prompt=a", "-i", "loop_closure=yes"], "loop_closure='yes'", "true or false"),
        (["-i", "prompt=a", "-i", "depth_image=a.png"], "depth_image='a.png'", "file"),
        (["-i", "prompt=" + "a" * 10_001], "prompt='aaa", "10000 characters"),
        (["-i", "prompt=a", "-o", "a.gif"], "-o a.gif", ".png, .jpg, .jpeg, .webp"),
        (["-i", "prompt=a", "-o", "a"], "-o a", "try output.png"),
        (["-i", "prompt=a", "-i", "output_format=png", "-o", "a.jpg"], "-o a.jpg", "output.png"),
        (["-i", "prompt=a", "-i", "output_format=jpg", "-o", "a.png"], "-o a.png", "output.jpg"),
        (["-i", "prompt=a", "-i", "output_format=gif"], "output_format='gif'", "png, jpg, webp"),
        (["-i", "prompt=a", "-i", "output_quality=9"], "output_quality=9", "try 95"),
        (["-i", "prompt=a", "-i", "output_quality=9", "-o", "a.png"], "output_quality", "try 95"),
        (["-i", "prompt=a", "-o", "."], "-o .", ".png"),
        (["-i", "prompt=a", "-o", "none/a.png"], "-o none/a.png", "folder"),
        (["-i", "prompt=a", "--previews", __file__], f"--previews {__file__}", "try previews"),
        (["-i", "prompt=a", "--previews", f"{__file__}/a"], "--previews", "folder"),
        (["-i", "prompt=a", "--colour"], "unrecognized", "--colour"),
    ],
)
def test_a_bad_command_gets_one_line_and_writes_nothing(
    arguments, named, told, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"panorama: {named}")
    assert told in err
    assert err.count("\n") == 1
    assert len(err) < 600
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", [name for name, rule in INPUTS.items() if rule.kind in (int, float)]
)
def test_following_the_advice_for_a_word_makes_a_legal_command(name, capsys):
    with pytest.raises(SystemExit):
        main(["-i", "prompt=a", "-i", f"{name}=some"])
    advice = capsys.readouterr().err.rpartition("; try ")[2].strip()
    mode = INPUTS[name].modes[-1]
    values = {"depth_image": Path("depth.png"), "image": Path("a.png"), "fix_poles": True}
    needed = {need: values[need] for need in INPUTS[name].needs[:1]}
    inputs = parse_inputs(["prompt=a", f"mode={mode}", f"{name}={advice}"])
    assert Request(**inputs | needed)


def test_a_prompt_needs_no_option():
    assert parse_inputs([], ["a=b | c"]) == {"prompt": "a=b | c"}
    assert parse_inputs(["width=512"], ["sea"]) == {"prompt": "sea", "width": 512}


@pytest.mark.parametrize("columns", [60, 200])
def test_the_help_has_every_input_under_the_modes_that_take_it(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= min(columns, 100)
    title, *groups = re.split(r"^inputs of (.+):$", text, flags=re.MULTILINE)
    assert title.startswith("usage: panorama ")
    found = {}
    for modes, group in zip(groups[::2], groups[1::2], strict=True):
        described = re.split(r"^  (\w+)=(.+)$", group, flags=re.MULTILINE)[1:]
        rows = zip(described[::3], described[1::3], described[2::3], strict=True)
        found |= {name: (modes, values, " ".join(body.split())) for name, values, body in rows}
    assert set(found) == set(INPUTS)
    for name, rule in INPUTS.items():
        modes, values, body = found[name]
        assert modes == ("every mode" if len(rule.modes) == 3 else " and ".join(rule.modes))
        if rule.choices:
            assert values == "|".join(map(str, rule.choices))
        assert body.startswith(rule.description)
    kinds = [found[name][1] for name in ("prompt", "image", "seed", "strength", "loop_closure")]
    assert kinds == ["TEXT", "@FILE", "INTEGER", "NUMBER", "true"]
    told = {name: body.removeprefix(INPUTS[name].description) for name, (*_, body) in found.items()}
    assert told["prompt"] == " [required]"
    assert told["width"] == " [64 to 16384]"
    assert told["stride"] == " [at least 8; default: 16]"
    assert told["loop_closure"] == " [default: false]"
    assert told["speed"] == told["negative_prompt"] == told["zenith_prompt"] == ""


class FakeModels:
    """Models that draw a black image in two steps, or fail in the second."""

    failure: BaseException | None = None

    def prepare(self, request: Request) -> SimpleNamespace:
        return SimpleNamespace(request=SimpleNamespace(seed=5, prompt=request.prompt), cost=2.6)

    def run(self, job: SimpleNamespace, on_step: Any) -> Panorama:
        on_step(1, 2, lambda: Image.new("RGB", (4, 4), "blue"))
        if self.failure:
            raise self.failure
        on_step(2, 2, pytest.fail)
        return Panorama(Image.new("RGB", (8, 8)), "", {"prompt": job.request.prompt}, {})


@pytest.fixture
def models(monkeypatch):
    fake = FakeModels()
    monkeypatch.setattr("panorama.__main__.load_models", lambda: fake)
    return fake


def test_a_panorama_is_written_and_its_seed_cost_and_steps_printed(models, tmp_path, capsys):
    path = tmp_path / "out.png"
    assert main(["sea", "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"seed: 5\ncost: 3\nstep 1/2\nstep 2/2\n{path}\n"
    assert read_metadata(path) == {"prompt": "sea"}


@pytest.mark.parametrize(
    ("arguments", "name", "kind"),
    [
        ([], "output.png", "PNG"),
        (["-o", "a.png"], "a.png", "PNG"),
        (["-o", "a.jpg"], "a.jpg", "JPEG"),
        (["-o", "a.JPEG"], "a.JPEG", "JPEG"),
        (["-o", "a.webp"], "a.webp", "WEBP"),
        (["-i", "output_format=jpg"], "output.jpg", "JPEG"),
        (["-i", "output_format=webp"], "output.webp", "WEBP"),
        (["-i", "output_format=jpg", "-o", "a.jpeg"], "a.jpeg", "JPEG"),
        (["-i", "output_quality=30", "-o", "a.jpg"], "a.jpg", "JPEG"),
    ],
)
def test_the_name_and_the_format_imply_one_another(
    models, arguments, name, kind, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["-i", "prompt=sea", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == name
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert read_metadata(name) == {"prompt": "sea"}
    with Image.open(name) as image:
        assert image.format == kind
        if kind == "JPEG":
            tables = image.quantization[0]
            assert (max(tables) > 100) == ("output_quality=30" in arguments)


@pytest.mark.parametrize(
    ("arguments", "media_type"),
    [([], "image/webp"), (["-i", "output_format=jpg"], "image/jpeg")],
)
def test_a_page_is_written_instead_of_an_image(models, arguments, media_type, tmp_path, capsys):
    path = tmp_path / "out.html"
    assert main(["-i", "prompt=sea", *arguments, "-o", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"\n{path}\n")
    assert list(tmp_path.iterdir()) == [path]
    assert f'<script type="{media_type}" id="image">' in path.read_text()


def test_previews_of_the_first_step_and_of_every_fifth_later_are_written(
    models, tmp_path, monkeypatch
):
    colors = {step: (step, 0, 0) for step in range(1, 13)}

    def run(job: SimpleNamespace, on_step: Any) -> Panorama:
        for step, color in colors.items():
            on_step(step, len(colors), lambda color=color: Image.new("RGB", (4, 4), color))
        return Panorama(Image.new("RGB", (8, 8)), "", {}, {})

    monkeypatch.setattr(models, "run", run)
    folder = tmp_path / "some" / "previews"
    for _ in range(2):  # the second time it is there
        command = ["-i", "prompt=sea", "-o", str(tmp_path / "a.png"), "--previews", str(folder)]
        assert main(command) == 0
        written = {path.name: Image.open(path).getpixel((0, 0)) for path in folder.iterdir()}
        assert written == {f"step-{step:03}.png": colors[step] for step in (1, 6, 11)}


@pytest.mark.parametrize(
    ("failure", "code", "told"),
    [(RuntimeError("no memory"), 1, "RuntimeError: no memory\n"), (KeyboardInterrupt(), 130, "")],
)
def test_a_failure_prints_its_traceback_and_writes_nothing(
    models, failure, code, told, tmp_path, capsys
):
    models.failure = failure
    assert main(["-i", "prompt=sea", "-o", str(tmp_path / "out.png")]) == code
    assert capsys.readouterr().err.endswith(told)
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_the_family_cannot_make_gets_one_line_too(tmp_path):
    output = tmp_path / "out.png"
    command = [sys.executable, "-m", "panorama", "-i", "prompt=sea", "-i", "width=72"]
    result = subprocess.run(
        [*command, "-o", output], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert result.stdout == "safety checker: none\n"
    assert result.stderr.startswith("panorama: width=72: must be a multiple of 8, at least 256")
    assert result.stderr.count("\n") == 1
    assert not output.exists()
