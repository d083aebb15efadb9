"""One spanning view is a stock pipeline of diffusers: latents are equal to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from panorama.base_model import BaseModel, load_base_model
from panorama.conditioning.lora import lora_applied
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.circular import circular
from panorama.sampling.views import Spanning
from tests import small_sd2, small_sdxl

TINY = Path(__file__).parents[2] / "weights" / "tiny"
PROMPT = "<s0><s1> hdri view, bedroom in the color of blue"
LORA_SCALE, DEPTH_SCALE = 0.8, 0.7
SCHEDULERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
}


@pytest.fixture(scope="module")
def plain() -> BaseModel:
    return small_sdxl.build()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return small_sdxl.add_lora(small_sdxl.build(), tmp_path_factory.mktemp("lora"))


def spanning(base: BaseModel, **changes: Any) -> Settings:
    """Return a ring of two by one windows, or a canvas that does not close."""
    side = base.window * base.factor
    inputs: dict[str, Any] = {
        "prompt": PROMPT,
        "height": side,
        "width": 2 * side,
        "closed": "x",
        "negative_prompt": "people",
        "guidance_scale": 4.0,
        "num_inference_steps": 3,
        "layout": Spanning(),
        "controlnet_conditioning_scale": DEPTH_SCALE,
        "lora_scale": LORA_SCALE,
    }
    return Settings(**inputs | changes)


def depth_of(base: BaseModel) -> Tensor:
    settings = spanning(base)
    generator = torch.Generator().manual_seed(3)
    return torch.rand(settings.height, settings.width, generator=generator)


def stock(kind: Any, base: BaseModel, settings: Settings, noise: Tensor, **inputs: Any) -> Tensor:
    """Run a stock pipeline as diffusers documents it, under the library's context managers."""
    parts = small_sdxl.components(base)
    if settings.depth is None:
        parts.pop("controlnet", None)
    else:
        inputs |= {
            "image": settings.depth.expand(1, 3, -1, -1),
            "controlnet_conditioning_scale": settings.controlnet_conditioning_scale,
        }
    if settings.scheduler:
        scheduler, config = SCHEDULERS[settings.scheduler]
        parts["scheduler"] = scheduler.from_config(base.scheduler.config, **config)
    pipe = kind(**parts, **NO_CHECKER if kind is StableDiffusionPipeline else NO_WATERMARK)
    pipe.set_progress_bar_config(disable=True)
    wrapped = [base.unet, base.vae, *([base.controlnet] if base.controlnet else [])]
    with (
        torch.no_grad(),
        circular(*wrapped, axes=settings.closed),
        lora_applied({"unet": base.unet}, base.lora, settings.lora_scale),
    ):
        return pipe(
            settings.prompt,
            height=settings.height,
            width=settings.width,
            negative_prompt=settings.negative_prompt or None,
            guidance_scale=settings.guidance_scale,
            num_inference_steps=settings.num_inference_steps,
            latents=noise,
            **{"output_type": "latent"} | inputs,
        ).images


NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
NO_WATERMARK = {"add_watermarker": False}


def check_equal(kind: Any, base: BaseModel, settings: Settings) -> Tensor:
    """Check that both make the same latents; return them."""
    pipe = Pipeline(base)
    noise = pipe.noise(settings, torch.Generator().manual_seed(1))
    latents = pipe.denoise(settings, pipe.encode(settings), noise)
    assert torch.equal(latents, stock(kind, base, settings, noise))
    return latents


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("follows", [False, True], ids=["text", "depth"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_sdxl_is_the_stock_pipeline(
    plain: BaseModel, tuned: BaseModel, lora: bool, follows: bool, scheduler: str
) -> None:
    base = tuned if lora else plain
    kind = StableDiffusionXLControlNetPipeline if follows else StableDiffusionXLPipeline
    depth = depth_of(base) if follows else None
    check_equal(kind, base, spanning(base, depth=depth, scheduler=scheduler))


def test_every_part_takes_part(tuned: BaseModel) -> None:
    """Otherwise the equality would say nothing about it."""
    depth, pipe = depth_of(tuned), Pipeline(tuned)
    noise = pipe.noise(spanning(tuned), torch.Generator().manual_seed(1))
    changes: list[dict[str, Any]] = [
        {},
        {"depth": None},
        {"lora_scale": 0},
        {"closed": ""},
        {"closed": "y"},
        {"negative_prompt": ""},
        {"controlnet_conditioning_scale": 0.1},
        *({"scheduler": name} for name in ("ddim", "dpm++", "unipc")),
    ]
    results: list[Tensor] = []
    for change in changes:
        settings = spanning(tuned, **{"depth": depth} | change)
        results.append(pipe.denoise(settings, pipe.encode(settings), noise))
        assert all((results[-1] - other).abs().max() > 1e-3 for other in results[:-1])


@pytest.mark.parametrize(
    "changes",
    [{"guidance_scale": 1.0, "negative_prompt": ""}, {"negative_prompt": ""}, {"closed": "y"}],
    ids=["without guidance", "no negative prompt", "top to bottom"],
)
def test_sdxl_is_the_stock_pipeline_in_special_cases(
    tuned: BaseModel, changes: dict[str, Any]
) -> None:
    check_equal(StableDiffusionXLPipeline, tuned, spanning(tuned, **changes))


def test_the_image_is_that_of_the_stock_pipeline(plain: BaseModel) -> None:
    settings, pipe = spanning(plain, depth=depth_of(plain)), Pipeline(plain)
    image = pipe(settings, torch.Generator().manual_seed(1))
    noise = pipe.noise(settings, torch.Generator().manual_seed(1))
    kind = StableDiffusionXLControlNetPipeline
    expected = stock(kind, plain, settings, noise, output_type="pt")
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sd2_is_the_stock_pipeline(scheduler: str) -> None:
    base = small_sd2.build()
    check_equal(StableDiffusionPipeline, base, spanning(base, closed="", scheduler=scheduler))


@pytest.mark.parametrize(
    ("model", "kind", "closed"),
    [
        ("sdxl", StableDiffusionXLPipeline, "x"),
        ("sdxl", StableDiffusionXLControlNetPipeline, "x"),
        ("sd2", StableDiffusionPipeline, ""),
    ],
)
def test_the_embedded_family_is_the_stock_pipeline(model: str, kind: Any, closed: Any) -> None:
    parts = {path.name: path for path in (TINY / model).iterdir()}
    base = load_base_model(parts, torch.float32)
    depth = torch.rand(256, 256) if kind is StableDiffusionXLControlNetPipeline else None
    settings = spanning(
        base, width=256, height=256, closed=closed, depth=depth, num_inference_steps=2
    )
    check_equal(kind, base, settings)
