import ast
import dataclasses
import re
from math import ceil, inf
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from panorama.request import (
    EVERY_MODE,
    INPUTS,
    WINDOW_MODES,
    Input,
    ModeSettings,
    Request,
    SpeedSettings,
)
from panorama.sampling.canvas import Canvas
from panorama.sampling.views import sliding_views

ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.lists(st.integers(), max_size=3)
    | st.sampled_from([10**400, {"a": 1}, b"bytes"])
)
SPEEDS = {"exact": SpeedSettings(50), "fast": SpeedSettings(20, "dpm++", takes_stride=False)}

SPHERE = ModeSettings(
    width=1024,
    height=512,
    guidance_scale=7.5,
    multiple=32,
    smallest=32,
    largest=2048 * 2048,
    speeds=SPEEDS,
)
SIDES = st.integers(1, 20000)

words = st.text(st.characters(codec="utf-8", exclude_characters="\\|")).filter(str.strip)
prompts = words | st.lists(words, min_size=1, max_size=6).map(r"\|".join)
parts = prompts | st.lists(prompts, min_size=1, max_size=40).map(" | ".join)


def legal(rule: Input) -> st.SearchStrategy:
    """Values in the range that the table gives."""
    bounds = {"min_value": rule.minimum, "max_value": min(rule.maximum, 10**6)}
    if rule.kind is Path:
        return st.none()
    if rule.choices:
        return st.sampled_from(rule.choices)
    strategy = {
        bool: st.booleans,
        int: lambda: st.integers(**bounds),
        float: lambda: st.floats(**bounds),
        str: lambda: prompts,
    }[rule.kind]()
    return st.none() | strategy if rule.optional else strategy


def requests_of(mode: str) -> st.SearchStrategy:
    """Return requests with legal values for the inputs that belong to a mode and need no file."""
    rules = {name: rule for name, rule in INPUTS.items() if mode in rule.modes}
    own = {name: legal(rule) for name, rule in rules.items() if not rule.needs}
    own |= {"prompt": parts if mode in WINDOW_MODES else prompts, "mode": st.just(mode)}
    if "stride" in own:  # most others are refused
        own["stride"] = st.integers(8, 160)
    exact = st.fixed_dictionaries(own | {"output_quality": st.just(95)})
    lossy = st.fixed_dictionaries(own | {"output_format": st.sampled_from(["jpg", "webp"])})
    return (exact | lossy).map(lambda own: Request(**own))


requests = st.sampled_from(EVERY_MODE).flatmap(requests_of)


@st.composite
def families(draw):
    multiple = draw(st.sampled_from([4, 8, 16]))
    window = draw(st.integers(16, 128))
    sides = st.integers(window, 1024).map(lambda cells: cells * multiple)
    width, height = draw(sides), draw(sides)
    return ModeSettings(
        width=width,
        height=height,
        guidance_scale=draw(st.floats(0, 20)),
        multiple=multiple,
        smallest=window * multiple,
        # A family's own size is legal.
        largest=draw(st.just(inf) | st.integers(width * height, 2 * 10**9)),
        window=draw(st.sampled_from([0, window])),
        has_lora=draw(st.booleans()),
        tokens=draw(st.sampled_from([(), ("<s0>", "<s1>")])),
        speed=draw(st.sampled_from(list(SPEEDS))),
        speeds=SPEEDS,
    )


def advice(error: ValueError) -> dict[str, Any]:
    """Return the inputs that a message names, with the values that it suggests."""
    message = str(error)
    rule, _, suggested = message.rpartition("; ")
    names = re.match(r"(\w+)=.*?(?: and (\w+)=\d+)?: must ", rule, re.DOTALL)
    assert names, message
    if suggested == "leave it out":
        return {names[1]: None}
    value = suggested.removeprefix("try ")
    if sizes := re.findall(r"(width|height)=(\d+)", value):
        return {name: int(side) for name, side in sizes}
    return {names[1]: ast.literal_eval(value)}


def follow_advice(inputs: dict[str, Any], settings: ModeSettings) -> Request:
    """Do as each error says; more errors than inputs with rules mean that one advised badly."""
    for _ in range(2 * len(INPUTS)):
        try:
            return Request(**inputs).resolve(settings)
        except ValueError as error:
            inputs = inputs | advice(error)
    raise AssertionError(f"no advice made {inputs} legal")


@given(requests)
def test_the_table_accepts_what_it_describes(request):
    assert Request(**request.inputs()) == request


@given(
    st.fixed_dictionaries({name: ANYTHING for name in INPUTS} | {"prompt": ANYTHING | parts}),
    families(),
)
def test_any_value_is_accepted_or_refused_with_advice_that_helps(inputs, settings):
    resolved = follow_advice(inputs, settings)
    assert resolved.resolve(settings) == resolved


@given(requests, families())
def test_given_inputs_are_kept_and_nothing_stays_open(request, settings):
    try:
        resolved = request.resolve(settings)
    except ValueError as error:
        assert set(advice(error)) <= {
            *("prompt", "width", "height", "negative_prompt", "stride", "lora_scale"),
            *("output_format", "upscale"),
        }
        return
    still_open = {name for name, value in resolved.inputs().items() if value is None}
    unused = {"depth_image", "image", "lora", "zenith_prompt", "nadir_prompt"}
    assert still_open <= unused | {"scheduler", "speed", "sync_threshold", "strength"}
    assert ("strength" in still_open) == (request.upscale == 1)
    windowed = request.mode in INPUTS["speed"].modes
    assert not (windowed and still_open & {"speed", "sync_threshold"})
    given_inputs = {name: value for name, value in request.inputs().items() if value is not None}
    if not settings.has_lora and request.lora is None:  # a scale at its default becomes 0
        given_inputs["lora_scale"] = resolved.lora_scale
    assert resolved.inputs() | given_inputs == resolved.inputs()
    for side in (resolved.width, resolved.height):
        assert side % settings.multiple == 0
        assert side >= settings.smallest
    assert resolved.width * resolved.height <= settings.largest


@given(
    st.tuples(SIDES, SIDES),
    st.fixed_dictionaries(
        {}, optional={side: st.integers(64, 16384) for side in ("width", "height")}
    ),
    families(),
    st.sampled_from([8, 32, 48, 64]),
)
@example((2929, 1425), {}, SPHERE, 32)
@example((16384, 65), {}, SPHERE, 32)
@example((20000, 1), {"width": 64}, SPHERE, 32)
@example((1, 16384), {}, SPHERE, 8)
def test_the_size_that_an_error_suggests_is_legal(depth_size, given, settings, multiple):
    smallest = ceil(settings.smallest / multiple) * multiple
    largest = max(settings.largest, smallest**2, 64**2)
    settings = dataclasses.replace(
        settings, multiple=multiple, smallest=smallest, largest=largest, window=0
    )
    request = Request(prompt="sea", mode="sdxl-360", **given)
    try:
        resolved = request.resolve(settings, depth_size)
        assert {name: getattr(resolved, name) for name in given} == given
    except ValueError as error:
        resolved = dataclasses.replace(request, **advice(error)).resolve(settings, depth_size)
        for side in (resolved.width, resolved.height):
            assert side % multiple == 0 and side >= smallest
        assert resolved.width * resolved.height <= largest


@given(requests_of("syncdiffusion"), families())
def test_every_joint_of_an_accepted_ring_lies_inside_a_window(request, settings):
    window = settings.smallest // settings.multiple
    settings = dataclasses.replace(settings, window=window)
    left_out = dict.fromkeys(("width", "height", "guidance_scale"))
    ring = left_out | {
        "prompt": "sea",
        "loop_closure": True,
        "negative_prompt": "",
        "speed": "exact",
    }
    request = Request(**request.inputs() | ring)
    try:
        resolved = request.resolve(settings)
    except ValueError:
        assert request.stride >= window
        return
    height, width = (side // settings.multiple for side in (resolved.height, resolved.width))
    closed = resolved.closed_axis
    views = sliding_views(Canvas(height, width, closed), window, resolved.stride)
    length, starts = (
        (width, {view.left for view in views})
        if closed == "x"
        else (height, {view.top for view in views})
    )
    joints = {start + end for start in starts for end in (0, window)}
    for joint in joints:
        assert any(0 < (joint - start) % length < window for start in starts)
