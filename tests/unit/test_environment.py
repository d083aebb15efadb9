"""The environment variables that choose what is loaded."""

import pytest

from panorama.environment import family_name, load_models, max_cost, mode_names

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


def test_the_bound_of_the_cost_is_the_device_s_unless_another_is_set(monkeypatch):
    monkeypatch.delenv("PANORAMA_MAX_COST", raising=False)
    assert max_cost() is None
    monkeypatch.setenv("PANORAMA_MAX_COST", "")
    assert max_cost() is None
    monkeypatch.setenv("PANORAMA_MAX_COST", "1000")
    monkeypatch.setenv("PANORAMA_MODES", "sdxl-360")
    assert load_models().max_cost == max_cost() == 1000


@pytest.mark.parametrize("value", ["999", "-5000", "1e6", "many", "9" * 4301])
def test_a_bound_that_is_no_number_or_too_small_is_refused(monkeypatch, value):
    monkeypatch.setenv("PANORAMA_MAX_COST", value)
    with pytest.raises(ValueError, match=r"^PANORAMA_MAX_COST='.*at least 1000; try 100000$"):
        load_models()
