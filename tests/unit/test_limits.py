"""A family's warnings about requests beyond its training."""

import logging
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from panorama import weights
from panorama.modes import Models, load
from panorama.request import Request
from weights.train.diffusion import words

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models() -> Models:
    return load("tiny", device="cpu")


def warnings(models: Models, caplog: pytest.LogCaptureFixture, **inputs: Any) -> list[str]:
    with caplog.at_level(logging.WARNING):
        models.prepare(Request(**inputs))
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "inputs",
    [
        {"prompt": "Sunset over snowy mountains, with trees"},
        {"prompt": "hdri view, bedroom in the color of blue", "mode": "sdxl-360"},
        {"prompt": "<s0><s1> the sea", "mode": "syncdiffusion-xl"},
        {"prompt": "night over the sea | dawn over the sea", "width": 256, "height": 1024},
    ],
)
def test_what_was_learned_is_made_without_a_word(
    inputs: dict[str, Any], models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings(models, caplog, **inputs) == []


def test_unknown_words_are_named_once(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    found = warnings(
        models, caplog, prompt="a castle | Castle by the sea", negative_prompt="blurry dragons"
    )
    assert found == [
        "this family has not learned the words 'castle, by, dragons'; see weights/tiny/README.md"
    ]


def test_unknown_words_of_the_poles_are_named(
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = {"prompt": "the sea", "mode": "sdxl-360", "fix_poles": True}
    assert warnings(models, caplog, **inputs) == []
    (found,) = warnings(models, caplog, **inputs, zenith_prompt="a kite")
    assert "'kite'" in found


def test_a_tall_strip_of_one_prompt_is_named(
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    (found,) = warnings(models, caplog, prompt="the sea", width=256, height=1024)
    assert re.match(
        r"height=1024: this family was trained on images 256 pixels high.*README\.md$", found
    )


def test_a_family_may_have_no_limits() -> None:
    assert weights.limits("full") is None


def test_the_words_are_those_of_the_recipe() -> None:
    """And the card that warnings point to is there."""
    limits = tomllib.loads((ROOT / "weights" / "tiny" / "family.toml").read_text())["limits"]
    learned = {word for text in words() for word in re.findall(r"[^\W\d_]+", text.lower())}
    assert limits["words"] == sorted(learned)
    assert (ROOT / limits["card"]).exists()
