"""The optional safety checker: a picture that it flags is withheld."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL.Image import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from panorama.views import crop, make_views

FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


class PictureWithheldError(RuntimeError):
    """The safety checker flagged a picture, so nobody gets it."""


@dataclass(frozen=True)
class SafetyChecker:
    """Compares pictures with concepts that must not be shown, by what CLIP sees in them.

    Source: "Red-Teaming the Stable Diffusion Safety Filter" (arXiv 2210.04610), figure 1.

    Attributes:
        model: StableDiffusionSafetyChecker, with the concepts and their thresholds.
        processor: CLIPImageProcessor, which makes CLIP's input of a square.
    """

    model: Any
    processor: Any

    @property
    def name(self) -> str:
        """Of the model's class."""
        return type(self.model).__name__

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype) -> "SafetyChecker":
        """Reads a checker that is whole: transformers would fill up what is missing at random.

        Args:
            folder: with config.json, model.safetensors and preprocessor_config.json.
            dtype: of the weights.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a weight is missing.
        """
        for name in FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: it must have {', '.join(FILES)}")
        model, info = StableDiffusionSafetyChecker.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        if missing := info["missing_keys"]:
            raise ValueError(f"{folder / FILES[1]} has no weight {min(missing)}: it must have all")
        return cls(model, CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True))

    def check(self, image: Image, ring: Literal["x", "y"] | None) -> None:
        """Looks at all of a picture.

        Args:
            image: an RGB picture.
            ring: the axis along which it closes, if it does.

        Raises:
            PictureWithheldError: some part of it is flagged.
        """
        if any(self.flags(square) for square in squares(image, ring)):
            raise PictureWithheldError(
                f"the picture was withheld: the safety checker {self.name} flagged it; "
                "another seed or prompt may pass"
            )

    def flags(self, square: Tensor) -> bool:
        """Whether a part of a picture (3, s, s), 0 to 255, must not be shown."""
        pixels = self.processor(square, return_tensors="pt").pixel_values  # (1, 3, 224, 224)
        pixels = pixels.to(self.model.device, self.model.dtype)
        _, (flagged,) = self.model(clip_input=pixels, images=pixels)  # blackens the pixels: ours
        return bool(flagged)


def squares(image: Image, ring: Literal["x", "y"] | None) -> Iterator[Tensor]:
    """Squares (3, s, s), 0 to 255, as high or wide as the picture's shorter side.

    CLIP sees a square alone, so they cover the picture, around a ring too. Each overlaps the next
    by half at least, or what lies where two meet would be seen by neither as a whole.
    """
    canvas = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    height, width = canvas.shape[-2:]
    side = min(height, width)
    views = make_views(height, width, side, side // 2, ring_x=ring == "x", ring_y=ring == "y")
    return (crop(canvas, [view])[0] for view in views)
