"""The environment variables that choose what is loaded."""

import pytest

from panorama.environment import family_name, mode_names

EVERY = ("syncdiffusion", "syncdiffusion-xl", "sdxl-360")


@pytest.mark.parametrize(
    ("value", "modes"),
    [
        ("", EVERY),
        ("sdxl-360", ("sdxl-360",)),
        (" sdxl-360, syncdiffusion,", ("sdxl-360", "syncdiffusion")),
        ("sdxl-360,sdxl-360", ("sdxl-360",)),
    ],
)
def test_modes_are_those_asked_for_or_all_of_the_family(monkeypatch, value, modes):
    monkeypatch.setenv("PANORAMA_MODES", value)
    assert mode_names("full") == modes


def test_a_mode_that_the_family_lacks_is_refused(monkeypatch):
    monkeypatch.setenv("PANORAMA_MODES", "syncdiffusion,flat")
    with pytest.raises(ValueError, match=r"PANORAMA_MODES='flat': must .*sdxl-360.*try sync"):
        mode_names("full")


def test_the_family_is_the_embedded_one_unless_another_is_named(monkeypatch):
    monkeypatch.delenv("PANORAMA_FAMILY", raising=False)
    assert family_name() == "tiny"
    monkeypatch.setenv("PANORAMA_FAMILY", "")
    assert family_name() == "tiny"
    monkeypatch.setenv("PANORAMA_FAMILY", "full")
    assert family_name() == "full"
