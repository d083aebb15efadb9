import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from panorama.__main__ import main, parse_inputs
from panorama.request import Request

ROOT = Path(__file__).parents[2]


def test_values_get_the_types_of_their_inputs():
    pairs = ["prompt=a=b", "width=512", "sync_weight=3", "loop_closure=True", "negative_prompt="]
    inputs = parse_inputs(pairs)
    assert inputs == {
        "prompt": "a=b",
        "width": 512,
        "sync_weight": 3.0,
        "loop_closure": True,
        "negative_prompt": "",
    }
    assert isinstance(inputs["sync_weight"], float)


def test_a_file_is_marked_by_an_at_sign():
    pairs = ["prompt=a", "mode=sdxl-360", "depth_image=@a/depth.png"]
    assert parse_inputs(pairs)["depth_image"] == Path("a/depth.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prompt: missing; give it as -i prompt=..."),
        (["-i", "prompt="], "prompt='': prompt must not be empty"),
        (["-i", "prompt"], "-i prompt: must be NAME=VALUE"),
        (["-i", "prompt=a", "-i", "prompt=b"], "prompt: given twice"),
        (["-i", "prompt=a", "-i", "colour=red"], "colour: no such input; there are prompt, "),
        (["-i", "prompt=a", "-i", "width=wide"], "width='wide': width must be an integer"),
        (["-i", "prompt=a", "-i", "width=512.5"], "width='512.5': width must be an integer"),
        (["-i", "prompt=a", "-i", "guidance_scale=nan"], "guidance_scale=nan: guidance_scale must"),
        (
            ["-i", "prompt=a", "-i", "loop_closure=yes"],
            "loop_closure='yes': loop_closure must be true",
        ),
        (
            ["-i", "prompt=a", "-i", "depth_image=depth.png"],
            "depth_image='depth.png': depth_image must be a file, sent as a data or http URL, or ",
        ),
        (["-i", "prompt=a", "-o", "a.jpg"], "-o a.jpg: must be a file that ends in .png"),
        (["-i", "prompt=a", "-o", "."], "-o .: must be a file that ends in .png"),
        (["-i", "prompt=a", "-o", "none/a.png"], "-o none/a.png: there is no folder none"),
        (["-i", "prompt=a", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_a_bad_command_gets_one_line_and_writes_nothing(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"panorama: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def predictor(monkeypatch):
    fake = Mock()
    monkeypatch.setattr("panorama.__main__.load_predictor", lambda: fake)
    return fake


def test_a_request_is_resolved_once_and_then_made(predictor, tmp_path):
    made = tmp_path / "made.png"
    made.write_bytes(b"picture")
    predictor.make.return_value = made
    assert main(["-i", "prompt=sea", "-o", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes() == b"picture"
    predictor.resolve.assert_called_once_with(Request(prompt="sea").inputs())
    predictor.make.assert_called_once_with(predictor.resolve.return_value)
    predictor.predict.assert_not_called()


def test_a_picture_that_fails_prints_its_traceback_and_writes_nothing(predictor, tmp_path, capsys):
    predictor.make.side_effect = RuntimeError("no memory")
    assert main(["-i", "prompt=sea", "-o", str(tmp_path / "out.png")]) == 1
    assert capsys.readouterr().err.endswith("RuntimeError: no memory\n")
    assert list(tmp_path.iterdir()) == []


def test_what_the_family_cannot_make_gets_one_line_too(tmp_path):
    output = tmp_path / "out.png"
    command = [sys.executable, "-m", "panorama", "-i", "prompt=sea", "-i", "width=72"]
    result = subprocess.run(
        [*command, "-o", output], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert result.stdout == "safety checker: none\n"  # what setup says
    assert result.stderr.startswith("panorama: width=72: width must be at least ")
    assert result.stderr.count("\n") == 1
    assert not output.exists()
