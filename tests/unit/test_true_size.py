"""SDXL base 1.0 with its ControlNet at true size, with random weights: it runs."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor

from panorama.base_model import BaseModel
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.presets import WHOLE
from panorama.sampling.views import Feathered, Layout
from tests.small_sdxl import assemble

PUBLISHED = Path(__file__).parents[1] / "data" / "sdxl"
HIDDEN = (768, 1280)  # of the published text encoders
HEIGHT, WIDTH = 512, 1024  # pixels


def published(kind: Any, name: str) -> Any:
    return kind.from_config(json.loads((PUBLISHED / f"{name}.json").read_text()))


@pytest.fixture(scope="module")
def base() -> BaseModel:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # or building the models would need twice the memory
    try:
        unet = published(UNet2DConditionModel, "unet")
        controlnet = published(ControlNetModel, "controlnet")
        return assemble(unet, controlnet, published(AutoencoderKL, "vae"), HIDDEN)
    finally:
        torch.set_default_dtype(torch.float32)


def sphere(height: int, width: int, layout: Layout, **options: Any) -> Settings:
    """Return the settings of one step of a 360 image."""
    return Settings(
        prompt="hdri view, bedroom in the color of blue",
        height=height,
        width=width,
        closed="x",
        num_inference_steps=1,
        layout=layout,
        **options,
    )


def run(what: str, make: Callable[[torch.Generator], Tensor]) -> Tensor:
    """Make an image, and print the seconds and the memory that it took."""
    started = time.perf_counter()
    image = make(torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - started
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"\n{what}: {seconds:.0f} s, peak memory so far {gigabytes:.1f} GB")
    return image


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_step_at_true_size_runs_in_half_precision(base: BaseModel) -> None:
    assert base.unet.dtype == base.controlnet.dtype == torch.bfloat16
    depth = torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    settings = sphere(HEIGHT, WIDTH, WHOLE.layout(16), depth=depth)
    image = run(f"{WIDTH} x {HEIGHT}, one step", lambda random: Pipeline(base)(settings, random))
    assert image.shape == (1, 3, HEIGHT, WIDTH)
    assert image.isfinite().all()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_one_step_of_refining_to_4096_x_2048_runs_in_half_precision(base: BaseModel) -> None:
    height, width = 4 * HEIGHT, 4 * WIDTH
    settings = sphere(height, width, Feathered())
    pipeline = Pipeline(base, batch_size=1)
    smaller = torch.rand(1, 3, height // 2, width // 2)
    conditioning = pipeline.encode(settings)
    image = run(
        f"refining to {width} x {height}, one step",
        lambda random: pipeline.refine(settings, conditioning, smaller, random),
    )
    assert image.shape == (1, 3, height, width)
    assert image.isfinite().all()
