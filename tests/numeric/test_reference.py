"""The published SyncDiffusion and the lpips package, reproduced through the public API."""

import json
from math import sqrt
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from panorama.base_model import BaseModel
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.denoiser import Conditioning
from panorama.sampling.perceptual import LPIPS
from panorama.sampling.synchronize import SyncSettings
from panorama.sampling.views import Fixed

DATA = Path(__file__).parent.parent / "data"
CASES = json.loads((DATA / "cases.json").read_text())


class CoarseColor(nn.Module):
    """The stand-in for LPIPS that the reference's numbers were made with."""

    def embed(self, images: Tensor) -> list[Tensor]:
        return [avg_pool2d(images, 16)]

    def distance(self, images: Tensor, features: list[Tensor]) -> Tensor:
        return (avg_pool2d(images, 16) - features[0]).square().mean((1, 2, 3))


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(
        BaseModel(
            unet=UNet2DConditionModel.from_pretrained(DATA, subfolder="unet"),
            vae=AutoencoderKL.from_pretrained(DATA, subfolder="vae"),
            text_encoders=(),
            scheduler=DDIMScheduler.from_pretrained(DATA, subfolder="scheduler"),
            perceptual=CoarseColor(),
        )
    )


@pytest.mark.parametrize("name", CASES)
def test_the_published_latents_are_reproduced(pipeline: Pipeline, name: str) -> None:
    case, given = CASES[name], load_file(DATA / f"{name}.safetensors")
    settings = Settings(
        prompt="",
        height=case["height"],
        width=case["width"],
        num_inference_steps=case["num_inference_steps"],
        layout=Fixed(case["stride"]),
        sync=SyncSettings(
            weight=case["sync_weight"],
            decay_rate=case["sync_decay_rate"],
            freq=case.get("sync_freq", 1),
            threshold=case["sync_thres"],
        ),
    )
    states = torch.stack([given["negative_prompt_embeds"], given["prompt_embeds"]])
    conditioning = Conditioning(states, None, case["guidance_scale"])
    latents = pipeline.denoise(settings, conditioning, given["noise"])
    difference = (latents - given["latents"]).abs()
    assert difference.mean() < 1e-3 * given["latents"].std()
    assert difference.max() < 1.5e-2


LPIPS_CASE = DATA / "lpips_case.safetensors"


def write_vgg16(path: Path) -> Path:
    """Write a VGG16 as torchvision's, its convolutions drawn from one generator."""
    generator, state = torch.Generator().manual_seed(20260), {}
    for index, conv in enumerate(m for m in LPIPS().modules() if isinstance(m, nn.Conv2d)):
        weight = torch.randn(conv.weight.shape, generator=generator)
        state[f"features.{index}.weight"] = weight * sqrt(2 / (conv.in_channels * 9))
        state[f"features.{index}.bias"] = torch.randn(conv.bias.shape, generator=generator) * 0.05
    torch.save(state | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


def test_lpips_is_that_of_the_lpips_package(tmp_path: Path) -> None:
    # In single precision a processor's rounding may decide a maximum or a sign otherwise.
    case = {name: value.double() for name, value in load_file(LPIPS_CASE).items()}
    model = LPIPS.from_vgg16(write_vgg16(tmp_path / "vgg16.pth")).double()
    image = case["image"].requires_grad_()
    distance = model.distance(image, model.embed(case["target"]))
    (gradient,) = torch.autograd.grad(distance.sum(), image)
    torch.testing.assert_close(distance, case["distance"], atol=1e-7, rtol=0)
    torch.testing.assert_close(gradient, case["gradient"], atol=1e-9, rtol=0)
