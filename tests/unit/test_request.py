import dataclasses
from math import inf, nan

import pytest

from panorama.request import INPUTS, ModeSettings, Request

SD2 = ModeSettings(width=2048, height=512, guidance_scale=7.5, multiple=8, window=64)


def resolve(settings: ModeSettings = SD2, **inputs):
    return Request(prompt="sea", **inputs).resolve(settings)


def test_defaults_are_those_of_the_published_model():
    request = resolve()
    published = {
        "negative_prompt": "",
        "width": 2048,
        "height": 512,
        "guidance_scale": 7.5,
        "sync_weight": 20.0,
        "sync_decay_rate": 0.99,
        "sync_freq": 1,
        "sync_threshold": 5,
        "num_inference_steps": 50,
        "stride": 16,
        "loop_closure": False,
    }
    assert {name: getattr(request, name) for name in published} == published


@pytest.mark.parametrize(
    ("name", "smallest", "largest"),
    [
        ("width", 512, 3072),
        ("height", 512, 3072),
        ("guidance_scale", 0, 20),
        ("sync_weight", 0, 30),
        ("sync_decay_rate", 0, 1),
        ("sync_threshold", 0, 50),
        ("num_inference_steps", 1, 200),
    ],
)
def test_every_published_range_is_legal(name, smallest, largest):
    for value in (smallest, largest):
        assert getattr(resolve(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": ""}, "prompt='': prompt must not be empty; 'sunset over snowy"),
        ({"prompt": " \n"}, "prompt must not be empty"),
        ({"prompt": None}, "prompt=None: prompt must be text"),
        ({"prompt": "\ud800"}, "prompt must be text that UTF-8 can hold"),
        ({"mode": "sdxl"}, "mode='sdxl': mode must be one of syncdiffusion; 'syncdiffusion'"),
        ({"width": 512.0}, "width=512.0: width must be an integer; None would do"),
        ({"width": True}, "width=True: width must be an integer"),
        ({"width": "512"}, "width='512': width must be an integer"),
        ({"height": 20000}, "height must be at least 64 and at most 16384; 16384 would do"),
        ({"guidance_scale": nan}, "guidance_scale=nan: guidance_scale must be at least 0.0 and"),
        ({"sync_weight": inf}, "sync_weight must be at least 0.0 and at most 30.0; 30.0 would do"),
        ({"sync_weight": -inf}, "0.0 would do"),
        ({"sync_weight": None}, "sync_weight must be a number; 20.0 would do"),
        ({"sync_decay_rate": True}, "sync_decay_rate must be a number; 0.99 would do"),
        ({"sync_freq": 0}, "sync_freq=0: sync_freq must be at least 1; 1 would do"),
        ({"sync_threshold": 201}, "200 would do"),
        ({"num_inference_steps": 0}, "1 would do"),
        ({"stride": 7}, "stride=7: stride must be at least 8; 8 would do"),
        ({"seed": -1}, "0 would do"),
        ({"seed": 2**32}, "4294967295 would do"),
        ({"loop_closure": 1}, "loop_closure=1: loop_closure must be true or false; False would do"),
    ],
)
def test_what_no_model_can_take_is_refused(inputs, message):
    with pytest.raises(ValueError) as error:
        Request(**{"prompt": "sea", **inputs})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"width": 504}, "width=504: width must be at least 512, one window of the model; 512"),
        ({"width": 2047}, "width=2047: width must be a multiple of 8; 2040 would do"),
        ({"height": 516}, "height=516: height must be a multiple of 8; 512 would do"),
        ({"stride": 65}, "stride=65: stride must be at most 64, the side of a window"),
        ({"stride": 64, "loop_closure": True}, "stride must be less than 64 on a ring"),
    ],
)
def test_what_this_family_cannot_take_is_refused(inputs, message):
    with pytest.raises(ValueError) as error:
        resolve(**inputs)
    assert message in str(error.value)


def test_what_is_left_out_comes_from_the_family():
    tiny = ModeSettings(width=1024, height=256, guidance_scale=4.0, multiple=8, window=32)
    request = resolve(tiny, height=512)
    assert (request.width, request.height, request.guidance_scale) == (1024, 512, 4.0)


def test_a_missing_seed_is_drawn_anew_each_time():
    seeds = {resolve().seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_an_integer_for_a_float_becomes_one():
    assert isinstance(resolve(guidance_scale=3).guidance_scale, float)
    assert resolve(guidance_scale=3, seed=1) == resolve(guidance_scale=3.0, seed=1)


def test_the_longer_side_of_a_ring_closes():
    assert resolve().closed_axis is None
    assert resolve(loop_closure=True).closed_axis == "x"
    assert resolve(loop_closure=True, width=512).closed_axis == "x"
    assert resolve(loop_closure=True, width=512, height=1024).closed_axis == "y"


def test_a_request_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().seed = 2


def test_every_input_is_described():
    for rule in INPUTS.values():
        assert rule.description.endswith("."), rule.name
