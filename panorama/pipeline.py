"""The recipe of a panorama: encode the prompts, denoise a canvas, decode it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from panorama.base_model import BaseModel
from panorama.conditioning.lora import Lora, lora_applied
from panorama.conditioning.prompts import encode_prompts
from panorama.errors import check_least, shorten
from panorama.images.sphere import Face
from panorama.images.vae import MAX_CELLS, decode, decode_canvas, encode_canvas, resize
from panorama.sampling.canvas import Axis, Canvas
from panorama.sampling.circular import circular
from panorama.sampling.denoiser import Conditioning, DepthControl, UNetDenoiser
from panorama.sampling.gradient import frozen
from panorama.sampling.low_band import LowBand
from panorama.sampling.sampler import BATCH_SIZE, OnStep, sample
from panorama.sampling.solver import Solver, build_scheduler
from panorama.sampling.synchronize import PerceptualGradient, Synchronizer, SyncSettings
from panorama.sampling.views import Layout, Sliding, Spanning

POLE_STRENGTH = 0.5
"""The `Settings.strength` with which a pole is redrawn."""
POLE_SIGMA = 1 / 8
"""`LowBand.sigma` while a pole is redrawn, in sides of a window: only its colours are held."""
HELD_SIGMA = 1.0
"""`LowBand.sigma` while an image is refined, in latent cells: its composition is held."""
ROOM = 24e9
"""Bytes of a GPU's memory for each `BATCH_SIZE` windows that pass through the networks at once."""


@dataclass(frozen=True, eq=False)
class Settings:
    """Everything that decides what a panorama looks like, except its noise.

    Attributes:
        prompt: what it shows. A tuple has a text for each of the parts that follow one another
            along the longer side, from left to right or from top to bottom.
        height: pixels.
        width: pixels.
        closed: the axis that closes into a ring, "" for none.
        negative_prompt: what it does not show; empty without guidance.
        guidance_scale: weight of classifier-free guidance, 1 for none.
        num_inference_steps: denoising steps, at least 1.
        strength: the last share of these steps that is made from an image, in [0, 1].
        scheduler: a name in `solver.SCHEDULERS`, or any diffusers scheduler that `Solver` takes;
            None for the model's own.
        layout: the arrangement of the windows.
        sync: strength and kind of synchronising; None for none.
        depth: depth to follow, (height, width) in [0, 1], 1 is nearest.
        controlnet_conditioning_scale: how closely to follow it, 0 for not at all.
        lora: a LoRA in place of the base model's own.
        lora_scale: strength of the LoRA, if there is one.

    Raises:
        ValueError: a setting breaks its rule.
    """

    prompt: str | tuple[str, ...]
    height: int
    width: int
    closed: Axis = ""
    negative_prompt: str = ""
    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    strength: float = 1.0
    scheduler: Any = None
    layout: Layout = field(default_factory=Sliding)
    sync: SyncSettings | None = None
    depth: Tensor | None = None
    controlnet_conditioning_scale: float = 0.5
    lora: Lora | None = None
    lora_scale: float = 0.8

    @property
    def partial_steps(self) -> int:
        """The number of steps that are made from an image: at least one, unless strength is 0."""
        return max(round(self.strength * self.num_inference_steps), int(self.strength > 0))

    def __post_init__(self) -> None:
        check_least(self, guidance_scale=0, num_inference_steps=1, controlnet_conditioning_scale=0)
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"strength={self.strength}: must be at least 0 and at most 1; try 0.35"
            )
        if self.prompt == ():
            raise ValueError("prompt=(): must have at least one part; try 'night over the sea'")
        if self.negative_prompt and self.guidance_scale == 1:
            raise ValueError(
                f"negative_prompt={shorten(self.negative_prompt)}: must be empty with "
                "guidance_scale=1, which does not read it; try another guidance_scale"
            )
        if self.depth is not None and self.depth.shape != (self.height, self.width):
            raise ValueError(
                f"depth has shape {tuple(self.depth.shape)}: must be that of the image, "
                f"{(self.height, self.width)}"
            )


@dataclass(frozen=True)
class Pipeline:
    """Make panoramas with the networks of a base model. The options trade memory for time.

    The networks are changed while they run, so one thread at a time may use them; `Models` sees to
    that.
    """

    base: BaseModel
    batch_size: int | None = None  # windows at once; None for what the device has room for
    checkpointing: bool = False  # from the start; it is turned on anyway if memory runs out
    max_cells: int = MAX_CELLS  # the largest canvas that is decoded whole, see `decode_canvas`
    cuda_graphs: bool = False  # launch the networks' kernels at once, see `Graphs`

    def __post_init__(self) -> None:
        check_least(self, max_cells=1)
        if self.batch_size is not None:
            check_least(self, batch_size=1)

    def __call__(
        self,
        settings: Settings,
        generator: torch.Generator | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Make one panorama.

        Args:
            settings: what to make.
            generator: draws the initial noise; on the CPU it gives the same noise on every device.
            on_step: called after each step, see `sample`.

        Returns:
            The image (1, 3, height, width) in [0, 1], float32.

        Raises:
            ValueError: the settings do not fit the base model.
            NotFiniteError: a result is not finite.
        """
        conditioning = self.encode(settings)
        latents = self.denoise(settings, conditioning, self.noise(settings, generator), on_step)
        return self.decode(settings, latents)

    @property
    def windows_at_once(self) -> int:
        """The number of windows that pass through the networks at once.

        By default it depends on all of a GPU's memory, not on what is free, so that a seed gives
        the same image again.
        """
        if self.batch_size is not None:
            return self.batch_size
        device = self.base.unet.device
        if device.type != "cuda":
            return BATCH_SIZE
        memory = torch.cuda.get_device_properties(device).total_memory
        return BATCH_SIZE * max(1, int(memory // ROOM))

    def canvas(self, settings: Settings) -> Canvas:
        """Return the canvas of latents for an image.

        Raises:
            ValueError: the image has no whole number of latent cells, is smaller than a window, or
                its sides are not divisible as a view that wraps needs.
        """
        wraps, factor = settings.layout.wraps, self.base.factor
        multiple = factor * (self.base.divisor if wraps else 1)
        least = multiple if wraps else factor * self.base.window
        for name, size in (("height", settings.height), ("width", settings.width)):
            if size < least or size % multiple:
                legal = max(size // multiple * multiple, least)
                raise ValueError(
                    f"{name}={size}: must be a multiple of {multiple}, at least {least}; "
                    f"try {legal}"
                )
        return Canvas(settings.height // factor, settings.width // factor, settings.closed)

    def noise(self, settings: Settings, generator: torch.Generator | None = None) -> Tensor:
        """Draw the initial noise (1, C, H, W) in float32, on the UNet's device."""
        canvas, unet = self.canvas(settings), self.base.unet
        shape = (1, unet.config.in_channels, canvas.height, canvas.width)
        noise: Tensor = randn_tensor(shape, generator, unet.device, torch.float32)
        return noise

    @torch.inference_mode(False)
    def encode(self, settings: Settings) -> Conditioning:
        """Embed the prompts; ValueError if one is too long."""
        with self._lora(self.base.text_networks, settings):
            return encode_prompts(
                self.base.text_encoders,
                self.base.embed_type,
                settings.prompt,
                settings.negative_prompt,
                settings.guidance_scale,
            )

    @torch.inference_mode(False)  # synchronising needs gradients, whatever mode the caller is in
    def denoise(
        self,
        settings: Settings,
        conditioning: Conditioning,
        noise: Tensor,
        on_step: OnStep | None = None,
        *,
        x0: Tensor | None = None,
        hold: LowBand | None = None,
    ) -> Tensor:
        """Denoise a canvas.

        Args:
            settings: what to make.
            conditioning: takes the place of the prompts.
            noise: (1, C, H, W) of unit variance.
            on_step: see `sample`.
            x0: latents of an image to begin from, (1, C, H, W); `settings.strength` says how late.
            hold: see `sample`.

        Returns:
            The latents (1, C, H, W).

        Raises:
            ValueError: the settings do not fit the base model, or the conditioning has more parts
                than the canvas has room for.
        """
        base, canvas, control = self.base, self.canvas(settings), self._control(settings)
        self._check_parts(settings, conditioning.parts)
        expected = (1, base.unet.config.in_channels, canvas.height, canvas.width)
        if noise.shape != expected:
            raise ValueError(f"noise has shape {tuple(noise.shape)}: must be {expected}")
        scheduler = build_scheduler(settings.scheduler, base.scheduler)
        steps = settings.num_inference_steps
        solver = Solver(scheduler, steps, None if x0 is None else settings.partial_steps)
        if x0 is not None and not len(solver.timesteps):
            return x0
        views = settings.layout(canvas, base.window, len(solver.timesteps))
        denoise = UNetDenoiser(
            base.unet, conditioning, canvas, solver, base.factor, control, self.cuda_graphs
        )
        controlnets = [control.controlnet] if control else []
        wrapped = canvas.closed if settings.layout.wraps else ""
        with (
            self._lora({"unet": base.unet}, settings),
            circular(base.unet, *controlnets, axes=wrapped),
            frozen(*base.networks(), checkpointing=self.checkpointing) as save_memory,
        ):
            return sample(
                solver.initial(noise.to(base.unet.device, torch.float32), x0),
                views,
                denoise,
                solver,
                closed=canvas.closed,
                sync=self._synchronizer(settings.sync, denoise, canvas, solver, save_memory),
                hold=hold,
                batch_size=self.windows_at_once,
                on_step=on_step,
            )

    def refine(
        self,
        settings: Settings,
        conditioning: Conditioning,
        image: Tensor,
        generator: torch.Generator | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Enlarge an image, and draw details that it had no room for.

        Noise is added to the enlarged image, and the last steps remove it again through windows of
        the UNet's own size. The low band of the image stays, and with it the composition.

        Args:
            settings: of the enlarged image.
            conditioning: takes the place of the prompts.
            image: (1, 3, h, w) in [0, 1].
            generator: see `__call__`.
            on_step: see `sample`.

        Returns:
            The image (1, 3, height, width) in [0, 1], float32.
        """
        x0 = self.encode_image(settings, image)
        hold = LowBand(x0, HELD_SIGMA, settings.closed)
        noise = self.noise(settings, generator)
        latents = self.denoise(settings, conditioning, noise, on_step, x0=x0, hold=hold)
        return self.decode(settings, latents)

    def fix_poles(
        self,
        settings: Settings,
        image: Tensor,
        prompts: Mapping[bool, str],
        generator: torch.Generator | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Redraw what lies straight up and straight down in an equirectangular image.

        Each pole is seen in perspective, where its image is least distorted, and redrawn as an
        image of one window. What this changes is added to the image and fades out before the
        horizon, so that most of it stays as it is.

        Args:
            settings: of the image.
            image: (1, 3, height, width) in [0, 1].
            prompts: what the zenith (True) and the nadir (False) show.
            generator: see `__call__`.
            on_step: see `sample`.

        Returns:
            The image (1, 3, height, width) in [0, 1].
        """
        image = image.to(self.base.vae.device)
        plain, depth = self.pole_settings(settings), settings.depth
        for up, prompt in prompts.items():
            face = Face(up, plain.height)
            shown = face.show(image).clamp(0, 1)
            seen = None if depth is None else face.show(depth[None, None])[0, 0].clamp(0, 1)
            view = replace(plain, prompt=prompt, depth=seen)
            noise, x0 = self.noise(view, generator), self.encode_image(view, shown)
            hold = LowBand(x0, self.base.window * POLE_SIGMA)
            latents = self.denoise(view, self.encode(view), noise, on_step, x0=x0, hold=hold)
            image = face.blend(image, self.decode(view, latents) - shown)
        return image.clamp(0, 1)

    def pole_settings(self, settings: Settings) -> Settings:
        """Return the settings for the view of a pole: one window, flat, without depth."""
        side = self.base.window * self.base.factor
        return replace(
            settings,
            height=side,
            width=side,
            closed="",
            layout=Spanning(),
            sync=None,
            strength=POLE_STRENGTH,
            depth=None,
        )

    @torch.inference_mode(False)
    def encode_image(self, settings: Settings, image: Tensor) -> Tensor:
        """Encode an image (1, 3, h, w) in [0, 1], resized to that of the settings, as latents."""
        size = settings.height, settings.width
        resized = resize(image.to(self.base.vae.device), size, settings.closed)
        return encode_canvas(
            self.base.vae, resized * 2 - 1, settings.closed, max_cells=self.max_cells
        )

    @torch.inference_mode(False)
    def decode(self, settings: Settings, latents: Tensor) -> Tensor:
        """Decode latents (1, C, H, W) to the image (1, 3, H * f, W * f) in [0, 1]."""
        return self._decode(self.base.vae, settings, latents)

    @torch.inference_mode(False)
    def preview(self, settings: Settings, x0: Tensor) -> Tensor:
        """Decode the x0 of a step as `decode` does, with the tiny VAE if there is one."""
        return self._decode(self.base.tiny_vae or self.base.vae, settings, x0)

    def _decode(self, vae: Any, settings: Settings, latents: Tensor) -> Tensor:
        """Decode latents to an image in [0, 1]."""
        canvas = self.canvas(settings)
        # Where windows hang over the ends, the latents there are no edges of an image.
        moving = "" if settings.layout.wraps else canvas.moving_axes(self.base.window)
        image = decode_canvas(
            vae,
            latents,
            canvas.closed,
            extended=moving.replace(canvas.closed, ""),
            max_cells=self.max_cells,
        )
        return image.add_(1).div_(2)

    def _lora(
        self, networks: Mapping[str, Any], settings: Settings
    ) -> AbstractContextManager[None]:
        """Add the LoRA of the settings, or else the base model's own, to some networks."""
        return lora_applied(networks, settings.lora or self.base.lora, settings.lora_scale)

    def _check_parts(self, settings: Settings, parts: int) -> None:
        """Check that every part of the prompt is at least one window long."""
        window = self.base.window * self.base.factor
        name = "width" if settings.width >= settings.height else "height"
        size = max(settings.width, settings.height)
        if settings.layout.wraps:
            room, reason, advice = 1, "where one view spans the canvas", "layout=Sliding()"
        else:
            room = size // window
            reason = (
                f"with {name}={size}, which has room for {room}: each needs at least one window, "
                f"{window} pixels"
            )
            advice = f"{name}={parts * window}"
        if parts > room:
            raise ValueError(
                f"prompt={shorten(settings.prompt)}: must not have {parts} parts {reason}; "
                f"try {advice}"
            )

    def _control(self, settings: Settings) -> DepthControl | None:
        """Build the depth control, or return None if there is no depth to follow."""
        scale = settings.controlnet_conditioning_scale
        if settings.depth is None or scale == 0:
            return None
        if self.base.controlnet is None:
            raise ValueError("depth: needs a base model with a ControlNet; try depth=None")
        image = settings.depth.to(self.base.unet.device).expand(1, 3, -1, -1)  # (1, 3, H, W)
        return DepthControl(self.base.controlnet, image, scale)

    def _synchronizer(
        self,
        sync: SyncSettings | None,
        denoise: UNetDenoiser,
        canvas: Canvas,
        solver: Solver,
        save_memory: Callable[[], bool],
    ) -> Synchronizer | None:
        """Build the synchronizer, or return None without settings for it."""
        if sync is None:
            return None
        base, gradient = self.base, None
        if sync.threshold:
            vae = base.tiny_vae if sync.tiny_decoder else base.vae
            if base.perceptual is None or vae is None:
                raise ValueError(
                    "sync: its gradient needs a base model with a perceptual distance and, for "
                    "tiny_decoder, a tiny_vae; try SyncSettings(threshold=0, means=8)"
                )
            gradient = PerceptualGradient(
                denoise, lambda x: decode(vae, x), base.perceptual, solver, save_memory
            )
        return Synchronizer(sync, denoise, canvas, base.window, denoise.parts, gradient)
