import ast
import re
from math import inf
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from panorama.request import INPUTS, NEEDS, OWN_INPUTS, SPEEDS, Input, ModeSettings, Request
from panorama.views import ring_starts

ANYTHING = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([10**400])
)


def legal(rule: Input) -> st.SearchStrategy:
    """Values in the range that the table gives."""
    bounds = {"min_value": rule.minimum, "max_value": min(rule.maximum, 10**6)}
    if rule.kind is Path:
        return st.none()
    strategy = {
        bool: st.booleans,
        int: lambda: st.integers(**bounds),
        float: lambda: st.floats(**bounds),
        str: lambda: st.sampled_from(rule.choices) if rule.choices else prompts,
    }[rule.kind]()
    return st.none() | strategy if rule.optional else strategy


prompts = st.text(st.characters(codec="utf-8")).filter(str.strip)


def requests_of(mode: str) -> st.SearchStrategy:
    """Requests with any legal value for each input that belongs to a mode and needs no file."""
    rules = {name: rule for name, rule in INPUTS.items() if mode in rule.modes}
    own = {name: legal(rule) for name, rule in rules.items() if name not in NEEDS}
    return st.fixed_dictionaries(own | {"mode": st.just(mode)}).map(without_idle_stride)


def without_idle_stride(inputs: dict[str, object]) -> Request:
    """A request with these inputs, but for a stride where windows do not overlap."""
    idle = SPEEDS[inputs.get("speed", "exact")].disjoint
    return Request(**inputs | ({"stride": INPUTS["stride"].default} if idle else {}))


requests = st.sampled_from(list(OWN_INPUTS)).flatmap(requests_of)


@st.composite
def families(draw):
    multiple = draw(st.sampled_from([4, 8, 16]))
    window = draw(st.integers(16, 128))
    sides = st.integers(window, 1024).map(lambda cells: cells * multiple)
    width, height = draw(sides), draw(sides)
    least = max(window * multiple * 16384, width * height)  # a family's own size is legal
    return ModeSettings(
        width=width,
        height=height,
        guidance_scale=draw(st.floats(1, 20)),
        least_guidance=draw(st.sampled_from([0.0, 1.0])),
        multiple=multiple,
        smallest=window * multiple,
        largest=draw(st.just(inf) | st.integers(least, 2 * 10**9)),
        window=window,
        tokens=draw(st.sampled_from([(), ("<s0>", "<s1>")])),
    )


FAMILY_RULES = ("width", "height", "guidance_scale", "negative_prompt", "stride", "lora_scale")


def advice(error: ValueError) -> tuple[str, object]:
    """The input that a message names, and the value of which it says that it would do."""
    message = str(error)
    name = message.partition("=")[0]
    assert f": {name} must " in message
    value = re.search(r"; (.*) would do$", message, re.DOTALL)[1]
    return name, ast.literal_eval(value)


def follow_advice(inputs: dict[str, object], settings: ModeSettings) -> Request:
    """Does as each error says; more errors than inputs with rules mean that one advised badly."""
    for _ in range(2 * len(INPUTS)):
        try:
            return Request(**inputs).resolve(settings)
        except ValueError as error:
            name, value = advice(error)
            inputs = inputs | {name: value}
    raise AssertionError(f"no advice made {inputs} legal")


@given(requests)
def test_the_table_accepts_what_it_describes(request):
    assert Request(**request.inputs()) == request


@given(st.fixed_dictionaries({name: ANYTHING for name in INPUTS}), families())
def test_any_value_is_accepted_or_refused_with_advice_that_helps(inputs, settings):
    resolved = follow_advice(inputs, settings)
    assert resolved.resolve(settings) == resolved


@given(requests, families())
def test_what_is_given_is_kept_and_nothing_stays_open(request, settings):
    try:
        resolved = request.resolve(settings)
    except ValueError as error:
        assert advice(error)[0] in FAMILY_RULES
        return
    still_open = {name for name, value in resolved.inputs().items() if value is None}
    assert still_open <= {"depth_image", "scheduler"}  # none, and the model's own
    given_inputs = {name: value for name, value in request.inputs().items() if value is not None}
    if not settings.tokens:  # there is no LoRA: a scale at its default becomes 0
        given_inputs["lora_scale"] = resolved.lora_scale
    assert resolved.inputs() | given_inputs == resolved.inputs()
    for size in (resolved.width, resolved.height):
        assert size % settings.multiple == 0
        assert size >= settings.smallest
    assert resolved.width * resolved.height <= settings.largest


@given(requests_of("syncdiffusion"), families())
def test_every_joint_of_a_ring_that_is_accepted_lies_inside_a_window(request, settings):
    left_out = dict.fromkeys(("width", "height", "guidance_scale"))
    ring = left_out | {"loop_closure": True, "negative_prompt": "", "speed": "exact"}
    request = Request(**request.inputs() | ring)
    try:
        resolved = request.resolve(settings)
    except ValueError:
        assert request.stride >= settings.window
        return
    length = max(resolved.width, resolved.height) // settings.multiple
    starts = ring_starts(length, settings.window, resolved.stride)
    joints = {start + end for start in starts for end in (0, settings.window)}
    for joint in joints:
        assert any(0 < (joint - start) % length < settings.window for start in starts)
