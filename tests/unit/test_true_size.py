"""SDXL base 1.0 with its ControlNet at true size, with random weights: whether it runs at all."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

from panorama.sdxl import SDXL360
from tests.small_sdxl import assemble

PUBLISHED = Path(__file__).parents[1] / "data" / "sdxl"
HIDDEN = (768, 1280)  # of the published text encoders
HEIGHT, WIDTH = 512, 1024  # pixels


def published(kind: Any, name: str) -> Any:
    return kind.from_config(json.loads((PUBLISHED / f"{name}.json").read_text()))


@pytest.fixture
def pipe(tmp_path: Path) -> SDXL360:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # or building the models would need twice the memory
    try:
        unet = published(UNet2DConditionModel, "unet")
        controlnet = published(ControlNetModel, "controlnet")
        return assemble(tmp_path, unet, controlnet, published(AutoencoderKL, "vae"), HIDDEN)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_step_at_true_size_runs_in_half_precision(pipe: SDXL360) -> None:
    assert pipe.text.unet.dtype == pipe.depth.controlnet.dtype == torch.bfloat16
    started = time.perf_counter()
    picture = pipe(
        "hdri view, bedroom in the color of blue",
        HEIGHT,
        WIDTH,
        num_inference_steps=1,
        depth=torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)),
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    seconds = time.perf_counter() - started
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"\n{WIDTH} x {HEIGHT}, one step: {seconds:.0f} s, peak memory {gigabytes:.1f} GB")
    assert picture.shape == (1, 3, HEIGHT, WIDTH)
    assert picture.isfinite().all()
