"""Denoising never waits for a GPU, shown on the meta device: it has no values to wait for."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from panorama.base_model import BaseModel
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.denoiser import Conditioning
from panorama.sampling.presets import EXACT, FAST, Preset
from tests import small_sd2, small_sdxl


class BlockingCopies(TorchFunctionMode):
    """Note what blocks until the CPU's values are on the device.

    Values read off the device need no note: the meta device refuses to read them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        moved = func is torch.Tensor.to and args[0].device.type == "cpu"
        blocks = func is torch.tensor or (moved and not kwargs.get("non_blocking"))
        if blocks and out.device.type == "meta":
            self.found.append(f"{func.__name__} {tuple(out.shape)}")
        return out


def blocking_copies(base: BaseModel, preset: Preset, parts: int) -> list[str]:
    """Denoise a strip after its first step on the meta device; return the copies that block."""
    base.to("meta")
    side, config = base.window * base.factor, base.unet.config
    settings = Settings(
        "",
        height=side,
        width=4 * side,
        num_inference_steps=4,
        scheduler=preset.scheduler,
        layout=preset.layout(4),
        sync=preset.sync(3) if base.perceptual else None,
    )
    sizes = 6 * (config.addition_time_embed_dim or 0)
    channels = (config.projection_class_embeddings_input_dim or 0) - sizes
    pooled = torch.empty(2, parts, channels) if config.addition_embed_type else None
    states = torch.empty(2, parts, 8, config.cross_attention_dim)
    pipeline, copies = Pipeline(base), BlockingCopies()

    def clear_after_first(step: int, *_: object) -> None:
        if step == 1:  # which brings tables to the device
            copies.found.clear()

    finite = patch.object(Tensor, "isfinite", lambda x: torch.ones(1, dtype=torch.bool))
    with finite, copies:
        conditioning = Conditioning(states, pooled, 7.5)
        pipeline.denoise(settings, conditioning, pipeline.noise(settings), clear_after_first)
    return copies.found


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("preset", [EXACT, FAST], ids=["exact", "fast"])
def test_a_step_waits_for_nothing(preset: Preset, parts: int) -> None:
    assert blocking_copies(small_sd2.build(), preset, parts) == []


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_of_sdxl_waits_for_nothing(parts: int) -> None:
    assert blocking_copies(small_sdxl.build(), FAST, parts) == []
