"""The optional safety checker, which withholds images that it flags."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL.Image import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from panorama.sampling.canvas import Axis, View, crop
from panorama.sampling.views import half_overlapping_starts

# diffusers warns that it returns a black image; this checker raises instead.
logging.getLogger("diffusers.pipelines.stable_diffusion.safety_checker").addFilter(
    lambda record: "black image" not in record.getMessage()
)

FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


class ImageWithheldError(RuntimeError):
    """The safety checker flagged an image."""


@dataclass(frozen=True)
class SafetyChecker:
    """Compare the CLIP embedding of an image with concepts that must not be shown.

    Source: "Red-Teaming the Stable Diffusion Safety Filter" (arXiv 2210.04610), figure 1.
    """

    model: Any  # a StableDiffusionSafetyChecker: the concepts and their thresholds
    processor: Any  # the CLIPImageProcessor that turns a square into CLIP's input

    @property
    def name(self) -> str:
        """The name of the model's class."""
        return type(self.model).__name__

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype) -> "SafetyChecker":
        """Load a checker from a folder that holds `FILES`, with weights in `dtype`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a weight is missing.
        """
        for name in FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder}: has no {name}; add {', '.join(FILES)}")
        model, info = StableDiffusionSafetyChecker.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        # transformers would replace missing weights by random ones.
        if missing := info["missing_keys"]:
            raise ValueError(f"{folder / FILES[1]}: has no weight {min(missing)}")
        return cls(model, CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True))

    def check(self, image: Image, closed: Axis) -> None:
        """Raise ImageWithheldError if any part of an RGB image is flagged."""
        for square in squares(image, closed):
            pixels = self.processor(square, return_tensors="pt").pixel_values  # (1, 3, 224, 224)
            pixels = pixels.to(self.model.device, self.model.dtype)
            # The model blackens the images that it flags: give it our copy of the pixels.
            _, (flagged,) = self.model(clip_input=pixels, images=pixels)
            if flagged:
                raise ImageWithheldError(
                    f"the image was withheld: the safety checker {self.name} flagged it; "
                    "try another seed or prompt"
                )


def squares(image: Image, closed: Axis) -> Iterator[Tensor]:
    """Cut squares (3, s, s), 0 to 255, that cover an image, with its shorter side s.

    CLIP sees only squares. Each overlaps the next by at least half, around a ring too: otherwise
    no square would show the whole of what lies between two of them.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    height, width = pixels.shape[-2:]
    side = min(height, width)
    tops = half_overlapping_starts(height, side, closed == "y")
    lefts = half_overlapping_starts(width, side, closed == "x")
    views = (View(top, left, side, side) for top in tops for left in lefts)
    return (crop(pixels, [view], closed)[0] for view in views)
