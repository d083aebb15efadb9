"""Random models that run in next to no time: Stable Diffusion's shape, and smooth stand-ins."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from panorama.sampling.canvas import Canvas, View
from panorama.sampling.denoiser import Denoiser
from panorama.sampling.sampler import sample
from panorama.sampling.solver import Solver, build_scheduler
from panorama.sampling.synchronize import (
    PerceptualGradient,
    Synchronizer,
    SyncSettings,
    keep_memory,
)
from panorama.sampling.views import Layout

SD2 = Path(__file__).parents[1] / "weights" / "tiny" / "sd2"
STEPS = 6
WINDOW = 16


def small_vae() -> AutoencoderKL:
    """Return a VAE of factor 4 with attention in the middle, as Stable Diffusion's has."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=4,
    )


def small_tiny_vae(levels: int) -> AutoencoderTiny:
    """Return an AutoencoderTiny of factor 2 ** (levels - 1)."""
    torch.manual_seed(0)
    blocks, channels = (0,) * levels, (4,) * levels
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )


def small_unet() -> UNet2DConditionModel:
    """Return a UNet for windows of 16 x 16 latents, one downsampling, text of 128 channels."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def own_scheduler() -> DDIMScheduler:
    """Return the tiny family's own scheduler."""
    return DDIMScheduler.from_pretrained(SD2, subfolder="scheduler")


def make_solver(name: str | None = None, steps: int = STEPS) -> Solver:
    """Return a run of a scheduler by its name, on the tiny family's noise schedule."""
    return Solver(build_scheduler(name, own_scheduler()), steps)


def draw_noise(height: int, width: int, seed: int = 0) -> Tensor:
    """Return noise (1, 4, H, W) of unit variance in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, height, width, generator=generator, dtype=torch.float64)


@dataclass
class SavedBytes:
    """The storages that autograd keeps for a backward pass, weights aside."""

    sizes: dict[int, int] = field(default_factory=dict)  # by storage

    @property
    def total(self) -> int:
        """Return their bytes."""
        return sum(self.sizes.values())


@contextmanager
def saved_bytes(*networks: nn.Module) -> Iterator[SavedBytes]:
    """Measure what autograd keeps while the block runs, beside the weights of networks."""
    weights = {p.untyped_storage()._cdata for n in networks for p in n.parameters()}
    found, held = SavedBytes(), []  # held, or a storage's address could be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found.sizes[storage._cdata] = storage.nbytes()
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


class Networks(nn.Module):
    """Small, smooth, nonlinear stand-ins for the UNet, the decoder and the distance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.noise = nn.Conv2d(4, 4, 3, padding=1)
        self.image = nn.ConvTranspose2d(4, 3, 4, stride=4)
        self.double()

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.noise(x)) * (1 + t / 1000) + 0.1 * x

    def decode(self, x: Tensor) -> Tensor:
        return self.image(x)

    def embed(self, images: Tensor) -> list[Tensor]:
        return [images.mean((2, 3)), images.square().mean((2, 3))]

    def distance(self, images: Tensor, features: list[Tensor]) -> Tensor:
        pairs = zip(self.embed(images), features, strict=True)
        return torch.stack([(a - b).square().mean(1) for a, b in pairs]).sum(0)

    def denoiser(self, solver: Solver) -> Denoiser:
        """Return the noise prediction for latents as the solver has them."""

        def denoise(x: Tensor, t: Tensor, views: Sequence[View]) -> Tensor:
            assert len(views) == len(x)
            return self.predict_noise(solver.scale(x, t), t)

        return denoise

    def synchronizer(
        self,
        solver: Solver,
        canvas: Canvas,
        settings: SyncSettings,
        *,
        window: int = WINDOW,
        parts: int = 1,
        save_memory: Callable[[], bool] = keep_memory,
    ) -> Synchronizer:
        """Return what moves the windows of a run."""
        denoise, gradient = self.denoiser(solver), None
        if settings.threshold:
            gradient = PerceptualGradient(denoise, self.decode, self, solver, save_memory)
        return Synchronizer(settings, denoise, canvas, window, parts, gradient)

    def run(
        self,
        canvas: Canvas,
        layout: Layout,
        settings: SyncSettings | None = None,
        *,
        scheduler: str | None = None,
        window: int = WINDOW,
        noise: Tensor | None = None,
        save_memory: Callable[[], bool] = keep_memory,
        **options: Any,
    ) -> Tensor:
        """Sample a canvas."""
        solver, sync = make_solver(scheduler), None
        if settings:
            sync = self.synchronizer(
                solver, canvas, settings, window=window, save_memory=save_memory
            )
        noise = draw_noise(canvas.height, canvas.width) if noise is None else noise
        return sample(
            solver.initial(noise),
            layout(canvas, window, STEPS),
            self.denoiser(solver),
            solver,
            closed=canvas.closed,
            sync=sync,
            **options,
        )
