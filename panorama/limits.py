"""The limits of a family's training, and requests beyond them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from panorama.errors import shorten
from panorama.request import ResolvedRequest


@dataclass(frozen=True)
class Limits:
    """The limits of a family's training. Images beyond them are still made, but poor."""

    card: str  # the document that describes them
    words: Sequence[str]  # of prompts, in lower case
    height: int  # of the images it was trained on, pixels

    def exceeded(self, request: ResolvedRequest) -> list[str]:
        """Return a sentence for each limit that a request exceeds."""
        found = []
        prompts = " ".join((*request.parts, request.negative_prompt, *request.poles))
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", re.sub(r"<\w+>", " ", prompts.lower())))
        if unknown := [word for word in words if word not in self.words]:
            found.append(f"this family has not learned the words {shorten(', '.join(unknown))}")
        if request.height > self.height and len(request.parts) == 1:
            found.append(
                f"height={request.height}: this family was trained on images {self.height} pixels "
                "high; in a higher one, a single prompt gives a repeated scene or a mere texture"
            )
        return found
