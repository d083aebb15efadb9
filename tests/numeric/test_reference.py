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

from panorama.perceptual import LPIPS
from panorama.syncdiffusion import SyncDiffusionPipeline

DATA = Path(__file__).parent.parent / "data"
HEADS = Path(__file__).parent.parent.parent / "weights" / "lpips_vgg_heads.safetensors"
CASES = json.loads((DATA / "cases.json").read_text())


class CoarseColor(nn.Module):
    """The stand-in for LPIPS that the reference's numbers were made with."""

    def embed(self, images: Tensor) -> list[Tensor]:
        return [avg_pool2d(images, 16)]

    def distance(self, images: Tensor, features: list[Tensor]) -> Tensor:
        return (avg_pool2d(images, 16) - features[0]).square().mean((1, 2, 3))


@pytest.fixture(scope="module")
def pipe() -> SyncDiffusionPipeline:
    pipe = SyncDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(DATA, subfolder="vae"),
        text_encoder=None,
        tokenizer=None,
        unet=UNet2DConditionModel.from_pretrained(DATA, subfolder="unet"),
        scheduler=DDIMScheduler.from_pretrained(DATA, subfolder="scheduler"),
        perceptual=CoarseColor(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", CASES)
def test_the_published_latents_are_reproduced(pipe: SyncDiffusionPipeline, name: str) -> None:
    case = dict(CASES[name])
    given = load_file(DATA / f"{name}.safetensors")
    latents = pipe(
        prompt_embeds=given["prompt_embeds"],
        negative_prompt_embeds=given["negative_prompt_embeds"],
        latents=given["noise"],
        sync_threshold=case.pop("sync_thres"),
        output_type="latent",
        **case,
    ).images
    difference = (latents - given["latents"]).abs()
    assert difference.mean() < 1e-3 * given["latents"].std()
    assert difference.max() < 1.5e-2


LPIPS_CASE = DATA / "lpips_case.safetensors"


def reference_lpips() -> LPIPS:
    """LPIPS with VGG16 convolutions drawn from one generator and the published heads."""
    model = LPIPS()
    generator = torch.Generator().manual_seed(20260)
    with torch.no_grad():
        for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            fan_in = conv.in_channels * 9
            conv.weight.copy_(
                torch.randn(conv.weight.shape, generator=generator) * sqrt(2 / fan_in)
            )
            conv.bias.copy_(torch.randn(conv.bias.shape, generator=generator) * 0.05)
        for index, head in enumerate(load_file(HEADS).values()):
            model.heads[index].copy_(head)
    return model


def test_lpips_is_that_of_the_lpips_package() -> None:
    # In single precision a processor's rounding may decide a maximum or a sign otherwise.
    case = {name: value.double() for name, value in load_file(LPIPS_CASE).items()}
    model, image = reference_lpips().double(), case["image"].requires_grad_()
    distance = model.distance(image, model.embed(case["target"]))
    (gradient,) = torch.autograd.grad(distance.sum(), image)
    torch.testing.assert_close(distance, case["distance"], atol=1e-7, rtol=0)
    torch.testing.assert_close(gradient, case["gradient"], atol=1e-9, rtol=0)
