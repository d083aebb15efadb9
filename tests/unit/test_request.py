"""The inputs of a panorama: defaults, ranges, and the rules between them."""

import ast
import dataclasses
import re
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from panorama.conditioning.depth import KINDS
from panorama.errors import LONGEST
from panorama.request import (
    EVERY_MODE,
    INPUTS,
    LONGEST_TEXT,
    ModeSettings,
    Request,
    ResolvedRequest,
    SpeedSettings,
)

SPEEDS = {"exact": SpeedSettings(50), "fast": SpeedSettings(20, "dpm++", takes_stride=False)}
SD2 = ModeSettings(
    width=2048,
    height=512,
    guidance_scale=7.5,
    multiple=8,
    smallest=512,
    window=64,
    speeds=SPEEDS,
)
SPHERE = ModeSettings(
    width=1024,
    height=512,
    guidance_scale=7.5,
    multiple=32,
    smallest=32,
    has_lora=True,
    tokens=("<s0>", "<s1>"),
    speeds={"exact": SpeedSettings(50)},
)
LORA = {"has_lora": True, "tokens": SPHERE.tokens}
XL = dataclasses.replace(SD2, smallest=1024, height=1024, window=128, speed="fast", **LORA)
SETTINGS = {"syncdiffusion": SD2, "syncdiffusion-xl": XL, "sdxl-360": SPHERE}
DEPTH = Path("/some/folder/depth.png")


def resolve(
    settings: ModeSettings = SD2, depth_size: tuple[int, int] | None = None, **inputs: Any
) -> ResolvedRequest:
    return Request(**{"prompt": "sea", **inputs}).resolve(settings, depth_size)


def refusal(make: Callable[[], object]) -> tuple[str, str, Any]:
    """Return the input, the rule and the legal value of the error that a call raises."""
    with pytest.raises(ValueError) as error:
        make()
    name, _, rest = str(error.value).partition("=")
    rule, _, advice = rest.rpartition("; ")
    assert ": must " in rule
    legal = None if advice == "leave it out" else ast.literal_eval(advice.removeprefix("try "))
    return name, rule.partition(": must ")[2], legal


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
    ("name", "value", "rule"),
    [
        ("prompt", "", "empty"),
        ("prompt", " \n", "empty"),
        ("prompt", None, "text"),
        ("prompt", {"text": "sea"}, "text"),
        ("prompt", "\ud800", "Unicode"),
        ("prompt", "a" * (LONGEST_TEXT + 1), "10000 characters"),
        ("negative_prompt", "a" * (LONGEST_TEXT + 1), "10000 characters"),
        ("mode", "sdxl", "syncdiffusion, syncdiffusion-xl, sdxl-360"),
        ("speed", "warp", "exact, fast"),
        ("scheduler", "heun", "ddim, euler, dpm++, unipc"),
        ("width", 512.5, "integer"),
        ("width", True, "integer"),
        ("width", "wide", "integer"),
        ("height", 20000, "at most 16384"),
        ("height", 63, "at least 64"),
        ("guidance_scale", nan, "at least 0.0"),
        ("upscale", nan, "integer"),
        ("guidance_scale", "high", "number"),
        ("sync_weight", inf, "at most 30.0"),
        ("sync_weight", -inf, "at least 0.0"),
        ("sync_weight", None, "number"),
        ("sync_decay_rate", True, "number"),
        ("sync_freq", 0, "at least 1"),
        ("sync_freq", inf, "integer"),
        ("sync_threshold", 201, "at most 200"),
        ("num_inference_steps", 0, "at least 1"),
        ("num_inference_steps", "many", "integer"),
        ("stride", 7, "at least 8"),
        ("seed", -1, "at least 0"),
        ("seed", 2**32, "at most 4294967295"),
        ("seed", "random", "integer"),
        ("depth_kind", "far", "nearness, inverted, distance"),
        ("output_format", "jpeg", "png, jpg, webp"),
        ("output_quality", 95.5, "integer"),
        ("loop_closure", 1, "true or false"),
    ],
)
def test_an_error_names_the_input_the_rule_and_a_legal_value(name, value, rule):
    field, broken, legal = refusal(lambda: Request(**{"prompt": "sea", name: value}))
    assert field == name
    assert rule in broken
    assert legal is not None
    Request(**{"prompt": "sea", name: legal})


@pytest.mark.parametrize("value", ["/etc/passwd", "", 1, ["depth.png"]])
def test_a_text_is_not_a_file(value):
    name, rule, legal = refusal(lambda: Request(prompt="sea", mode="sdxl-360", depth_image=value))
    assert (name, legal) == ("depth_image", None)
    assert "file" in rule


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", ["sea " * 100_000]),
        ("mode", "m" * 1_000_000),
        ("depth_image", "data:image/png;base64," + "A" * 1_000_000),
        ("loop_closure", {"a": list(range(10_000))}),
        ("width", "9" * 10_000),
    ],
)
def test_an_error_shortens_a_long_value(name, value):
    with pytest.raises(ValueError) as error:
        Request(**{"prompt": "sea", name: value})
    assert str(error.value).startswith(f"{name}=")
    assert len(str(error.value)) < LONGEST + 200


def test_prompts_may_be_long():
    text = "a" * LONGEST_TEXT
    assert resolve(prompt=text, negative_prompt=text).prompt == text


@pytest.mark.parametrize("name", ["seed", "width", "sync_freq", "stride", "num_inference_steps"])
def test_an_integral_float_becomes_an_integer(name):
    value = getattr(Request(**{"prompt": "sea", name: 512.0 if name == "width" else 64.0}), name)
    assert type(value) is int
    assert value == (512 if name == "width" else 64)


def test_an_integer_becomes_a_float_where_one_is_asked_for():
    assert type(resolve(guidance_scale=3).guidance_scale) is float
    assert resolve(guidance_scale=3, seed=1) == resolve(guidance_scale=3.0, seed=1)


@pytest.mark.parametrize(
    ("inputs", "name", "rule", "legal"),
    [
        ({"width": 504}, "width", "at least 512", 512),
        ({"width": 2047}, "width", "multiple of 8", 2048),
        ({"height": 515}, "height", "multiple of 8", 512),
    ],
)
def test_a_size_that_the_family_cannot_make_is_refused(inputs, name, rule, legal):
    with pytest.raises(ValueError) as error:
        resolve(**inputs)
    assert str(error.value).startswith(f"{name}={inputs[name]}: must ")
    assert rule in str(error.value)
    assert str(error.value).endswith(f"; try {name}={legal}")


@pytest.mark.parametrize(
    ("inputs", "limit"),
    [
        ({"stride": 65}, "at most 64"),
        ({"stride": 64, "loop_closure": True}, "at most 63 on a ring"),
    ],
)
def test_a_stride_that_leaves_joints_open_is_refused(inputs, limit):
    name, rule, legal = refusal(lambda: resolve(**inputs))
    assert name == "stride"
    assert limit in rule
    resolve(**inputs | {"stride": legal})
    resolve(**inputs | {"stride": inputs["stride"] - 1})


def test_inputs_left_out_come_from_the_family():
    tiny = dataclasses.replace(SD2, width=1024, height=256, guidance_scale=4.0, smallest=256)
    request = resolve(tiny, height=512)
    assert (request.width, request.height, request.guidance_scale) == (1024, 512, 4.0)


def test_a_missing_seed_is_drawn_anew_each_time():
    seeds = {resolve().seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_the_longer_side_of_a_ring_closes():
    assert resolve().closed_axis == ""
    assert resolve(loop_closure=True).closed_axis == "x"
    assert resolve(loop_closure=True, width=512).closed_axis == "x"
    assert resolve(loop_closure=True, width=512, height=1024).closed_axis == "y"
    assert resolve(SPHERE, mode="sdxl-360", height=2048).closed_axis == "x"


def test_a_request_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().seed = 2


def test_every_input_is_described():
    for rule in INPUTS.values():
        assert rule.description.endswith("."), rule.name


OWN = {
    "sync_weight": ("syncdiffusion", "syncdiffusion-xl"),
    "sync_decay_rate": ("syncdiffusion", "syncdiffusion-xl"),
    "sync_freq": ("syncdiffusion", "syncdiffusion-xl"),
    "sync_threshold": ("syncdiffusion", "syncdiffusion-xl"),
    "stride": ("syncdiffusion", "syncdiffusion-xl"),
    "loop_closure": ("syncdiffusion", "syncdiffusion-xl"),
    "speed": ("syncdiffusion", "syncdiffusion-xl"),
    "depth_image": ("syncdiffusion-xl", "sdxl-360"),
    "controlnet_conditioning_scale": ("syncdiffusion-xl", "sdxl-360"),
    "lora": ("syncdiffusion-xl", "sdxl-360"),
    "depth_kind": ("syncdiffusion-xl", "sdxl-360"),
    "lora_scale": ("syncdiffusion-xl", "sdxl-360"),
    "upscale": ("syncdiffusion-xl", "sdxl-360"),
    "fix_poles": ("sdxl-360",),
    "zenith_prompt": ("sdxl-360",),
    "nadir_prompt": ("sdxl-360",),
}
OTHER = {
    "sync_weight": 1.0,
    "sync_decay_rate": 0.5,
    "sync_freq": 2,
    "sync_threshold": 6,
    "stride": 32,
    "loop_closure": True,
    "speed": "exact",
    "depth_image": DEPTH,
    "depth_kind": "distance",
    "controlnet_conditioning_scale": 0.0,
    "lora": "owner/name",
    "lora_scale": 0.0,
    "upscale": 2,
    "fix_poles": True,
    "zenith_prompt": "a blue sky",
    "nadir_prompt": "sand",
}


def test_modes_and_the_inputs_that_they_take():
    assert INPUTS["mode"].choices == EVERY_MODE == tuple(SETTINGS)
    assert {name: rule.modes for name, rule in INPUTS.items()} == {
        name: OWN.get(name, EVERY_MODE) for name in INPUTS
    }


@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("name", OWN)
def test_an_input_of_another_mode_is_refused_where_it_is_set(mode, name):
    needs = INPUTS[name].needs
    inputs = {"prompt": "sea", "mode": mode, name: OTHER[name]}
    if mode in OWN[name]:
        request = Request(**inputs | {need: OTHER[need] for need in needs})
        assert getattr(request, name) == OTHER[name]
        return
    field, rule, legal = refusal(lambda: Request(**inputs))
    assert (field, legal) == (name, INPUTS[name].default)
    for word in (mode, *OWN[name]):
        assert word in rule


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_a_client_that_sends_every_default_can_use_every_mode(mode):
    defaults = {name: rule.default for name, rule in INPUTS.items() if not rule.required}
    assert Request(**defaults | {"prompt": "sea", "mode": mode}) == Request(prompt="sea", mode=mode)


def test_a_scale_for_a_depth_image_is_refused_without_one():
    inputs = {"prompt": "sea", "mode": "sdxl-360"}
    assert Request(**inputs, controlnet_conditioning_scale=0.5) == Request(**inputs)
    name, rule, legal = refusal(lambda: Request(**inputs, controlnet_conditioning_scale=0))
    assert (name, legal) == ("controlnet_conditioning_scale", 0.5)
    assert "depth_image" in rule


@pytest.mark.parametrize("kind", ["inverted", "distance"])
def test_a_kind_of_depth_is_refused_without_a_depth_image(kind):
    name, rule, legal = refusal(lambda: Request(prompt="sea", mode="sdxl-360", depth_kind=kind))
    assert (name, legal) == ("depth_kind", "nearness")
    assert "depth_image" in rule


def test_every_kind_of_depth_is_one_that_can_be_read():
    assert INPUTS["depth_kind"].choices == tuple(KINDS)


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp"])
def test_a_png_takes_no_quality_and_others_take_any(output_format):
    for quality in (1, 80, 95, 100):
        inputs = {"prompt": "sea", "output_format": output_format, "output_quality": quality}
        if output_format == "png" and quality != 95:
            name, rule, legal = refusal(lambda inputs=inputs: Request(**inputs))
            assert (name, legal) == ("output_quality", 95)
            assert "output_format='png'" in rule
        else:
            assert Request(**inputs).output_quality == quality
    for quality, legal in ((0, 1), (101, 100)):
        inputs = {"prompt": "sea", "output_format": output_format, "output_quality": quality}
        assert refusal(lambda inputs=inputs: Request(**inputs))[::2] == ("output_quality", legal)


def test_a_webp_has_at_most_16383_pixels_a_side():
    assert resolve(width=16376, output_format="webp").width == 16376
    for size in ({"width": 16384}, {"height": 16384}):
        name, rule, legal = refusal(lambda size=size: resolve(output_format="webp", **size))
        assert (name, legal) == ("output_format", "png")
        assert "16383" in rule
        for other in ("png", "jpg"):
            assert resolve(output_format=other, **size)


def test_a_jpg_is_refused_for_prompts_that_its_metadata_has_no_room_for():
    long = {"prompt": "sea" + "\u3000" * 9_990, "negative_prompt": "\u3000" * 10}
    assert Request(**long, output_format="png") and Request(**long, output_format="webp")
    name, rule, legal = refusal(lambda: Request(**long, output_format="jpg"))
    assert (name, legal) == ("output_format", "png")
    assert "metadata" in rule or "record" in rule
    assert Request(prompt="a" * 10_000, negative_prompt="b" * 10_000, output_format="jpg")
    poles = {name: "\u3000" * 5_010 + "sky" for name in ("zenith_prompt", "nadir_prompt")}
    inputs = {"prompt": "sea", "mode": "sdxl-360", "fix_poles": True, **poles}
    assert refusal(lambda: Request(**inputs, output_format="jpg"))[0] == "output_format"


def test_an_error_names_a_file_without_its_folder():
    with pytest.raises(ValueError, match=r"^depth_image='depth\.png': must ") as error:
        Request(prompt="sea", depth_image=DEPTH)
    assert "folder" not in str(error.value)


@pytest.mark.parametrize(
    ("inputs", "prompt"),
    [
        ({"prompt": "sea"}, "<s0><s1> sea"),
        ({"prompt": "sea like <s1>"}, "sea like <s1>"),
        ({"prompt": "sea like <S1>"}, "sea like <S1>"),
        ({"prompt": "sea", "lora": "owner/name"}, "sea"),
        ({"prompt": "sea", "lora_scale": 0}, "sea"),
        ({"prompt": "sea", "mode": "syncdiffusion-xl"}, "<s0><s1> sea"),
        ({"prompt": "sea", "mode": "syncdiffusion"}, "sea"),
    ],
)
def test_tokens_of_the_lora_precede_a_prompt_that_names_none(inputs, prompt):
    request = Request(**{"mode": "sdxl-360", **inputs})
    settings = SETTINGS[request.mode]
    resolved = request.resolve(settings)
    assert (resolved.prompt, resolved.parts) == (inputs["prompt"], (prompt,))
    assert resolved.tokens == ("<s0><s1>" if prompt.startswith("<s0><s1>") else "")
    assert resolved.resolve(settings) == resolved


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("sea", ("sea",)),
        (" sea\n", ("sea",)),
        ("night | dawn|noon ", ("night", "dawn", "noon")),
        (r"night \| dawn", ("night | dawn",)),
        (r"night\|dawn | noon", ("night|dawn", "noon")),
        (r"night \ | dawn", ("night \\", "dawn")),
        (r"C:\sea | dawn", (r"C:\sea", "dawn")),
        (r"\| | \|", ("|", "|")),
    ],
)
def test_bars_separate_the_parts_of_a_prompt(prompt, parts):
    resolved = resolve(prompt=prompt)
    assert (resolved.prompt, resolved.parts) == (prompt, parts)


@pytest.mark.parametrize("scale", [0.8, 0.0])
def test_views_of_the_poles_show_their_texts_or_the_prompt_with_the_tokens(scale):
    def poles(**inputs):
        request = Request(prompt="sea", mode="sdxl-360", lora_scale=scale, **inputs)
        resolved = request.resolve(SETTINGS["sdxl-360"])
        assert resolved.resolve(SETTINGS["sdxl-360"]) == resolved
        return resolved.poles

    tokens = "<s0><s1> " if scale else ""
    assert poles() == ()
    assert poles(fix_poles=True) == (f"looking up {tokens}sea", f"looking down {tokens}sea")
    own = poles(fix_poles=True, zenith_prompt="a TOK sky", nadir_prompt="sand")
    assert own == ("a <s0><s1> sky" if scale else "a TOK sky", f"{tokens}sand")


DRAWS = ("sync_weight", "sync_decay_rate", "sync_freq", "sync_threshold", "stride")


@pytest.mark.parametrize("name", DRAWS)
def test_what_enlarging_an_image_leaves_out_is_refused_with_it(name):
    inputs = {"prompt": "sea", "mode": "syncdiffusion-xl", "speed": "exact"}
    own = {name: OTHER[name]}
    assert Request(**inputs, **own, upscale=2) and Request(**inputs, **own, image=DEPTH)
    field, rule, legal = refusal(lambda: Request(**inputs, **own, image=DEPTH, upscale=2))
    assert (field, legal) == (name, INPUTS[name].default)
    assert "image and upscale" in rule


def test_an_image_can_be_enlarged_with_the_defaults():
    inputs = {"mode": "syncdiffusion-xl", "image": DEPTH, "upscale": 2, "height": 1024}
    resolved = resolve(**inputs)
    assert resolved.sync_threshold is None and resolved.speed
    assert resolved.resolve(SETTINGS["syncdiffusion-xl"]) == resolved


def test_bars_of_a_negative_prompt_are_literal():
    assert resolve(negative_prompt="fog || rain").negative_prompt == "fog || rain"


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("sea, in the style of TOK", ("sea, in the style of <s0><s1>",)),
        ("TOK sea like TOK", ("<s0><s1> sea like <s0><s1>",)),
        ("<s0> sea like TOK", ("<s0> sea like <s0><s1>",)),
        ("TOKYO by night", ("<s0><s1> TOKYO by night",)),
        ("tok tok", ("<s0><s1> tok tok",)),
        ("sea | TOK night", ("<s0><s1> sea", "<s0><s1> night")),
    ],
)
def test_tok_stands_for_the_tokens(prompt, parts):
    inputs = {"mode": "syncdiffusion-xl", "width": 3072, "prompt": prompt}
    resolved = resolve(XL, **inputs)
    assert (resolved.parts, resolved.tokens, resolved.prompt) == (parts, "<s0><s1>", prompt)
    for off in ({"lora_scale": 0}, {"lora": "owner/name"}):
        assert "<s1>" not in "".join(resolve(XL, **inputs, **off).parts)
    three = dataclasses.replace(XL, tokens=("<s0>", "<s1>", "<s2>"))
    assert resolve(three, **inputs).parts[0] == parts[0].replace("<s0><s1>", "<s0><s1><s2>")


def test_tokens_of_the_lora_precede_every_part_that_names_none():
    inputs = {"mode": "syncdiffusion-xl", "width": 3072}
    resolved = resolve(XL, prompt="night | <s0> dawn | noon", **inputs)
    assert resolved.parts == ("<s0><s1> night", "<s0> dawn", "<s0><s1> noon")
    assert resolved.tokens == "<s0><s1>"
    assert resolve(XL, prompt="<s1> night | <s0> dawn", **inputs).tokens == ""
    bare = resolve(XL, prompt="night | <s0> dawn", lora_scale=0, **inputs)
    assert (bare.parts, bare.tokens) == (("night", "<s0> dawn"), "")


@pytest.mark.parametrize(
    "prompt", ["|", "night |", "| night", "night || dawn", "night | \n | dawn"]
)
@pytest.mark.parametrize("mode", ["syncdiffusion", "syncdiffusion-xl"])
def test_a_part_without_a_text_is_refused(prompt, mode):
    name, rule, legal = refusal(lambda: Request(prompt=prompt, mode=mode))
    assert name == "prompt"
    assert "empty part" in rule and r"literal bar is written \|" in rule
    Request(prompt=legal, mode=mode)


@pytest.mark.parametrize("prompt", ["night | dawn", "night |", "|"])
def test_a_mode_without_windows_refuses_parts(prompt):
    name, rule, legal = refusal(lambda: Request(prompt=prompt, mode="sdxl-360"))
    assert name == "prompt"
    assert "one part" in rule and "'sdxl-360'" in rule and r"literal bar is written \|" in rule
    Request(prompt=legal, mode="sdxl-360")
    assert resolve(SPHERE, prompt=r"night \| dawn", mode="sdxl-360", lora_scale=0).parts == (
        "night | dawn",
    )


@pytest.mark.parametrize(
    ("size", "room", "longer"),
    [((1536, 512), 3, "width"), ((2040, 1024), 3, "width"), ((1024, 2048), 4, "height")],
)
def test_every_part_is_at_least_one_window_long(size, room, longer):
    sides = dict(zip(("width", "height"), size, strict=True))
    assert len(resolve(prompt=" | ".join(["sea"] * room), **sides).parts) == room
    prompt = " | ".join(["sea"] * (room + 1))
    with pytest.raises(ValueError) as error:
        resolve(prompt=prompt, **sides)
    message = str(error.value)
    assert message.startswith(f"prompt={prompt!r}: must not have {room + 1} parts")
    assert f"{longer}={sides[longer]}, which has room for {room}:" in message
    assert "512 pixels" in message
    legal = 512 * (room + 1)
    assert message.endswith(f"; try {longer}={legal}")
    assert resolve(prompt=prompt, **sides | {longer: legal})
    with pytest.raises(ValueError, match="room for"):
        resolve(prompt=prompt, **sides | {longer: legal - 8})


def test_more_parts_than_any_size_has_room_for_are_refused_with_a_legal_prompt():
    assert len(resolve(prompt="|".join(["sea"] * 32), width=16384).parts) == 32
    name, rule, legal = refusal(lambda: resolve(prompt="|".join(["sea"] * 33)))
    assert name == "prompt" and "room for 4:" in rule
    assert resolve(prompt=legal)


def test_a_family_without_a_lora_takes_no_scale_for_one():
    bare = dataclasses.replace(SPHERE, has_lora=False, tokens=())
    for inputs in ({}, {"lora_scale": 0.8}, {"lora_scale": 0}):
        resolved = resolve(bare, mode="sdxl-360", **inputs)
        assert (resolved.lora_scale, resolved.parts) == (0, ("sea",))
        assert resolved.resolve(bare) == resolved
    name, rule, legal = refusal(lambda: resolve(bare, mode="sdxl-360", lora_scale=0.5))
    assert (name, legal) == ("lora_scale", 0)
    assert "LoRA" in rule


def test_a_lora_of_ones_own_needs_none_of_the_family():
    bare = dataclasses.replace(SPHERE, has_lora=False, tokens=())
    for scale in (0.8, 0.5, 0.0):
        resolved = resolve(bare, mode="sdxl-360", lora_scale=scale, lora="owner/name")
        assert (resolved.lora_scale, resolved.lora) == (scale, "owner/name")
        assert resolved.resolve(bare) == resolved


def test_a_lora_may_be_a_file_and_nothing_else_may():
    for value in ("owner/name", Path("style.safetensors")):
        assert Request(prompt="sea", mode="sdxl-360", lora=value).lora == value
    name, rule, _ = refusal(lambda: Request(prompt="sea", mode="sdxl-360", lora=5))
    assert (name, rule) == ("lora", "be text")
    name, rule, _ = refusal(lambda: Request(prompt=Path("sea")))
    assert (name, rule) == ("prompt", "be text")


def test_a_lora_without_tokens_has_a_scale_and_leaves_the_prompt_as_it_is():
    bare = dataclasses.replace(SPHERE, tokens=())
    for scale in (0.8, 0.5, 0.0):
        resolved = resolve(bare, mode="sdxl-360", lora_scale=scale)
        assert (resolved.lora_scale, resolved.parts) == (scale, ("sea",))


def test_the_size_is_that_of_the_depth_image():
    inputs = {"mode": "sdxl-360", "depth_image": DEPTH}
    request = resolve(SPHERE, (768, 384), **inputs)
    assert (request.width, request.height) == (768, 384)
    request = resolve(SPHERE, (768, 384), **inputs, width=1024, height=384)
    assert (request.width, request.height) == (1024, 384)


@pytest.mark.parametrize(
    ("depth_size", "given", "size"),
    [
        ((768, 384), {"width": 1024}, (1024, 512)),
        ((768, 384), {"height": 512}, (1024, 512)),
        ((1000, 500), {"width": 1024}, (1024, 512)),
        ((1000, 500), {"height": 512}, (1024, 512)),
        ((1920, 1080), {"width": 1024}, (1024, 576)),
        ((1500, 700), {"width": 1024}, (1024, 480)),  # 477.9 rows
        ((700, 1500), {"height": 1024}, (480, 1024)),
        ((1366, 768), {"height": 768}, (1376, 768)),  # 1366 columns
    ],
)
def test_where_one_side_is_given_the_other_keeps_the_depth_image_s_ratio(depth_size, given, size):
    request = resolve(SPHERE, depth_size, mode="sdxl-360", depth_image=DEPTH, **given)
    assert (request.width, request.height) == size


def test_the_mode_s_own_size_keeps_no_ratio():
    assert resolve(SPHERE, mode="sdxl-360", width=2048).height == 512


BOUNDED = dataclasses.replace(SPHERE, largest=2048 * 2048)


@pytest.mark.parametrize(
    ("depth_size", "given", "advice", "rule"),
    [
        ((1000, 500), {}, {"width": 1024, "height": 512}, "multiple of 32"),
        ((1024, 500), {}, {"width": 1056, "height": 512}, "multiple of 32"),
        ((20, 40), {}, {"width": 64, "height": 128}, "at least 64"),
        ((20000, 384), {}, {"width": 13344, "height": 256}, "at most 16384"),
        ((20000, 64), {}, {"width": 16384}, "at most 16384"),
        ((1000, 500), {"height": 500}, {"width": 1024, "height": 512}, "multiple of 32"),
        ((1000, 500), {"width": 1000}, {"width": 1024, "height": 512}, "multiple of 32"),
        ((1024, 512), {"width": 1000}, {"width": 1024, "height": 512}, "multiple of 32"),
        ((1024, 512), {"width": 1000, "height": 512}, {"width": 992}, "multiple of 32"),
        ((1024, 512), {"width": 8192}, {"width": 2880, "height": 1440}, "4194304 pixels"),
        ((8192, 4096), {}, {"width": 2880, "height": 1440}, "4194304 pixels"),
        ((100000, 50), {}, {"width": 16384, "height": 64}, "at most 16384"),
    ],
)
def test_a_depth_image_of_no_legal_size_needs_one_to_be_given(depth_size, given, advice, rule):
    inputs = {"mode": "sdxl-360", "depth_image": DEPTH, **given}
    with pytest.raises(ValueError) as error:
        resolve(BOUNDED, depth_size, **inputs)
    found, _, rest = str(error.value).partition(": must ")
    assert rule in rest
    from_depth = set(re.findall(r"(width|height)=\d+ [^=]*depth_image", found))
    assert from_depth == set(advice) - set(given)
    assert ("depth_image" in str(error.value)) == bool(from_depth)
    tried = re.findall(r"(width|height)=(\d+)", str(error.value).rpartition("; try ")[2])
    assert {name: int(side) for name, side in tried} == advice
    resolved = resolve(BOUNDED, depth_size, **inputs | advice)
    assert resolved.width * resolved.height <= BOUNDED.largest


@pytest.mark.parametrize("height", range(60, 1450, 7))
def test_advice_for_a_whole_360_is_a_whole_360(height):
    inputs = {"mode": "sdxl-360", "depth_image": DEPTH}
    try:
        resolved = resolve(BOUNDED, (2 * height, height), **inputs)
        assert height % 32 == 0
    except ValueError as error:
        tried = re.findall(r"(width|height)=(\d+)", str(error).rpartition("; try ")[2])
        advice = {name: int(side) for name, side in tried}
        resolved = resolve(BOUNDED, (2 * height, height), **inputs, **advice)
    assert resolved.width == 2 * resolved.height
    assert abs(resolved.height - height) <= 16 or resolved.height in (64, 1440)


@pytest.mark.parametrize(
    ("width", "height", "advice"),
    [
        (8192, 4096, {"width": 2880, "height": 1440}),
        (1024, 16384, {"width": 512, "height": 8192}),
        (2048, 2048, {}),
    ],
)
def test_an_image_of_too_many_pixels_is_refused(width, height, advice):
    inputs = {"mode": "sdxl-360", "width": width, "height": height}
    if advice:
        with pytest.raises(ValueError, match="4194304 pixels") as error:
            resolve(BOUNDED, **inputs)
        assert str(error.value).endswith(" and ".join(f"{k}={v}" for k, v in advice.items()))
    assert resolve(BOUNDED, **inputs | advice)


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_a_negative_prompt_that_nothing_reads_is_refused(mode):
    settings, inputs = SETTINGS[mode], {"mode": mode, "negative_prompt": "fog"}
    for guidance_scale in (0.5, 1.5):
        resolved = resolve(settings, **inputs, guidance_scale=guidance_scale)
        assert (resolved.negative_prompt, resolved.guidance_scale) == ("fog", guidance_scale)
    name, rule, legal = refusal(lambda: resolve(settings, **inputs, guidance_scale=1))
    assert (name, legal) == ("negative_prompt", "")
    assert "guidance_scale=1" in rule


def test_each_mode_has_a_default_speed():
    exact = resolve()
    assert (exact.speed, exact.num_inference_steps, exact.scheduler) == ("exact", 50, None)
    fast = resolve(XL, mode="syncdiffusion-xl")
    assert (fast.speed, fast.num_inference_steps, fast.scheduler) == ("fast", 20, "dpm++")
    assert resolve(speed="fast", seed=1).num_inference_steps == 20
    sphere = resolve(SPHERE, mode="sdxl-360")
    assert (sphere.speed, sphere.num_inference_steps, sphere.scheduler) == (None, 50, None)


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_steps_and_scheduler_may_be_given_in_every_mode(mode):
    asked = resolve(SETTINGS[mode], mode=mode, num_inference_steps=9, scheduler="euler")
    assert (asked.num_inference_steps, asked.scheduler) == (9, "euler")


def test_a_speed_that_places_its_windows_takes_no_stride():
    assert resolve(speed="fast", stride=16).stride == 16  # the default, which clients may send
    name, rule, legal = refusal(lambda: resolve(speed="fast", stride=8))
    assert (name, legal) == ("stride", 16)
    assert "speed='fast'" in rule
    with pytest.raises(ValueError, match="speed='fast'"):
        resolve(XL, mode="syncdiffusion-xl", stride=8)
    small = dataclasses.replace(SD2, window=12)
    assert resolve(small, speed="fast", loop_closure=True).stride == 16


def test_inputs_make_the_request_again():
    request = resolve(speed="fast", loop_closure=True)
    assert Request(**request.inputs()).resolve(SD2) == request
    sphere = resolve(SPHERE, mode="sdxl-360")
    assert set(INPUTS) - set(sphere.mode_inputs()) == {
        name for name, modes in OWN.items() if "sdxl-360" not in modes
    }


# Enlarging, and starting from an image


def test_strength_is_that_of_what_it_is_needed_for():
    sphere = {"settings": SPHERE, "mode": "sdxl-360"}
    assert resolve(**sphere).strength is None
    assert resolve(**sphere, upscale=2).strength == 0.35
    assert resolve(**sphere, image=Path("a.png")).strength == 0.6
    assert resolve(**sphere, image=Path("a.png"), upscale=2).strength == 0.35
    assert resolve(**sphere, upscale=2, strength=0.0).strength == 0.0


def test_strength_means_nothing_without_an_image_or_a_factor():
    field, rule, legal = refusal(lambda: Request(prompt="sea", strength=0.5))
    assert (field, legal) == ("strength", None)
    assert "image or upscale" in rule


@pytest.mark.parametrize("value", [0, 3, 16, 2.5, "2", True])
def test_only_the_factors_that_there_are_enlarge(value):
    field, _, legal = refusal(lambda: Request(prompt="sea", mode="sdxl-360", upscale=value))
    assert (field, legal) == ("upscale", 1)


@pytest.mark.parametrize(("width", "legal"), [(4096, 4), (8192, 2), (16384, 1)])
def test_an_enlarged_side_is_no_longer_than_a_side_may_be(width, legal):
    inputs = {"mode": "sdxl-360", "width": width, "height": 64, "upscale": 8}
    field, rule, found = refusal(lambda: resolve(SPHERE, **inputs))
    assert (field, found) == ("upscale", legal)
    assert "16384" in rule
    assert resolve(SPHERE, **inputs | {"upscale": legal}).width == width


def test_a_webp_has_room_for_the_enlarged_panorama():
    inputs = {"mode": "sdxl-360", "width": 8192, "height": 64, "output_format": "webp"}
    assert resolve(SPHERE, **inputs).width == 8192
    field, _, legal = refusal(lambda: resolve(SPHERE, **inputs, upscale=2))
    assert (field, legal) == ("output_format", "png")


def test_an_error_of_a_size_names_the_image_that_it_is_from():
    request = Request(prompt="sea", mode="sdxl-360", image=Path("a.png"), depth_image=DEPTH)
    resolved = request.resolve(SPHERE, (640, 320))
    assert (resolved.width, resolved.height) == (640, 320)
    with pytest.raises(ValueError, match=r"width=650 \(from image\)"):
        request.resolve(SPHERE, (650, 320))
