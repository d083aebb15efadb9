"""Texts of any length for text encoders whose context is short."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
    """Cuts texts into pieces of a text encoder's context, to be embedded one after the other.

    Args:
        tokenizer: of CLIP; its `model_max_length` is L.
        texts: of any length; the shorter ones get empty pieces, so that all have equally many.

    Returns:
        For each text its token ids (n, L), a piece a row, with start and end tokens, padded.
    """
    room = tokenizer.model_max_length - 2  # beside the start and end tokens
    pieces = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        pieces.append([ids[start : start + room] for start in range(0, len(ids), room)])
    count = max(1, *map(len, pieces))
    return [
        torch.tensor([framed(tokenizer, ids) for ids in own + [[]] * (count - len(own))])
        for own in pieces
    ]


def framed(tokenizer: Any, ids: list[int]) -> list[int]:
    """A piece between start and end tokens, padded to the whole context."""
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids))
