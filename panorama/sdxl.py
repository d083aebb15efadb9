"""SDXL around a full turn: the stock pipelines, run while their convolutions wrap around."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file
from torch import Tensor

from panorama.circular import circular
from panorama.decode import MAX_CELLS, decode_canvas
from panorama.noise import initial_noise
from panorama.prompts import token_ids
from panorama.request import check_guidance, check_size

LORA = "panorama"
"""The name of the LoRA inside the UNet."""
TOKENS = ("<s0>", "<s1>")
"""The words that pivotal tuning taught the text encoders together with the LoRA."""
OUTPUT_TYPES = ("pil", "pt")
LEAST_GUIDANCE = 1.0
"""What the stock pipelines take any smaller guidance_scale for, without saying so."""


class SDXL360:
    """Makes 360 pictures with SDXL, from text alone or following a depth image by ControlNet.

    Both pipelines are diffusers' own and share one set of models. Where the VAE overflows in half
    precision (`force_upcast`) it is kept in float32.

    Args:
        text: the pipeline from text alone.
        controlnet: a ControlNet of the same precision.

    Attributes:
        text: the same pipeline.
        depth: the pipeline that follows a depth image.
        tokens: the LoRA's tokens, once `load_lora` gave it one; a prompt should name them.
    """

    def __init__(self, text: StableDiffusionXLPipeline, controlnet: ControlNetModel) -> None:
        self.text = text
        self.depth = StableDiffusionXLControlNetPipeline(
            **text.components,
            controlnet=controlnet,
            force_zeros_for_empty_prompt=text.config.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
        self.tokens: tuple[str, ...] = ()
        text.vae.type(torch.float32 if text.vae.config.force_upcast else text.unet.dtype)
        for pipe in (self.text, self.depth):
            pipe.set_progress_bar_config(disable=True)

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype) -> Self:
        """Reads the models from a folder.

        Args:
            folder: holds the text pipeline in diffusers' format, `controlnet/` and, if there is a
                LoRA, `lora.safetensors` and `embeddings.safetensors`.
            dtype: the models' precision.
        """
        text = StableDiffusionXLPipeline.from_pretrained(
            folder,
            dtype={"default": dtype, "vae": torch.float32},
            add_watermarker=False,
            local_files_only=True,
            use_safetensors=True,
        )
        controlnet = ControlNetModel.from_pretrained(
            folder / "controlnet", dtype=dtype, local_files_only=True, use_safetensors=True
        )
        pipe = cls(text, controlnet)
        if (folder / "lora.safetensors").is_file():
            pipe.load_lora(folder / "lora.safetensors", folder / "embeddings.safetensors")
        return pipe

    def load_lora(self, lora: Path, embeddings: Path) -> None:
        """Loads a LoRA with its tokens; see `load_lora` and `load_tokens` of this module."""
        load_lora(self.text.unet, lora)
        load_tokens(self.text, embeddings)
        self.tokens = TOKENS

    def to(self, device: torch.device) -> None:
        """Moves the models to a device."""
        self.depth.to(device)  # all that the text pipeline has, and the ControlNet

    @property
    def multiple(self) -> int:
        """Widths and heights are multiples of it, pixels: the VAE's factor times the UNet's.

        Every level of the UNet then has whole columns, and so wraps.
        """
        halvings = len(self.text.unet.config.block_out_channels) - 1
        return int(self.text.vae_scale_factor * 2**halvings)

    @property
    def largest(self) -> int:
        """The largest area, pixels, that is decoded whole and so closes exactly.

        A larger picture would be decoded in slices, which are not exact: rolling its latents
        would no longer do nothing but roll it. See `decode_canvas`.
        """
        return int(MAX_CELLS * self.text.vae_scale_factor**2)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        height: int,
        width: int,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        depth: Tensor | None = None,
        controlnet_conditioning_scale: float = 0.5,
        lora_scale: float = 0.8,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
    ) -> Any:
        """Makes one picture whose left and right edges meet.

        Args:
            prompt: what it shows; of any length.
            height: pixels, a multiple of `multiple`.
            width: pixels, likewise; twice the height for a whole sphere. Where the area is more
                than `largest`, what comes out is no longer exact.
            num_inference_steps: denoising steps.
            guidance_scale: weight of classifier-free guidance, at least 1, which is none.
            negative_prompt: what it should not show; of any length, and empty without guidance.
            depth: to follow, (height, width) in [0, 1], 1 is nearest; None for text alone.
            controlnet_conditioning_scale: how closely, 0 for text alone.
            lora_scale: strength of the LoRA, if there is one; at 0 it is skipped.
            generator: on the CPU it gives the same initial noise on every device.
            latents: the initial noise itself, (1, C, height / f, width / f), unit variance.
            output_type: "pil" or "pt".
            callback_on_step_end: called as diffusers does, (pipe, step, timestep,
                {"latents": ...}).

        Returns:
            A list of one picture, or for "pt" a tensor (1, 3, height, width) in [0, 1].

        Raises:
            ValueError: an argument that breaks its rule.
        """
        self._check_sizes(height, width, depth)
        check_guidance(guidance_scale, negative_prompt, LEAST_GUIDANCE)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type={output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}"
            )
        pipe, condition = self.text, {}
        if depth is not None and controlnet_conditioning_scale > 0:
            condition = {
                "image": depth.expand(1, 3, -1, -1),
                "controlnet_conditioning_scale": controlnet_conditioning_scale,
            }
            pipe = self.depth
        unet = self.text.unet
        factor = self.text.vae_scale_factor
        noise = initial_noise(unet, (height // factor, width // factor), generator, latents)
        with circular(unet, self.depth.controlnet), lora_applied(unet, lora_scale):
            latents = pipe(
                **self._embeds(prompt, negative_prompt),
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=generator,
                latents=noise.to(unet.dtype),
                output_type="latent",
                callback_on_step_end=callback_on_step_end,
                **condition,
            ).images
        picture = decode_canvas(self.text.vae, latents, ring="x")
        return self.text.image_processor.postprocess(picture, output_type=output_type)

    def _embeds(self, prompt: str, negative_prompt: str) -> dict[str, Tensor]:
        """What the pipelines take in place of texts, which they would cut to one context.

        Both text encoders' last hidden states but one, side by side (1, n * L, D + D'), and the
        second one's pooled embedding of a text's first piece (1, D'). An empty negative prompt is
        zeros where SDXL was trained so (`force_zeros_for_empty_prompt`).

        The pooled embedding is that of the end token, unless the encoder's configuration says
        `eos_token_id` 2, as SDXL's does: then transformers takes that of the largest token id. Of a
        prompt that names the LoRA's tokens this is the last of them, which sees nothing of what
        comes after it. cog-sdxl trained its tokens and LoRAs with just that (`trainer_pti.py`, on
        transformers 4.31), so it is left as it is.
        """
        pipe, columns = self.text, []
        for tokenizer, encoder in (
            (pipe.tokenizer, pipe.text_encoder),
            (pipe.tokenizer_2, pipe.text_encoder_2),
        ):
            ids = torch.stack(token_ids(tokenizer, [prompt, negative_prompt]))  # (2, n, L)
            output = encoder(ids.flatten(0, 1).to(encoder.device), output_hidden_states=True)
            states = output.hidden_states[-2]  # (2 * n, L, D)
            columns.append(states.reshape(2, -1, states.shape[-1]))
        embeds = torch.cat(columns, -1)  # (2, n * L, D + D')
        pooled = output.text_embeds.unflatten(0, (2, -1))[:, 0]  # (2, D')
        if not negative_prompt and pipe.config.force_zeros_for_empty_prompt:
            embeds[1], pooled[1] = 0, 0
        return {
            "prompt_embeds": embeds[:1],
            "negative_prompt_embeds": embeds[1:],
            "pooled_prompt_embeds": pooled[:1],
            "negative_pooled_prompt_embeds": pooled[1:],
        }

    def _check_sizes(self, height: int, width: int, depth: Tensor | None) -> None:
        """Raises ValueError for a size that would not wrap, or depth of another size."""
        for name, size in (("height", height), ("width", width)):
            check_size(name, size, self.multiple, smallest=self.multiple)
        if depth is not None and depth.shape != (height, width):
            raise ValueError(
                f"depth has shape {tuple(depth.shape)}: must be that of the picture; "
                f"{(height, width)} would do"
            )


def load_lora(unet: Any, path: Path) -> None:
    """Loads a LoRA into a UNet, switched off until `lora_applied`.

    By what the pipelines' `load_lora_weights` calls for the UNet. That itself goes by the prefix
    `unet.` and only logs it if no key has one; and it would load weights of text encoders as well,
    which `lora_applied` does not switch.

    Args:
        unet: a UNet2DConditionModel.
        path: safetensors in the format of cog-sdxl, with keys such as
            `...attn1.processor.to_q_lora.down.weight`, all or none of them after `unet.`.

    Raises:
        ValueError: some keys come after `unet.` and others don't, or not every weight found its
            place; diffusers would only log that.
    """
    weights = load_file(path)
    prefixed = sum(key.startswith("unet.") for key in weights)
    if prefixed not in (0, len(weights)):
        raise ValueError(
            f"{path.name}: all of its {len(weights)} keys must begin with unet. or none, not "
            f"{prefixed}; a lora.safetensors of cog-sdxl would do"
        )
    weights = {key.removeprefix("unet."): weight for key, weight in weights.items()}
    unet.load_lora_adapter(weights, prefix=None, adapter_name=LORA)
    loaded = sum(LORA in getattr(module, "lora_A", ()) for module in unet.modules())
    if not loaded or 2 * loaded != len(weights):
        raise ValueError(
            f"{path.name}: must hold LoRA weights for this UNet and nothing else, but of "
            f"{len(weights)} weights {2 * loaded} have a place in it; "
            "a lora.safetensors of cog-sdxl would do"
        )
    unet.disable_lora()


def load_tokens(pipe: StableDiffusionXLPipeline, path: Path) -> None:
    """Teaches both text encoders the tokens of pivotal tuning.

    Args:
        pipe: whose tokenizers and text encoders.
        path: safetensors with `text_encoders_0` (2, D) and `text_encoders_1` (2, D'), the
            embeddings of `TOKENS`.

    Raises:
        ValueError: a key is missing, or embeddings don't fit their encoder.
    """
    embeddings = load_file(path)
    encoders = {
        "text_encoders_0": (pipe.text_encoder, pipe.tokenizer),
        "text_encoders_1": (pipe.text_encoder_2, pipe.tokenizer_2),
    }
    for key, (encoder, tokenizer) in encoders.items():
        shape = (len(TOKENS), encoder.config.hidden_size)
        if key not in embeddings or embeddings[key].shape != shape:
            found = tuple(embeddings[key].shape) if key in embeddings else None
            raise ValueError(f"{path.name}: {key} has shape {found}; {shape} would do")
        pipe.load_textual_inversion(
            embeddings[key], token=list(TOKENS), text_encoder=encoder, tokenizer=tokenizer
        )


@contextmanager
def lora_applied(unet: Any, scale: float) -> Iterator[None]:
    """Adds `scale` times the UNet's LoRA, if it has one, while the block runs.

    Not by the pipelines' `cross_attention_kwargs`: they multiply by the scale and divide by it
    again at every step, which rounds, and is not undone by an exception.
    """
    if not scale or LORA not in getattr(unet, "peft_config", {}):
        yield
        return
    unet.set_adapters(LORA, scale)
    unet.enable_lora()
    try:
        yield
    finally:
        unet.set_adapters(LORA, 1.0)
        unet.disable_lora()
