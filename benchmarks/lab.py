"""Networks of the published sizes with random weights, and the cost of their runs."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.activations import Activations, weights_of
from panorama.base_model import BaseModel
from panorama.conditioning.prompts import TextEncoder
from panorama.modes import load_bases
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.denoiser import Conditioning
from panorama.sampling.operations import TOKENS
from panorama.sampling.perceptual import LPIPS, VGG16
from panorama.sampling.presets import Preset

Figures = Iterator[tuple[str, Any]]
"""The figures of a row: names and values, each as soon as it is known."""

PUBLISHED = Path(__file__).parents[1] / "tests" / "data"
"""Configurations of the published models."""

SMALL_UNET = {"norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 16}
SMALL_SDXL = SMALL_UNET | {
    "block_out_channels": (8, 16, 16),
    "attention_head_dim": (2, 2, 2),
    "transformer_layers_per_block": (1, 1, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,  # 16 pooled channels and six sizes
}
SMALL_VAE = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
SMALL: Mapping[str, Mapping[str, Any]] = {
    "sd2/unet": SMALL_UNET
    | {"sample_size": 16, "block_out_channels": (8, 8, 16, 16), "attention_head_dim": (2,) * 4},
    "sd2/vae": SMALL_VAE,
    "sd2/text_encoder": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
    "sdxl/unet": SMALL_SDXL | {"sample_size": 16},
    "sdxl/controlnet": SMALL_SDXL | {"conditioning_embedding_out_channels": (4, 8, 8, 8)},
    "sdxl/vae": SMALL_VAE,
}
"""Changes of a dry run to the published configurations."""
SMALL_VGG = ((4,), (8,), (8,))

PATIENCE = 5.0
"""Seconds after which a call is not repeated."""


@dataclass(frozen=True)
class Cost:
    """The cost of a call."""

    seconds: float  # median of its repeats
    gigabytes: float  # the peak of its networks and of all that it allocates, 0 on CPUs
    result: Any

    def of(self, part: int, whole: int) -> float:
        """Return the seconds of `whole` steps, given that this call took `part` of them."""
        return self.seconds * whole / part


@dataclass(frozen=True)
class Lab:
    """A device, and networks on it with random weights that need no gradient."""

    device: torch.device
    dry: bool  # tiny networks and few steps: everything runs, and no figure means anything
    dtype: torch.dtype = torch.float16

    @property
    def cuda(self) -> bool:
        """True if the device is a CUDA GPU."""
        return self.device.type == "cuda"

    @cached_property
    def sd2(self) -> BaseModel:
        """Stable Diffusion 2 base in half precision, its LPIPS in single."""
        return self.build_sd2(self.dtype)

    @cached_property
    def sdxl(self) -> BaseModel:
        """SDXL base 1.0 and its ControlNet in half precision, without text encoders."""
        unet = self.network(UNet2DConditionModel.from_config, "sdxl/unet", self.dtype)
        controlnet = self.network(ControlNetModel.from_config, "sdxl/controlnet", self.dtype)
        # The family has a VAE that does not overflow in half precision.
        vae = self.network(AutoencoderKL.from_config, "sdxl/vae", self.dtype)
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        )
        return BaseModel(unet, vae, (), scheduler, controlnet=controlnet)

    def build_sd2(self, dtype: torch.dtype) -> BaseModel:
        """Build Stable Diffusion 2 base with LPIPS."""
        unet = self.network(UNet2DConditionModel.from_config, "sd2/unet", dtype)
        vae = self.network(AutoencoderKL.from_config, "sd2/vae", dtype)
        text = self.network(build_text_encoder, "sd2/text_encoder", dtype)
        scheduler = DDIMScheduler.from_config(published("sd2/scheduler"))
        perceptual = self.build(partial(LPIPS, SMALL_VGG if self.dry else VGG16), torch.float32)
        return BaseModel(unet, vae, (TextEncoder(None, text),), scheduler, perceptual=perceptual)

    def network(self, kind: Callable[[dict[str, Any]], Any], name: str, dtype: torch.dtype) -> Any:
        """Build a network with a published configuration, a smaller one in a dry run."""
        config = {**published(name), **(SMALL[name] if self.dry else {})}
        return self.build(partial(kind, config), dtype)

    def build(self, make: Callable[[], Any], dtype: torch.dtype) -> Any:
        """Build a network on the device; it gets the same weights each time."""
        torch.manual_seed(0)
        with self.device:
            return make().to(dtype).eval().requires_grad_(False)

    def run(self, base: BaseModel, settings: Settings, **options: Any) -> "Run":
        """Return a run of a base model, with options of the pipeline."""
        return Run(Pipeline(base, **options), settings)

    def load_tiny(self, dtype: torch.dtype, device: str = "") -> BaseModel:
        """Load the networks of the tiny family."""
        base = load_bases("tiny", ["syncdiffusion"], dtype)["syncdiffusion"]
        base.to(device or self.device)
        return base

    def steps(self, count: int) -> int:
        """Return a number of steps, few in a dry run."""
        return min(count, 2) if self.dry else count

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Return the bytes of tensors on the device, 0 on CPUs."""
        return torch.cuda.memory_allocated() if self.cuda else 0

    def measure(self, base: BaseModel, call: Callable[[], Any], repeats: int = 3) -> Cost:
        """Measure a call that runs the networks of a base model."""
        times: list[float] = []
        before = self.allocated()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        while len(times) < (1 if self.dry else repeats) and sum(times) < PATIENCE:
            self.synchronize()
            started = perf_counter()
            result = call()
            self.synchronize()
            times.append(perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() if self.cuda else before
        used = peak - before + sum(weight.nbytes for weight in weights_of(base))
        return Cost(median(times), used / 1e9 if self.cuda else 0.0, result)

    def compare(
        self, base: BaseModel, calls: Mapping[str, Callable[[], Any]], repeats: int = 3
    ) -> "Rounds":
        """Measure calls in turns, in another order each round; on a GPU, after one of each."""
        if self.cuda:
            for call in calls.values():
                call()
        names = list(calls)
        costs: dict[str, list[Cost]] = {name: [] for name in names}
        for turn in range(1 if self.dry else repeats):
            for name in names if turn % 2 else reversed(names):
                costs[name].append(self.measure(base, calls[name], repeats=1))
        return Rounds(costs)


@dataclass(frozen=True)
class Rounds:
    """The costs of calls by round. The speed of a machine varies, so rounds are compared."""

    costs: Mapping[str, Sequence[Cost]]

    def cost(self, name: str) -> Cost:
        """Return the median cost of a call."""
        ordered = sorted(self.costs[name], key=lambda cost: cost.seconds)
        return ordered[len(ordered) // 2]

    def ratio(self, one: str, other: str) -> float:
        """Return how many times as long one call takes as another, the median of all rounds."""
        pairs = zip(self.costs[one], self.costs[other], strict=True)
        return median(mine.seconds / theirs.seconds for mine, theirs in pairs)


@dataclass(frozen=True)
class FakeLab(Lab):
    """A lab of torch's fake tensors, which have a size and a device and no values."""

    @cached_property
    def mode(self) -> FakeTensorMode:
        """The mode that makes tensors fake."""
        return FakeTensorMode(allow_non_fake_inputs=True)

    def build(self, make: Callable[[], Any], dtype: torch.dtype) -> Any:
        """Build a network in its precision from the start: fake weights cannot be cast."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.mode:
                return make().eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(default)

    def run(self, base: BaseModel, settings: Settings, **options: Any) -> "Run":
        """Return a run whose inputs are fake too."""
        with self.mode:
            return super().run(base, settings, **options)

    def most(self, base: BaseModel, call: Callable[[], object]) -> int:
        """Return the most bytes alive at once in a call beside the weights; it checks no values."""
        with ExitStack() as stack:
            stack.enter_context(patch.object(Tensor, "isfinite", lambda x: torch.ones(1)))
            stack.enter_context(patch("panorama.images.vae.require_finite"))
            found = stack.enter_context(Activations(weights_of(base)))
            call()
        return found.most


@dataclass(frozen=True)
class Run:
    """An image of a base model with random embeddings of its prompts."""

    pipeline: Pipeline
    settings: Settings

    def __post_init__(self) -> None:
        _ = self.noise, self.conditioning  # the run keeps them, so that no measurement has them

    @cached_property
    def conditioning(self) -> Conditioning:
        """Random embeddings of a negative prompt and a prompt."""
        unet = self.pipeline.base.unet
        torch.manual_seed(0)
        normal = partial(torch.randn, device=unet.device, dtype=unet.dtype)
        pooled = None
        if unet.config.addition_embed_type:
            sizes = 6 * unet.config.addition_time_embed_dim
            channels = unet.config.projection_class_embeddings_input_dim - sizes
            pooled = normal(2, 1, channels)
        states = normal(2, 1, TOKENS, unet.config.cross_attention_dim)
        return Conditioning(states, pooled, self.settings.guidance_scale)

    @cached_property
    def noise(self) -> Tensor:
        """The noise that the image starts from."""
        return self.pipeline.noise(self.settings, torch.Generator().manual_seed(0))

    def denoise(self) -> Tensor:
        """Return the latents."""
        return self.pipeline.denoise(self.settings, self.conditioning, self.noise)

    def image(self) -> Tensor:
        """Return the image."""
        return self.pipeline.decode(self.settings, self.denoise())


def strip(
    lab: Lab,
    base: BaseModel,
    preset: Preset,
    *,
    steps: int | None = None,
    threshold: int | None = None,
    weight: float = 20.0,
    windows: int = 4,
    **options: Any,
) -> Run:
    """Return a run of a strip, by default 2048 x 512 for Stable Diffusion 2.

    Args:
        lab: where.
        base: the networks.
        preset: windows, scheduler, and the kind of synchronising.
        steps: None for the preset's.
        threshold: see `Preset.sync`; None for the preset's.
        weight: of synchronising, 0 for none.
        windows: width of the strip, in windows; two at most in a dry run.
        options: of the pipeline.
    """
    side = base.window * base.factor
    settings = Settings(
        prompt="",
        height=side,
        width=(min(windows, 2) if lab.dry else windows) * side,
        num_inference_steps=lab.steps(steps or preset.num_inference_steps),
        scheduler=preset.scheduler,
        layout=preset.layout(base.window // 4),
        sync=preset.sync(preset.sync_threshold if threshold is None else threshold, weight=weight),
    )
    return Run(Pipeline(base, **options), settings)


def time_inside(
    lab: Lab, base: BaseModel, call: Callable[[], Any]
) -> tuple[float, dict[str, float]]:
    """Return the seconds that a call takes, and those inside networks and their gradients."""
    with clocked(lab, base) as spans:
        seconds = lab.measure(base, call, repeats=1).seconds
    return seconds, {
        name: sum(lapse(*span) for span in found) for name, found in spans.items() if found
    }


@contextmanager
def clocked(lab: Lab, base: BaseModel) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """Note when calls of networks and of their gradients start and end, on the device's clock."""
    calls = {
        "UNet": [(base.unet, "forward")],
        "decoder": [(base.vae, "decode")],
        "LPIPS": [(base.perceptual, "embed"), (base.perceptual, "distance")],
        "gradients": [(torch.autograd, "grad")],
    }
    spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}

    def wrap(call: Callable[..., Any], found: list[tuple[Any, Any]]) -> Callable[..., Any]:
        def clocked_call(*arguments: Any, **options: Any) -> Any:
            start = now(lab)
            result = call(*arguments, **options)
            found.append((start, now(lab)))
            return result

        return clocked_call

    with ExitStack() as stack:
        for name, places in calls.items():
            for owner, attribute in places:
                wrapped = wrap(getattr(owner, attribute), spans[name])
                stack.enter_context(patch.object(owner, attribute, wrapped))
        yield spans


def now(lab: Lab) -> Any:
    """Return an event on the GPU, or the time on a CPU."""
    if not lab.cuda:
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def lapse(start: Any, end: Any) -> float:
    """Return the seconds between what `now` returned; the device must have come to both."""
    if isinstance(start, float):
        return float(end - start)
    return float(start.elapsed_time(end)) / 1000


def published(name: str) -> dict[str, Any]:
    """Return the configuration of a published network."""
    config: dict[str, Any] = json.loads((PUBLISHED / f"{name}.json").read_text())
    return config


def build_text_encoder(config: dict[str, Any]) -> CLIPTextModel:
    """Build a text encoder."""
    return CLIPTextModel(CLIPTextConfig(**config))
