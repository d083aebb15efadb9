"""Goals of measured values."""

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Goal:
    """The range that a value must lie in."""

    least: float = -inf
    most: float = inf

    def __str__(self) -> str:
        return f"at least {self.least:g}" if self.least > -inf else f"at most {self.most:g}"

    def met(self, value: float) -> bool:
        """Return True if a value lies in the range."""
        return self.least <= value <= self.most
