"""SyncDiffusion as a diffusers pipeline: a prompt in, a coherent panorama out."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

import panorama.perceptual  # noqa: F401  from_pretrained takes no class from elsewhere
from panorama.decode import MAX_CELLS, decode, decode_canvas
from panorama.gradient import checkpointed, frozen
from panorama.noise import initial_noise
from panorama.prompts import token_ids
from panorama.request import check_size
from panorama.sampler import VIEW_BATCH_SIZE, require_fusable, sample
from panorama.share import ALONE, Share
from panorama.synchronize import DirectSynchronizer, PredictNoise, Synchronizer, SyncSchedule
from panorama.views import View, disjoint_views, step_views

OUTPUT_TYPES = ("pil", "pt", "latent")


class SyncDiffusionPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Joint denoising of a canvas wider or taller than the model's own pictures.

    SyncDiffusion (arXiv 2306.05178) on MultiDiffusion (arXiv 2302.08113).

    Args:
        vae: AutoencoderKL.
        text_encoder: CLIPTextModel.
        tokenizer: CLIPTokenizer.
        unet: UNet2DConditionModel that predicts noise; its `sample_size` is a window's side.
        scheduler: any diffusers scheduler whose step is affine, see `sampler.require_fusable`.
        perceptual: the distance that keeps windows coherent, an LPIPS or a module with its calls
            `embed` and `distance`.
    """

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        perceptual: Any,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            perceptual=perceptual,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels to a latent cell."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def window(self) -> int:
        """Side of a window, in latent cells."""
        return int(self.unet.config.sample_size)

    @torch.inference_mode(False)  # whatever the caller is in: synchronising needs gradients
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        sync_weight: float = 20.0,
        sync_decay_rate: float = 0.99,
        sync_freq: int = 1,
        sync_threshold: int = 5,
        stride: int = 16,
        loop_closure: bool = False,
        disjoint: bool = False,
        sync_on_x0: bool = False,
        sync_pooling: int = 1,
        scheduler: Any = None,
        view_batch_size: int = VIEW_BATCH_SIZE,
        checkpointing: bool = False,
        max_cells: int = MAX_CELLS,
        share: Share = ALONE,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
    ) -> ImagePipelineOutput:
        """Makes one panorama.

        Args:
            prompt: what it shows; of any length.
            height: pixels; a multiple of the VAE's factor, at least a window. None is a window.
            width: pixels, likewise; None is four windows.
            num_inference_steps: denoising steps.
            guidance_scale: weight of classifier-free guidance, 1 for none.
            negative_prompt: what it should not show; of any length.
            sync_weight: weight of the synchronising gradient, 0 for none.
            sync_decay_rate: factor of that weight from one step to the next.
            sync_freq: synchronise every so many steps.
            sync_threshold: only among the first so many steps.
            stride: widest gap between windows' starts, latent cells, at most a window.
            loop_closure: close the longer side into a ring.
            disjoint: as few windows as cover the canvas, elsewhere at each step, and at the last
                one overlapping and fading, see `disjoint_views`; `stride` has no say then.
            sync_on_x0: take the gradient with respect to what windows are predicted to end in, see
                `DirectSynchronizer`.
            sync_pooling: how many latent cells the distance sees as one, along either axis.
            scheduler: instead of the pipeline's own, which it takes no part of.
            view_batch_size: windows that go through the networks at once, half as many where they
                are synchronised; trades memory for time and changes nothing else.
            checkpointing: compute more again in the gradient step, for less memory.
            max_cells: largest canvas, in latent cells, that is decoded whole and so exactly; a
                larger one is decoded in slices of so many, see `decode_canvas`.
            share: this process's share of the windows, where several make one panorama.
            generator: of the initial noise; on the CPU it gives the same noise on every device.
            latents: the initial noise itself, (1, C, height / f, width / f).
            prompt_embeds: (1, L, D) instead of `prompt`.
            negative_prompt_embeds: (1, L, D) instead of `negative_prompt`.
            output_type: "pil", "pt" for a tensor (1, 3, H, W) in [0, 1], or "latent".
            callback_on_step_end: called as diffusers does, (pipe, step, timestep,
                {"latents": ...}); what it returns under "latents" is gone on with.

        Returns:
            An object whose `.images` holds the panorama.

        Raises:
            ValueError: an argument that breaks its rule, or a scheduler that can't be fused.
        """
        window_pixels = self.window * self.vae_scale_factor
        height = window_pixels if height is None else height
        width = 4 * window_pixels if width is None else width
        texts = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        self._check_prompts(*texts)
        self._check_size(height, width)
        check_least(
            num_inference_steps=(num_inference_steps, 1),
            guidance_scale=(guidance_scale, 0),
            sync_weight=(sync_weight, 0),
            sync_decay_rate=(sync_decay_rate, 0),
            sync_freq=(sync_freq, 1),
            sync_threshold=(sync_threshold, 0),
            sync_pooling=(sync_pooling, 1),
            view_batch_size=(view_batch_size, 1),
            max_cells=(max_cells, 1),
        )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type={output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}"
            )
        if self.window % sync_pooling:
            raise ValueError(
                f"sync_pooling={sync_pooling}: must divide the window's {self.window} latent "
                f"cells; 2 would do"
            )
        scheduler = copy.deepcopy(self.scheduler if scheduler is None else scheduler)
        require_fusable(scheduler)

        # Prepare.
        ring = ("x" if width >= height else "y") if loop_closure else ""
        embeds = self._embeds(*texts)
        latents = self._latents(height, width, generator, latents)
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        steps = len(scheduler.timesteps)
        views = self._views(height, width, stride, ring, steps if disjoint else None)
        predict_noise = self._guided(*embeds, guidance_scale)
        synchronizer = (DirectSynchronizer if sync_on_x0 else Synchronizer)(
            predict_noise,
            lambda x: decode(self.vae, x),
            self.perceptual,
            scheduler.alphas_cumprod.to(latents.device),
            sync_pooling,
        )

        # Denoise.
        with (
            frozen(self.unet, self.vae, self.perceptual),
            checkpointed(*(self.unet, self.vae) if checkpointing else ()),
            self.progress_bar(total=steps) as bar,
        ):

            def on_step(step: int, t: Tensor, latents: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return latents
                changed = callback_on_step_end(self, step, t, {"latents": latents})
                return changed.get("latents", latents)

            latents = sample(
                latents,
                views,
                predict_noise,
                scheduler,
                synchronizer=synchronizer,
                schedule=SyncSchedule(sync_weight, sync_decay_rate, sync_freq, sync_threshold),
                view_batch_size=view_batch_size,
                share=share,
                on_step=on_step,
            )

        # Decode.
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        picture = decode_canvas(self.vae, latents, ring=ring, max_cells=max_cells)
        images = self.image_processor.postprocess(picture, output_type=output_type)
        return ImagePipelineOutput(images=images)

    def encode_prompt(self, prompt: str, negative_prompt: str = "") -> tuple[Tensor, Tensor]:
        """Embeds two texts of any length.

        A text longer than the text encoder's context is embedded in pieces of that length, one
        after the other; the shorter text gets empty pieces, so that both have one length.

        Returns:
            prompt_embeds and negative_prompt_embeds, (1, n * L, D) each.
        """
        ids = token_ids(self.tokenizer, [prompt, negative_prompt])
        prompt_embeds, negative_prompt_embeds = (self._embed(rows) for rows in ids)
        return prompt_embeds, negative_prompt_embeds

    def _embed(self, ids: Tensor) -> Tensor:
        """Token ids (n, L) to their embeddings, one after the other (1, n * L, D)."""
        embeds: Tensor = self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state
        return embeds.reshape(1, -1, embeds.shape[-1])

    def _embeds(
        self,
        prompt: str | None,
        negative_prompt: str,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The embeddings to use, (1, L, D) each: those given, or those of the texts."""
        if prompt is not None:
            prompt_embeds, encoded = self.encode_prompt(prompt, negative_prompt)
            if negative_prompt_embeds is None:
                negative_prompt_embeds = encoded
        assert prompt_embeds is not None and negative_prompt_embeds is not None
        if prompt_embeds.shape != negative_prompt_embeds.shape:
            raise ValueError(
                f"negative_prompt_embeds has shape {tuple(negative_prompt_embeds.shape)}: must be "
                f"that of the prompt's, {tuple(prompt_embeds.shape)}"
            )
        return prompt_embeds, negative_prompt_embeds

    def _guided(
        self, prompt_embeds: Tensor, negative_prompt_embeds: Tensor, guidance_scale: float
    ) -> PredictNoise:
        """Classifier-free guidance (arXiv 2207.12598, equation 6), both halves in one batch."""
        unet, dtype = self.unet, self.unet.dtype  # which asks all of its weights
        embeds = [negative_prompt_embeds, prompt_embeds] if guidance_scale != 1 else [prompt_embeds]
        embeds = [e.to(unet.device, dtype) for e in embeds]

        def predict_noise(x: Tensor, t: Tensor) -> Tensor:
            halves = len(embeds)
            states = torch.cat([e.expand(len(x), -1, -1) for e in embeds])  # (halves * n, L, D)
            inputs = x.to(dtype).repeat(halves, 1, 1, 1)  # (halves * n, C, s, s)
            noise: Tensor = unet(inputs, t, encoder_hidden_states=states).sample.float()
            if halves == 1:
                return noise
            uncond, text = noise.chunk(2)
            return uncond + guidance_scale * (text - uncond)

        return predict_noise

    def _views(
        self, height: int, width: int, stride: int, ring: str, disjoint_steps: int | None = None
    ) -> tuple[tuple[View, ...], ...]:
        """The windows of each step on a canvas in pixels; disjoint ones for so many steps."""
        factor = self.vae_scale_factor
        canvas = (height // factor, width // factor, self.window)
        rings = {"ring_x": ring == "x", "ring_y": ring == "y"}
        if disjoint_steps is not None:
            return disjoint_views(*canvas, disjoint_steps, **rings)
        return step_views(*canvas, stride, **rings)

    def _latents(
        self, height: int, width: int, generator: torch.Generator | None, latents: Tensor | None
    ) -> Tensor:
        """The initial noise (1, C, height / f, width / f), float32 on the UNet's device."""
        factor = self.vae_scale_factor
        return initial_noise(self.unet, (height // factor, width // factor), generator, latents)

    def _check_prompts(
        self,
        prompt: str | None,
        negative_prompt: str,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
    ) -> None:
        """Raises ValueError unless each text is given once, in words or embedded."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError(f"prompt={prompt!r}: give either prompt or prompt_embeds")
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"prompt={prompt!r}: must be one text; call once for each panorama")
        if negative_prompt and (prompt_embeds is not None or negative_prompt_embeds is not None):
            raise ValueError(
                f"negative_prompt={negative_prompt!r}: must be empty beside embeddings; give "
                f"negative_prompt_embeds alone"
            )
        if prompt_embeds is not None and negative_prompt_embeds is None:
            raise ValueError(
                "negative_prompt_embeds=None: must be given with prompt_embeds; "
                "pipe.encode_prompt(prompt, negative_prompt) makes both"
            )

    def _check_size(self, height: int, width: int) -> None:
        """Raises ValueError unless a canvas holds whole cells and at least a window."""
        factor = self.vae_scale_factor
        for name, size in (("height", height), ("width", width)):
            check_size(name, size, factor, smallest=self.window * factor)


def check_least(**numbers: tuple[float, float]) -> None:
    """Raises ValueError for a number below its least value, or not a number."""
    for name, (value, least) in numbers.items():
        if not value >= least:
            raise ValueError(f"{name}={value}: must be at least {least}; {least} would do")
