"""Stock pipelines of diffusers on the same networks, windows and noise as ours."""

from collections.abc import Callable, Sequence
from typing import Any

from diffusers import StableDiffusionPanoramaPipeline
from torch import Tensor

from panorama.base_model import BaseModel
from panorama.pipeline import Settings
from panorama.sampling.canvas import View
from panorama.sampling.denoiser import Conditioning


def panorama_call(
    base: BaseModel,
    scheduler: Any,
    settings: Settings,
    conditioning: Conditioning,
    noise: Tensor,
    views: Sequence[View],
    batch_size: int,
) -> Callable[[], Tensor]:
    """Return a call that makes latents (1, C, H, W) by diffusers' panorama pipeline.

    Args:
        base: the networks.
        scheduler: the scheduler of diffusers that it steps with.
        settings: size, steps and guidance.
        conditioning: the embedded prompts.
        noise: (1, C, H, W), what it starts from.
        views: its windows, at every step.
        batch_size: windows that pass through the UNet at once.
    """
    (encoder,) = base.text_encoders
    stock = StableDiffusionPanoramaPipeline(
        vae=base.vae,
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        unet=base.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    negative_prompt_embeds, prompt_embeds = conditioning.states[:, 0].chunk(2)
    places = [(v.top, v.top + v.height, v.left, v.left + v.width) for v in views]
    stock.get_views = lambda *_, **__: places

    def call() -> Tensor:
        latents: Tensor = stock(
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            view_batch_size=batch_size,
            latents=noise.to(base.unet.dtype, copy=True),
            output_type="latent",
        ).images
        return latents

    return call
