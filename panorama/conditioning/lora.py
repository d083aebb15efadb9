"""LoRAs in the format of cog-sdxl, with the tokens of pivotal tuning."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from panorama.conditioning.prompts import TextEncoder

LORA = "panorama"
"""The name of the LoRA inside the UNet."""
TOKENS = ("<s0>", "<s1>")
"""The trigger tokens that pivotal tuning taught the text encoders together with the LoRA."""


def load_lora(unet: Any, path: Path) -> None:
    """Load a LoRA into a UNet, switched off until `lora_applied`.

    diffusers' `load_lora_weights` is not used: it selects keys by the prefix `unet.` and only logs
    if none has it, and it loads weights of text encoders, which `lora_applied` does not switch.

    Args:
        unet: UNet2DConditionModel.
        path: safetensors in the format of cog-sdxl, with keys such as
            `...attn1.processor.to_q_lora.down.weight`, all of them or none with the prefix `unet.`.

    Raises:
        ValueError: only some keys have the prefix, or a weight has no place in the UNet.
    """
    weights = load_file(path)
    prefixed = sum(key.startswith("unet.") for key in weights)
    if prefixed not in (0, len(weights)):
        raise ValueError(
            f"{path.name}: all of its {len(weights)} keys must begin with unet. or none, not "
            f"{prefixed}; try a lora.safetensors of cog-sdxl"
        )
    weights = {key.removeprefix("unet."): weight for key, weight in weights.items()}
    unet.load_lora_adapter(weights, prefix=None, adapter_name=LORA)
    loaded = sum(LORA in getattr(module, "lora_A", ()) for module in unet.modules())
    if not loaded or 2 * loaded != len(weights):
        raise ValueError(
            f"{path.name}: must hold LoRA weights for this UNet and nothing else, but "
            f"{2 * loaded} of its {len(weights)} weights have a place in it; "
            "try a lora.safetensors of cog-sdxl"
        )
    unet.disable_lora()


def load_tokens(encoders: Sequence[TextEncoder], path: Path) -> None:
    """Teach text encoders the trigger tokens of pivotal tuning.

    Args:
        encoders: both of SDXL's.
        path: safetensors with `text_encoders_0` (2, D) and `text_encoders_1` (2, D'), the
            embeddings of `TOKENS`.

    Raises:
        ValueError: a key is missing, or an embedding does not fit its encoder.
    """
    embeddings = load_file(path)
    for index, encoder in enumerate(encoders):
        key, shape = f"text_encoders_{index}", (len(TOKENS), encoder.model.config.hidden_size)
        if key not in embeddings or embeddings[key].shape != shape:
            found = tuple(embeddings[key].shape) if key in embeddings else None
            raise ValueError(f"{path.name}: {key} has shape {found}; must be {shape}")
        encoder.tokenizer.add_tokens(list(TOKENS))
        encoder.model.resize_token_embeddings(len(encoder.tokenizer), mean_resizing=False)
        ids = encoder.tokenizer.convert_tokens_to_ids(list(TOKENS))
        table = encoder.model.get_input_embeddings().weight
        with torch.no_grad():
            table[ids] = embeddings[key].to(table)


@contextmanager
def lora_applied(unet: Any, scale: float) -> Iterator[None]:
    """Add `scale` times the UNet's LoRA while the block runs. Do nothing if it has none.

    diffusers' `cross_attention_kwargs` would multiply by the scale and divide by it again at every
    step, which rounds, and which an exception does not undo.
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
