"""A component for every input, built from the table of inputs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from math import inf
from pathlib import Path
from typing import Any

import gradio as gr

from panorama.request import INPUTS, Input

COMMON = (
    ("mode",),
    ("prompt",),
    ("width", "height"),
    ("speed", "loop_closure"),
    ("seed", "depth_image"),
)
"""The inputs in sight, by rows of the page. The others are in the accordion."""
COMPONENTS: Mapping[type, type[gr.components.Component]] = {
    str: gr.Textbox,
    bool: gr.Checkbox,
    int: gr.Textbox,  # a number component would show 0 for no value
    float: gr.Textbox,
    Path: gr.File,  # an image component would reduce a depth image to 8 bits
}
"""The component of an input without choices and without a range that a slider could show."""
BY_DEFAULT = ("by default", "")
"""The choice of a dropdown that leaves an optional input out."""


@dataclass(frozen=True)
class Field:
    """An input on the page."""

    rule: Input
    box: gr.Column  # around the others; hidden in modes without the input
    component: gr.components.Component
    note: gr.HTML  # an error that names the input, or nothing


def build_field(rule: Input, mode: str, choices: Sequence[Any]) -> Field:
    """Build the field of an input, for a page that starts in a mode."""
    box = gr.Column(
        elem_id=f"input-{rule.name}",
        elem_classes="field",
        visible=mode in rule.modes,
        min_width=150,
    )
    with box:
        component = build_component(rule, mode if rule.name == "mode" else rule.default, choices)
        gr.HTML(describe(rule), elem_id=f"about-{rule.name}", elem_classes="description")
        return Field(rule, box, component, gr.HTML(visible=False, elem_classes="problem"))


def build_component(rule: Input, default: Any, choices: Sequence[Any]) -> gr.components.Component:
    """Build the component of an input. One without a value leaves the input out."""
    options: dict[str, Any] = {"label": rule.name}
    if not rule.required:
        options["value"] = default
    if choices:
        if rule.optional:
            choices, options["value"] = (BY_DEFAULT, *choices), BY_DEFAULT[1]
        return gr.Dropdown(choices, **options)
    if rule.kind in (int, float) and rule.maximum < inf and not rule.optional:
        step = 1 if rule.kind is int else 0.01
        return gr.Slider(rule.minimum, rule.maximum, step=step, **options)
    component = COMPONENTS[rule.kind]
    if component is gr.File:
        options["height"] = 120
    elif component is gr.Textbox and rule.optional:
        options["placeholder"] = BY_DEFAULT[0]
    return component(**options)


def describe(rule: Input) -> str:
    """Return HTML of an input's range and description, folded after its first sentence."""
    first, stop, rest = rule.description.partition(". ")
    if rule.minimum > -inf:
        upper = f"{rule.minimum} to {rule.maximum}"
        first = f"{upper if rule.maximum < inf else f'From {rule.minimum}'}. {first}"
    if not rest:
        return escape(first)
    return f"<details><summary>{escape(first)}{stop}</summary>{escape(rest)}</details>"


def read_inputs(fields: Iterable[Field], values: Mapping[Any, Any], mode: str) -> dict[str, Any]:
    """Return the inputs that a form gives to a mode, without those left empty."""
    inputs = {}
    for field in fields:
        rule, value = field.rule, values[field.component]
        if mode in rule.modes and (rule.required or value not in (None, "")):
            inputs[rule.name] = parse(rule, value)
    return inputs


def parse(rule: Input, value: Any) -> Any:
    """Return a component's value as the input's type, or as it is, for `Request` to refuse."""
    if rule.kind is Path:
        return Path(value)
    if rule.kind in (int, float) and isinstance(value, str):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value)
    return value


def named_inputs(message: str) -> list[str]:
    """Return the inputs that an error names, such as width in "width=8: must be ..."."""
    head = message.partition(": must ")[0]
    names = re.findall(r"(?:^| and |, )(\w+)=", head)
    if re.match(r"\w+=['\"]", head):  # the rest may be a part of the text
        names = names[:1]
    return [name for name in names if name in INPUTS]
