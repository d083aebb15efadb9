"""The edge of a process: the models that its environment asks for, and its printed log."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from panorama import weights
from panorama.errors import shorten

if TYPE_CHECKING:
    from panorama.modes import Models


def family_name() -> str:
    """Return the family that PANORAMA_FAMILY names, or else the tiny one."""
    from panorama.modes import DEFAULT_FAMILY  # imports torch, which takes seconds

    return os.environ.get("PANORAMA_FAMILY") or DEFAULT_FAMILY


def mode_names(family: str) -> tuple[str, ...]:
    """Return the modes that PANORAMA_MODES names, or else all that a family offers."""
    offered = tuple(weights.describe(family))
    names = (name.strip() for name in os.environ.get("PANORAMA_MODES", "").split(","))
    chosen = tuple(dict.fromkeys(name for name in names if name))
    if lacking := [mode for mode in chosen if mode not in offered]:
        raise ValueError(
            f"PANORAMA_MODES={shorten(lacking[0])}: must be one of {', '.join(offered)}, which the "
            f"family {family} offers; try {offered[0]}"
        )
    return chosen or offered


def max_cost() -> float | None:
    """Return the bound of PANORAMA_MAX_COST on the cost of a request, None for the device's own."""
    from panorama.cost import LEAST_BOUND, MAX_COST

    text = os.environ.get("PANORAMA_MAX_COST")
    if not text:
        return None
    # Python reads no integer of thousands of digits.
    if not text.isdecimal() or len(text) > 18 or int(text) < LEAST_BOUND:
        raise ValueError(
            f"PANORAMA_MAX_COST={shorten(text)}: must be an integer, at least {LEAST_BOUND}; "
            f"try {MAX_COST['cuda']}"
        )
    return int(text)


def load_models() -> "Models":
    """Fetch missing weights, load the chosen modes, and print their safety checker."""
    hide_progress_bars()
    from panorama.modes import load

    family, bound = family_name(), max_cost()
    modes = mode_names(family)
    with _printed_log():
        weights.ensure_weights(family, modes)
        models = load(family, modes=modes, max_cost=bound)
    print(f"safety checker: {models.checker.name if models.checker else 'none'}", flush=True)
    return models


def hide_progress_bars() -> None:
    """Hide the progress bars that diffusers and transformers draw while they load files."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def _printed_log() -> Iterator[None]:
    """Print this package's log messages, since Cog keeps the output of setup."""
    logger, handler = logging.getLogger("panorama"), logging.StreamHandler(sys.stdout)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
