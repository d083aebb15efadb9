"""The memory of enlarging a 360 image at the sizes of SDXL base 1.0, on torch's fake tensors."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.activations import Activations, weights_of
from panorama.base_model import BaseModel
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.denoiser import Conditioning
from panorama.sampling.views import Feathered

PUBLISHED = Path(__file__).parents[1] / "data" / "sdxl"
TOKENS, POOLED = 77, 1280


@contextmanager
def half_precision() -> Iterator[None]:
    """Make fake tensors, in half precision unless asked otherwise."""
    torch.set_default_dtype(torch.float16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def published(kind: Any, name: str) -> Any:
    return kind.from_config(json.loads((PUBLISHED / f"{name}.json").read_text())).eval()


def most_bytes(factor: int) -> dict[str, int]:
    """Return the most bytes alive at once beside the weights and the image, by part of the work."""
    scheduler = EulerDiscreteScheduler()  # its values are read
    with half_precision():
        unet, vae = published(UNet2DConditionModel, "unet"), published(AutoencoderKL, "vae")
        states = torch.empty(2, 1, TOKENS, unet.config.cross_attention_dim)
        conditioning = Conditioning(states, torch.empty(2, 1, POOLED), guidance_scale=7.5)
        image = torch.empty(1, 3, 256 * factor, 512 * factor, dtype=torch.float32)
    base = BaseModel(unet, vae, (), scheduler)
    size = {"height": 512 * factor, "width": 1024 * factor}
    settings = Settings("", **size, closed="x", num_inference_steps=1, layout=Feathered())
    pipeline, most = Pipeline(base), {}

    def measured(name: str, run: Any, *inputs: Any, **options: Any) -> Tensor:
        with Activations(weights_of(base)) as found:
            result: Tensor = run(settings, *inputs, **options)
        most[name] = found.most - 3 * 4 * settings.height * settings.width
        return result

    # There are no values to check.
    with patch.object(Tensor, "isfinite", lambda x: torch.ones(1)):
        x0 = measured("encode", pipeline.encode_image, image)
        noise = torch.empty_like(x0)
        latents = measured("denoise", pipeline.denoise, conditioning, noise, x0=x0)
        measured("decode", pipeline.decode, latents)
    return most


@pytest.mark.slow
def test_memory_does_not_grow_with_the_canvas_beyond_the_image() -> None:
    two, four, eight = map(most_bytes, (2, 4, 8))
    for name, found in {"2": two, "4": four, "8": eight}.items():
        gigabytes = {part: round(most / 1e9, 2) for part, most in found.items()}
        print(f"\nupscale {name} from 1024 x 512, GB beside weights and image: {gigabytes}")
    assert max(two.values()) < max(four.values()) < 9.5e9
    assert max(eight.values()) <= 1.05 * max(four.values())
    assert eight["denoise"] <= 1.05 * four["denoise"]
