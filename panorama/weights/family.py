"""family.toml: the modes of a family with their defaults, what it has learned, what is usual."""

import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from panorama.errors import shorten
from panorama.request import EVERY_MODE, INPUTS, WINDOW_MODES

LIMITS = "limits"  # the section of what it has learned
USUAL = "intra_lpips"  # the section of usual ranges by mode, see `panorama.quality`
DEFAULTS = ("width", "height", "guidance_scale")  # the keys of a mode: inputs
LEARNED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "card": ("text", lambda value: isinstance(value, str)),
    "height": ("an integer of at least 1", lambda value: type(value) is int and value >= 1),
    "words": (
        "a list of texts in lower case",
        lambda value: (
            isinstance(value, list)
            and all(isinstance(word, str) and word == word.lower() for word in value)
        ),
    ),
}
"""The keys of `LIMITS`: what each must be, and a function that says whether it is."""
Section = tuple[Callable[[str, object], object], Iterable[str], Iterable[str]]
"""A section: a function that checks a key and its value, the legal keys, and the required ones."""


def read_family(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """Read the sections of a family.toml.

    Raises:
        ValueError: a section or a key is unknown, missing or not legal; the message names it.
    """
    try:
        sections = tomllib.loads(path.read_text())
        check_names("section", sections, (*EVERY_MODE, *OTHERS))
        if not set(EVERY_MODE) & set(sections):
            raise ValueError(f"must have a section of a mode: {', '.join(EVERY_MODE)}")
        return {name: read_section(name, table) for name, table in sections.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_section(name: str, table: Any) -> Mapping[str, Any]:
    """Check a section, and return its values in their own types, such as 7.0 for 7."""
    if not isinstance(table, dict):
        raise ValueError(f"{name}={shorten(table)}: must be a section, [{name}]")
    check, legal, required = OTHERS.get(name, (check_default, DEFAULTS, DEFAULTS))
    try:
        check_names("key", table, legal)
        if lacking := [key for key in required if key not in table]:
            raise ValueError(f"must have the key {lacking[0]}")
        return {key: check(key, value) for key, value in table.items()}
    except ValueError as error:
        raise ValueError(f"[{name}] {error}") from error


def check_names(kind: str, found: Iterable[str], legal: Iterable[str]) -> None:
    """Raise ValueError for a name that is not legal."""
    if unknown := [name for name in found if name not in legal]:
        names = ", ".join(legal)
        raise ValueError(f"must not have the {kind} {shorten(unknown[0])}, only {names}")


def check_default(key: str, value: object) -> object:
    """Return the default of an input in the input's own type."""
    return INPUTS[key].check(value)


def check_limit(key: str, value: object) -> object:
    """Return a value of `LIMITS`; ValueError if it is not legal."""
    rule, holds = LEARNED[key]
    if not holds(value):
        raise ValueError(f"{key}={shorten(value)}: must be {rule}")
    return value


def check_range(key: str, value: object) -> object:
    """Return a range, such as (0.1, 0.2) for [0.1, 0.2]; ValueError if it is not legal."""
    pair = value if isinstance(value, list) and len(value) == 2 else [-1, -1]
    low, high = (number if type(number) in (int, float) else -1 for number in pair)
    if not 0 <= low <= high <= 100:  # false for NaN
        rule = "two numbers from 0 to 100, the smaller first"
        raise ValueError(f"{key}={shorten(value)}: must be {rule}; try [0.1, 0.2]")
    return low, high


OTHERS: Mapping[str, Section] = {
    LIMITS: (check_limit, LEARNED, LEARNED),
    USUAL: (check_range, WINDOW_MODES, ()),
}
"""The sections that describe no mode. Each may be left out."""
