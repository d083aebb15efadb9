"""The published loop and stock pipelines, on the networks, windows and noise of a run."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from diffusers import StableDiffusionPanoramaPipeline
from torch import Tensor

from benchmarks.lab import Run
from benchmarks.plain_loop import StableDiffusion, plain_loop
from panorama.sampling.canvas import View


def views_of(run: Run) -> Sequence[Sequence[View]]:
    """Return the windows of each step of a run."""
    settings, window = run.settings, run.pipeline.base.window
    return settings.layout(run.pipeline.canvas(settings), window, settings.num_inference_steps)


def published_loop(run: Run) -> Tensor:
    """Return the latents (1, C, H, W) that the published loop makes, without shared means."""
    base, settings = run.pipeline.base, run.settings
    base.scheduler.set_timesteps(settings.num_inference_steps)
    assert settings.sync
    sync = replace(settings.sync, means=0)
    networks = StableDiffusion(base, run.conditioning)
    return plain_loop(run.noise, views_of(run), networks, base.scheduler, sync)


def panorama_call(run: Run, batch_size: int) -> Callable[[], Tensor]:
    """Return a call that makes latents (1, C, H, W) by diffusers' panorama pipeline.

    Args:
        run: its windows must stay in place.
        batch_size: windows that pass through the UNet at once.
    """
    base, settings = run.pipeline.base, run.settings
    (encoder,) = base.text_encoders
    stock = StableDiffusionPanoramaPipeline(
        vae=base.vae,
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        unet=base.unet,
        scheduler=base.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    negative_prompt_embeds, prompt_embeds = run.conditioning.states[:, 0].chunk(2)
    places = [(v.top, v.top + v.height, v.left, v.left + v.width) for v in views_of(run)[0]]
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
            latents=run.noise.to(base.unet.dtype, copy=True),
            output_type="latent",
        ).images
        return latents

    return call
