"""Prompts, embedded for SD 2 or SDXL."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from panorama.errors import LONGEST_TEXT, require_finite, shorten
from panorama.sampling.denoiser import Conditioning

MAX_CONTEXTS = 8
"""Context lengths of the text encoder that a prompt may fill; each makes cross-attention longer."""


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text encoder with its tokenizer."""

    tokenizer: Any  # CLIPTokenizer; its `model_max_length` is the context length L
    model: Any  # CLIPTextModel or CLIPTextModelWithProjection

    @property
    def max_tokens(self) -> int:
        """The largest number of tokens of a prompt."""
        return MAX_CONTEXTS * room(self.tokenizer)

    def __call__(self, text: str, contexts: int) -> Any:
        """Encode a text, padded to a number of contexts n; the model returns (n, L, ...)."""
        ids = token_ids(self.tokenizer, text, contexts)  # (n, L)
        return self.model(ids.to(self.model.device), output_hidden_states=True)


Embed = Callable[[Sequence[TextEncoder], str, int], tuple[Tensor, Tensor | None]]
"""From text encoders, a text and n contexts to states (1, n * L, D) and pooled states (1, D')."""


def embed_sd2(encoders: Sequence[TextEncoder], text: str, contexts: int) -> tuple[Tensor, None]:
    """Embed a text as Stable Diffusion 2 does, by the last hidden state."""
    (encoder,) = encoders
    states = encoder(text, contexts).last_hidden_state  # (n, L, D)
    return states.flatten(0, 1)[None], None


def embed_sdxl(encoders: Sequence[TextEncoder], text: str, contexts: int) -> tuple[Tensor, Tensor]:
    """Embed a text as SDXL does (arXiv 2307.01952, section 2.1).

    The states are the penultimate hidden states of both encoders, concatenated. The pooled
    embedding is that of the second encoder, for the first context. An empty text is all zeros, as
    in SDXL's training.

    The pooled embedding is taken at the end token, unless the encoder's configuration says
    `eos_token_id` 2, as SDXL's does. transformers then takes it at the largest token id, which in
    a prompt with a LoRA's trigger tokens is the last of those. cog-sdxl trained its LoRAs this way
    (`trainer_pti.py`, transformers 4.31), so it is kept.
    """
    outputs = [encoder(text, contexts) for encoder in encoders]
    states = torch.cat([output.hidden_states[-2] for output in outputs], -1)  # (n, L, D + D')
    states, pooled = states.flatten(0, 1)[None], outputs[-1].text_embeds[:1]
    return (states, pooled) if text else (torch.zeros_like(states), torch.zeros_like(pooled))


EMBED: Mapping[str | None, Embed] = {None: embed_sd2, "text_time": embed_sdxl}
"""The way to embed prompts, by the UNet's `addition_embed_type`."""


@torch.no_grad()
def encode_prompts(
    encoders: Sequence[TextEncoder],
    embed_type: str | None,
    prompt: str | tuple[str, ...],
    negative_prompt: str,
    guidance_scale: float,
) -> Conditioning:
    """Embed the parts of a prompt and, with guidance, a negative prompt.

    A text longer than one context is embedded in contexts, one after the other. Shorter texts get
    empty contexts, so that all have one length.

    Args:
        encoders: the text encoders of the base model.
        embed_type: the `addition_embed_type` of its UNet, a key of `EMBED`.
        prompt: what the image shows, or what each of its parts shows.
        negative_prompt: what it does not show.
        guidance_scale: 1 leaves the negative prompt out.

    Raises:
        ValueError: a text is too long.
        NotFiniteError: an embedding is not finite.
    """
    texts = {"negative_prompt": (negative_prompt,), "prompt": as_parts(prompt)}
    if guidance_scale == 1:
        del texts["negative_prompt"]
    check_lengths(encoders, texts)
    every = [text for parts in texts.values() for text in parts]
    contexts = max(count_contexts(e.tokenizer, text) for e in encoders for text in every)
    embedded = [embed_parts(encoders, embed_type, parts, contexts) for parts in texts.values()]
    states = stack_groups([states for states, _ in embedded])  # (G, P, n * L, D)
    pooled = [pooled for _, pooled in embedded if pooled is not None]
    for embeddings in (states, *pooled):
        require_finite(embeddings, "the embeddings of the prompts are")
    return Conditioning(states, stack_groups(pooled) if pooled else None, guidance_scale)


def as_parts(prompt: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the texts of a prompt's parts; a string is one part."""
    return (prompt,) if isinstance(prompt, str) else prompt


def embed_parts(
    encoders: Sequence[TextEncoder], embed_type: str | None, parts: Sequence[str], contexts: int
) -> tuple[Tensor, Tensor | None]:
    """Embed P texts of n contexts; return states (P, n * L, D) and pooled (P, D') or None."""
    embedded = [EMBED[embed_type](encoders, text, contexts) for text in parts]
    pooled = [pooled for _, pooled in embedded if pooled is not None]
    return torch.cat([states for states, _ in embedded]), torch.cat(pooled) if pooled else None


def stack_groups(groups: Sequence[Tensor]) -> Tensor:
    """Repeat embeddings (1, ...) of a negative prompt for P parts; stack all to (G, P, ...).

    The last group is that of the parts, (P, ...).
    """
    return torch.stack([group.expand(groups[-1].shape) for group in groups])


def check_lengths(encoders: Sequence[TextEncoder], texts: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError if a text is too long.

    Args:
        encoders: the text encoders of the base model.
        texts: the texts of each input, by its name; a prompt has one for each part.
    """
    for name, parts in texts.items():
        for number, text in enumerate(parts, start=1):
            place = f" (part {number} of {len(parts)})" if len(parts) > 1 else ""
            if excess := find_excess(encoders, text):
                raise ValueError(
                    f"{name}={shorten(text)}{place}: must have at most {excess}; try a shorter text"
                )


def find_excess(encoders: Sequence[TextEncoder], text: str) -> str:
    """Return the bound that the length of a text exceeds, and the length; "" for none."""
    if len(text) > LONGEST_TEXT:  # a tokenizer takes hundreds of bytes of memory per character
        return f"{LONGEST_TEXT} characters, not {len(text)}"
    for encoder in encoders:
        count = len(tokenize(encoder.tokenizer, text))
        if count > encoder.max_tokens:
            return f"{encoder.max_tokens} tokens, not {count}"
    return ""


def count_contexts(tokenizer: Any, text: str) -> int:
    """Count the contexts that a text fills, at least 1."""
    return max(1, ceil(len(tokenize(tokenizer, text)) / room(tokenizer)))


def token_ids(tokenizer: Any, text: str, contexts: int) -> Tensor:
    """Cut a text into contexts of a text encoder.

    Args:
        tokenizer: CLIPTokenizer; its `model_max_length` is L.
        text: fills at most n contexts.
        contexts: the number of contexts n; the last ones may be empty.

    Returns:
        The token ids (n, L), one context a row, with start and end tokens, padded.
    """
    ids, length = tokenize(tokenizer, text), room(tokenizer)
    starts = range(0, contexts * length, length)
    return torch.tensor([add_special_tokens(tokenizer, ids[i : i + length]) for i in starts])


def room(tokenizer: Any) -> int:
    """Return the tokens of a context beside the start and end tokens."""
    return int(tokenizer.model_max_length) - 2


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, without start and end tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def add_special_tokens(tokenizer: Any, ids: list[int]) -> list[int]:
    """Put start and end tokens around the ids of a context, and pad it to its full length."""
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids))
