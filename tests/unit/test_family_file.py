"""family.toml: everything that is not legal is refused by name."""

from pathlib import Path

import pytest

from panorama import weights
from panorama.jobs import MODES
from panorama.modes import load
from panorama.request import EVERY_MODE
from panorama.weights.family import read_family
from tests.small_sdxl import save_family

MODE = "[sdxl-360]\nwidth = 512\nheight = 256\nguidance_scale = 4\n"
USUAL = "[intra_lpips]\nsyncdiffusion = [0, 0.25]\n"
LEARNED = '[limits]\ncard = "README.md"\nheight = 256\nwords = ["sea"]\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "family.toml"


def test_it_is_read_in_the_types_of_the_inputs(path: Path) -> None:
    path.write_text(MODE + LEARNED + USUAL)
    sections = read_family(path)
    assert sections == {
        "sdxl-360": {"width": 512, "height": 256, "guidance_scale": 4.0},
        "limits": {"card": "README.md", "height": 256, "words": ["sea"]},
        "intra_lpips": {"syncdiffusion": (0, 0.25)},
    }
    assert type(sections["sdxl-360"]["guidance_scale"]) is float


def test_its_modes_are_those_that_there_are() -> None:
    assert set(EVERY_MODE) == set(MODES)


BAD = {
    "no TOML": ("[sdxl-360", "Expected ']'"),
    "no text": ("\udcff", "utf-8"),
    "empty": ("", "must have a section of a mode: syncdiffusion, syncdiffusion-xl, sdxl-360"),
    "no mode": (LEARNED, "must have a section of a mode"),
    "unknown section": (
        MODE + "[sdxl-36O]\n",
        "must not have the section 'sdxl-36O', only syncdiffusion, .*, intra_lpips",
    ),
    "key of no section": ("width = 512\n" + MODE, "must not have the section 'width'"),
    "no section": ("sdxl-360 = 3\n", r"sdxl-360=3: must be a section, \[sdxl-360\]"),
    "unknown key": (
        MODE + "steps = 3\n",
        r"\[sdxl-360\] must not have the key 'steps', only width, height, guidance_scale",
    ),
    "no height": (MODE.replace("height", "#"), r"\[sdxl-360\] must have the key height"),
    "text": (MODE.replace("512", "'512'"), r"\[sdxl-360\] width='512': must be an integer"),
    "fraction": (MODE.replace("512", "512.5"), r"\[sdxl-360\] width=512.5: must be"),
    "true": (MODE.replace("512", "true"), r"\[sdxl-360\] width=True: must be an integer"),
    "too large": (
        MODE.replace("512", "70000"),
        r"\[sdxl-360\] width=70000: must be at least 64 and at most 16384; try 16384",
    ),
    "too strong": (MODE.replace("= 4", "= 21"), r"\[sdxl-360\] guidance_scale=21: must be at"),
    "NaN": (MODE.replace("= 4", "= nan"), r"\[sdxl-360\] guidance_scale=nan: must be at least"),
    "unknown limit": (
        MODE + LEARNED + "width = 3\n",
        r"\[limits\] must not have the key 'width', only card, height, words",
    ),
    "no words": (MODE + LEARNED.replace("words", "#"), r"\[limits\] must have the key words"),
    "one word": (
        MODE + LEARNED.replace('["sea"]', '"sea"'),
        r"\[limits\] words='sea': must be a list of texts in lower case",
    ),
    "a capital": (MODE + LEARNED.replace("sea", "Sea"), r"\[limits\] words=\['Sea'\]: must be"),
    "no number": (
        MODE + LEARNED.replace("256", "true"),
        r"\[limits\] height=True: must be an integer of at least 1",
    ),
    "zero": (MODE + LEARNED.replace("256", "0"), r"\[limits\] height=0: must be an integer"),
    "a range of no windows": (
        MODE + USUAL.replace("syncdiffusion", "sdxl-360"),
        r"\[intra_lpips\] must not have the key 'sdxl-360', only syncdiffusion, syncdiffusion-xl",
    ),
    "one number": (
        MODE + USUAL.replace("[0, 0.25]", "0.25"),
        r"\[intra_lpips\] syncdiffusion=0.25: must be two numbers from 0 to 100, the smaller first",
    ),
    "three numbers": (MODE + USUAL.replace("[0", "[0, 0.1"), r"syncdiffusion=\[0, 0.1, 0.25\]"),
    "the larger first": (MODE + USUAL.replace("[0", "[0.3"), r"syncdiffusion=\[0.3, 0.25\]: must"),
    "below zero": (MODE + USUAL.replace("[0", "[-1"), r"syncdiffusion=\[-1, 0.25\]: must"),
    "no end": (MODE + USUAL.replace("0.25", "inf"), r"syncdiffusion=\[0, inf\]: must"),
    "a range from NaN": (MODE + USUAL.replace("[0", "[nan"), r"syncdiffusion=\[nan, 0.25\]: must"),
    "a range to NaN": (MODE + USUAL.replace("0.25", "nan"), r"syncdiffusion=\[0, nan\]: must"),
    "a range to true": (MODE + USUAL.replace("0.25", "true"), r"syncdiffusion=\[0, True\]: must"),
    "no card": (MODE + LEARNED.replace('"README.md"', "3"), r"\[limits\] card=3: must be text"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_legal_is_refused_by_name(path: Path, case: str) -> None:
    text, problem = BAD[case]
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"{path}: .*{problem}"):
        weights.describe(str(path.parent))


@pytest.mark.parametrize(
    ("defaults", "problem"),
    [
        ({"width": 100, "height": 64}, "width=100: must be a multiple of"),
        ({"width": 8192, "height": 8192}, "pixels"),
    ],
)
def test_defaults_that_the_networks_cannot_do_are_refused(
    tmp_path: Path, defaults: dict[str, int], problem: str
) -> None:
    save_family(tmp_path, **defaults, guidance_scale=3.0)
    with pytest.raises(ValueError, match=rf"family\.toml: \[sdxl-360\] .*{problem}"):
        load(str(tmp_path), device="cpu")
