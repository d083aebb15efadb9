"""Errors and the words that they share."""

from argparse import ArgumentParser
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 80  # characters of a value that an error repeats
LONGEST_TEXT = 10_000  # characters of a text that is read at all


class NotFiniteError(RuntimeError):
    """A result holds NaN or infinity, so there is no image to return."""


class Parser(ArgumentParser):
    """A parser of a command line that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message to stderr and exit with 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def require_finite(tensor: "Tensor", what: str) -> None:
    """Raise NotFiniteError, naming what is not finite, if any element is NaN or infinite."""
    if not tensor.isfinite().all():
        raise not_finite(what)


def not_finite(what: str) -> NotFiniteError:
    """Build the error for something, such as "the latents are", that is not finite."""
    return NotFiniteError(
        f"{what} not finite: a weight may hold NaN, or half precision may have overflowed"
    )


def check_least(owner: object, **minimums: float) -> None:
    """Raise ValueError if an attribute is below its minimum, or NaN."""
    for name, minimum in minimums.items():
        value = getattr(owner, name)
        if not value >= minimum:  # false for NaN
            raise ValueError(f"{name}={value}: must be at least {minimum}; try {minimum}")


def shorten(value: object) -> str:
    """Return the repr of a value, cut to `LONGEST` characters."""
    text = repr(value[: 2 * LONGEST] if isinstance(value, str | bytes) else value)
    if len(text) <= LONGEST:
        return text
    size = f" ({len(value)} characters)" if isinstance(value, str | bytes) else ""
    return f"{text[:LONGEST]}...{size}"
