import dataclasses
from math import inf, nan
from pathlib import Path

import pytest
from PIL import Image

from panorama.request import INPUTS, NEEDS, OWN_INPUTS, ModeSettings, Request

SD2 = ModeSettings(width=2048, height=512, guidance_scale=7.5, multiple=8, smallest=512, window=64)
SDXL = ModeSettings(
    width=1024,
    height=512,
    guidance_scale=7.5,
    multiple=32,
    smallest=32,
    least_guidance=1.0,
    tokens=("<s0>", "<s1>"),
)


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
        ({"mode": "sdxl"}, "mode='sdxl': mode must be one of syncdiffusion, sdxl-360; 'syncd"),
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
        (
            {"depth_image": "/etc/passwd"},
            "depth_image='/etc/passwd': depth_image must be a file, s",
        ),
        (
            {"depth_image": ""},
            "depth_image must be a file, sent as a data or http URL, or as @FILE",
        ),
    ],
)
def test_what_no_model_can_take_is_refused(inputs, message):
    with pytest.raises(ValueError) as error:
        Request(**{"prompt": "sea", **inputs})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"width": 504}, "width=504: width must be at least 512, the least that the model can"),
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
    tiny = dataclasses.replace(SD2, width=1024, height=256, guidance_scale=4.0, smallest=256)
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


NOT_DEFAULT = {
    "sync_weight": 1.0,
    "sync_decay_rate": 0.5,
    "sync_freq": 2,
    "sync_threshold": 6,
    "stride": 32,
    "loop_closure": True,
    "speed": "fast",
    "scheduler": "unipc",
    "depth_image": Path("depth.png"),
    "controlnet_conditioning_scale": 0.0,
    "lora_scale": 0.0,
}


@pytest.mark.parametrize("mode", OWN_INPUTS)
@pytest.mark.parametrize("name", NOT_DEFAULT)
def test_an_input_of_another_mode_is_refused_where_it_was_set(mode, name):
    needed = {NEEDS[name]: NOT_DEFAULT[NEEDS[name]]} if name in NEEDS else {}
    inputs = {"prompt": "sea", "mode": mode, name: NOT_DEFAULT[name]}
    if name in OWN_INPUTS[mode]:
        assert getattr(Request(**inputs | needed), name) == NOT_DEFAULT[name]
        return
    (owner,) = INPUTS[name].modes
    with pytest.raises(ValueError) as error:
        Request(**inputs)
    rule = f"{name} must be left out with mode={mode!r}, as it belongs to {owner}; "
    assert f"{rule}{INPUTS[name].default!r} would do" in str(error.value)


def test_the_table_of_modes_has_every_input_that_not_all_have():
    assert {name for own in OWN_INPUTS.values() for name in own} == set(NOT_DEFAULT)
    assert INPUTS["mode"].choices == tuple(OWN_INPUTS)
    assert INPUTS["seed"].modes == tuple(OWN_INPUTS)


@pytest.mark.parametrize("mode", OWN_INPUTS)
def test_a_client_that_sends_every_default_can_use_every_mode(mode):
    defaults = {name: rule.default for name, rule in INPUTS.items() if not rule.required}
    assert Request(**defaults | {"prompt": "sea", "mode": mode}) == Request(prompt="sea", mode=mode)


def test_what_is_about_a_depth_image_is_refused_without_one():
    inputs = {"prompt": "sea", "mode": "sdxl-360"}
    assert Request(**inputs, controlnet_conditioning_scale=0.5) == Request(**inputs)
    with pytest.raises(ValueError) as error:
        Request(**inputs, controlnet_conditioning_scale=0)
    rule = "controlnet_conditioning_scale must be left out without depth_image; 0.5 would do"
    assert str(error.value) == f"controlnet_conditioning_scale=0.0: {rule}"


def test_an_error_names_a_file_without_its_folder():
    with pytest.raises(ValueError, match=r"^depth_image='depth\.png': depth_image must be left"):
        Request(prompt="sea", depth_image=Path("/some/folder/depth.png"))


@pytest.mark.parametrize(
    ("inputs", "prompt"),
    [
        ({"prompt": "sea"}, "<s0><s1> sea"),
        ({"prompt": "sea like <s1>"}, "sea like <s1>"),
        ({"prompt": "sea", "lora_scale": 0}, "sea"),
        ({"prompt": "sea", "mode": "syncdiffusion"}, "sea"),
    ],
)
def test_the_tokens_of_the_lora_come_in_front_where_none_is_named(inputs, prompt):
    request = Request(**{"mode": "sdxl-360", **inputs})
    settings = {"sdxl-360": SDXL, "syncdiffusion": SD2}[request.mode]
    resolved = request.resolve(settings)
    assert (resolved.prompt, resolved.full_prompt) == (inputs["prompt"], prompt)
    assert resolved.resolve(settings) == resolved


def test_a_family_without_a_lora_claims_none_and_takes_no_scale_for_it():
    bare = dataclasses.replace(SDXL, tokens=())
    for inputs in ({}, {"lora_scale": 0.8}, {"lora_scale": 0}):
        resolved = resolve(bare, mode="sdxl-360", **inputs)
        assert (resolved.lora_scale, resolved.full_prompt) == (0, "sea")
        assert resolved.resolve(bare) == resolved
    with pytest.raises(ValueError) as error:
        resolve(bare, mode="sdxl-360", lora_scale=0.5)
    rule = "lora_scale must be left out with a model family that has no LoRA; 0.0 would do"
    assert str(error.value) == f"lora_scale=0.5: {rule}"


def depth_image(folder, width, height):
    path = folder / "depth.png"
    Image.new("L", (width, height)).save(path)
    return {"mode": "sdxl-360", "depth_image": path}


def test_the_size_is_that_of_the_depth_image(tmp_path):
    inputs = depth_image(tmp_path, 768, 384)
    request = resolve(SDXL, **inputs)
    assert (request.width, request.height) == (768, 384)
    request = resolve(SDXL, **inputs, width=1024)
    assert (request.width, request.height) == (1024, 384)


@pytest.mark.parametrize(
    ("size", "given", "advice"),
    [
        ((1000, 500), {}, "width=992 and height=512 would do"),
        ((20, 40), {}, "width=64 and height=64 would do"),
        ((20000, 384), {}, "width=16384 and height=384 would do"),
        ((1000, 500), {"height": 512}, "; width=992 would do"),
    ],
)
def test_a_depth_image_of_no_legal_size_needs_one_to_be_given(tmp_path, size, given, advice):
    inputs = depth_image(tmp_path, *size) | given
    with pytest.raises(ValueError) as error:
        resolve(SDXL, **inputs)
    assert f"depth_image has {size[0]} x {size[1]} pixels" in str(error.value)
    assert advice in str(error.value)
    assert resolve(SDXL, **inputs | {"width": 992, "height": 512}).width == 992


@pytest.mark.parametrize("mode", OWN_INPUTS)
def test_a_negative_prompt_that_nothing_reads_is_refused(mode):
    settings = {"sdxl-360": SDXL, "syncdiffusion": SD2}[mode]
    inputs = {"mode": mode, "negative_prompt": "fog"}
    assert resolve(settings, **inputs, guidance_scale=1.5).negative_prompt == "fog"
    with pytest.raises(ValueError) as error:
        resolve(settings, **inputs, guidance_scale=1)
    assert "negative_prompt='fog': negative_prompt must be empty with gui" in str(error.value)
    assert str(error.value).endswith("; '' would do")


def test_guidance_that_a_mode_does_not_know_is_refused():
    assert resolve(SD2, guidance_scale=0.5).guidance_scale == 0.5
    assert resolve(SDXL, mode="sdxl-360", guidance_scale=1).guidance_scale == 1
    with pytest.raises(ValueError) as error:
        resolve(SDXL, mode="sdxl-360", guidance_scale=0.5)
    assert "guidance_scale must be at least 1.0, which is no guidance" in str(error.value)
    assert str(error.value).endswith("; 1.0 would do")


BOUNDED = dataclasses.replace(SDXL, largest=2048 * 2048)


@pytest.mark.parametrize(
    ("inputs", "rule", "legal"),
    [
        ({"width": 8192, "height": 4096}, "width must be at most 1024 with height=4096", 1024),
        ({"height": 16384}, "height must be at most 4096 with width=1024", 4096),
        ({"width": 2048, "height": 2080}, "height must be at most 2048 with width=2048", 2048),
    ],
)
def test_a_picture_of_too_many_pixels_is_refused(inputs, rule, legal):
    with pytest.raises(ValueError) as error:
        resolve(BOUNDED, mode="sdxl-360", **inputs)
    assert f"{rule}, for 4194304 pixels in all; {legal} would do" in str(error.value)
    name = rule.split()[0]
    assert getattr(resolve(BOUNDED, mode="sdxl-360", **inputs | {name: legal}), name) == legal


@pytest.mark.parametrize(
    ("size", "given", "advice"),
    [
        ((8192, 4096), {}, "width=2880 and height=1440"),
        ((100000, 50), {}, "width=16384 and height=64"),
        ((2048, 4096), {"width": 8192}, "height=512"),
    ],
)
def test_a_depth_image_of_too_many_pixels_alone_starts_nothing(tmp_path, size, given, advice):
    inputs = depth_image(tmp_path, *size) | given
    with pytest.raises(ValueError) as error:
        resolve(BOUNDED, **inputs)
    assert f"and make up to 4194304 pixels; {advice} would do" in str(error.value)
    sizes = {name: int(size) for name, size in (a.split("=") for a in advice.split(" and "))}
    resolved = resolve(BOUNDED, **inputs | sizes)
    assert resolved.width * resolved.height <= BOUNDED.largest
    with pytest.raises(ValueError, match="pixels in all"):
        resolve(BOUNDED, **inputs | {"width": 16384, "height": 16384})


def test_a_depth_image_that_cannot_be_read_is_refused_before_any_work(tmp_path):
    path = tmp_path / "depth.png"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"depth_image='depth.png': depth_image must be a whole"):
        resolve(SDXL, mode="sdxl-360", depth_image=path, width=512, height=256)


def test_fast_takes_fewer_steps_with_a_solver_made_for_them():
    exact, fast = resolve(), resolve(speed="fast")
    assert (exact.num_inference_steps, exact.scheduler) == (50, None)
    assert (fast.num_inference_steps, fast.scheduler) == (20, "dpm++")
    asked = resolve(speed="fast", num_inference_steps=9, scheduler="ddim")
    assert (asked.num_inference_steps, asked.scheduler) == (9, "ddim")


def test_a_stride_is_refused_where_windows_do_not_overlap():
    assert resolve(speed="fast", stride=16).stride == 16  # the default, which clients may send
    with pytest.raises(ValueError, match="stride=8: stride must be left out with speed='fast'"):
        resolve(speed="fast", stride=8)


@pytest.mark.parametrize(("name", "value"), [("speed", "warp"), ("scheduler", "euler")])
def test_unknown_speeds_and_schedulers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}='{value}': {name} must be one of"):
        resolve(**{name: value})
