"""A model family, loaded: what each mode is made of, and how a request runs on it."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from panorama import weights
from panorama.base_model import BaseModel, load_base_model, weight_not_finite
from panorama.conditioning import depth as depth_images
from panorama.conditioning.depth import warn_of_open_edges
from panorama.conditioning.lora import LEGAL, Lora, LoraError, read_lora
from panorama.conditioning.prompts import check_lengths
from panorama.cost import LEAST_BOUND, MAX_COST, check_cost, estimate
from panorama.errors import check_least
from panorama.images import source
from panorama.images.files import Panorama
from panorama.images.safety import SafetyChecker
from panorama.images.vae import MAX_CELLS, to_pil
from panorama.jobs import MODES, Counter, Job, Progress, Run, stages_of, timed
from panorama.limits import Limits
from panorama.loras import Fetcher, FetchError
from panorama.pipeline import Pipeline, Settings
from panorama.quality import Range, measure, unusual
from panorama.request import INPUTS, ModeSettings, Request, ResolvedRequest, SpeedSettings
from panorama.sampling.interrupt import interruptible

DEFAULT_FAMILY = "tiny"

logger = logging.getLogger(__name__)


def keep_on() -> None:
    """Let a run go on."""


@dataclass(frozen=True)
class Models:
    """A family, loaded. `generate` turns a request into a panorama.

    One panorama is made at a time: calls from several threads wait for each other, since the
    networks are changed while they run.
    """

    family: str  # its name, or the path of its folder
    device: torch.device
    bases: Mapping[str, BaseModel]  # by mode
    defaults: Mapping[str, Mapping[str, Any]]  # inputs by mode
    checker: SafetyChecker | None = None  # every image must pass it
    fetcher: Fetcher = field(default_factory=Fetcher)  # of LoRAs that users name
    limits: Limits | None = None  # requests beyond them are logged
    usual: Mapping[str, Range] = field(default_factory=dict)  # intra_lpips by mode
    max_cost: float = inf  # of a request, see `panorama.cost`
    _lock: AbstractContextManager[Any] = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        check_least(self, max_cost=LEAST_BOUND)

    def settings(self, mode: str) -> ModeSettings:
        """Return the defaults and limits of a mode in this family.

        Raises:
            ValueError: the mode was not loaded.
        """
        check_mode(mode, self.family, self.bases)
        base, spec = self.bases[mode], MODES[mode]
        spans = all(preset.layout(1).wraps for preset in spec.presets.values())
        multiple = base.factor * (base.divisor if spans else 1)
        return ModeSettings(
            **self.defaults[mode],
            multiple=multiple,
            smallest=multiple if spans else base.window * base.factor,
            # A larger ring would be decoded in slices, which are not exact.
            largest=MAX_CELLS * base.factor**2 if spans else inf,
            window=0 if spans else base.window,
            has_lora=base.lora is not None,
            tokens=base.tokens,
            speed=spec.speed,
            speeds={
                name: SpeedSettings(
                    p.num_inference_steps, p.scheduler, p.sync_threshold, p.takes_stride
                )
                for name, p in spec.presets.items()
            },
        )

    def prepare(self, request: Request) -> Job:
        """Read and check everything that a request needs, before any work.

        Raises:
            ValueError: an input is not legal in this family.
        """
        settings = self.settings(request.mode)
        if request.depth_image and self.bases[request.mode].controlnet is None:
            rule = "not be set with a model family without a ControlNet"
            raise INPUTS["depth_image"].refuse(request.depth_image, rule, None)
        path, kind = request.depth_image, request.depth_kind
        depth = depth_images.read(path, kind) if path else None
        image = source.read(request.image) if request.image else None
        file = image or depth
        resolved = request.resolve(settings, file.size if file else None)
        if depth is not None and resolved.controlnet_conditioning_scale:
            warn_of_open_edges("depth_image", depth.values, resolved.closed_axis)
        if image is not None:
            pixels = image.pixels[0].permute(1, 2, 0).numpy()  # (H, W, 3)
            warn_of_open_edges("image", pixels, resolved.closed_axis)
        texts = {"prompt": resolved.parts, "negative_prompt": (resolved.negative_prompt,)}
        poles = zip(("zenith_prompt", "nadir_prompt"), resolved.poles, strict=False)
        texts |= {name: (text,) for name, text in poles}
        check_lengths(self.bases[request.mode].text_encoders, texts)
        cost = check_cost(resolved, settings, self.max_cost, self._cost)
        if self.limits:
            for sentence in self.limits.exceeded(resolved):
                logger.warning("%s; see %s", sentence, self.limits.card)
        return Job(resolved, depth, self._lora(request), image, cost)

    def run(
        self,
        job: Job,
        on_step: Progress | None = None,
        poll: Callable[[], None] = keep_on,
    ) -> Panorama:
        """Make the panorama of a job.

        Args:
            job: from `prepare`.
            on_step: called after every step; an exception that it raises ends the run and leaves
                the networks as they were. Previews have to pass the safety checker too.
            poll: called many times within a step; an exception that it raises also ends the run and
                leaves the networks as they were. Not called while the finished image is measured.

        Raises:
            ImageWithheldError: the safety checker flagged the image.
            NotFiniteError: a weight holds NaN, or half precision overflowed.
        """
        pipeline = Pipeline(self.bases[job.request.mode])
        generator = torch.Generator().manual_seed(job.request.seed)
        seconds: dict[str, float] = {}

        def preview(settings: Settings, x0: Tensor) -> Image.Image:
            return self._check(to_pil(pipeline.preview(settings, x0)), job.request)

        with self._lock:
            with interruptible(poll, *pipeline.base.networks()):
                stages = stages_of(job, pipeline)
                counter = Counter(stages, on_step, preview)
                image = to_pil(Run(job, pipeline, generator, counter, seconds).make(stages))
                with timed(seconds, "check"):
                    self._check(image, job.request)
            with timed(seconds, "measure"):
                quality = measure(job, pipeline, stages[-1], image)
        for sentence in unusual(quality, job.request, self.usual.get(job.request.mode)):
            logger.warning("%s", sentence)
        metadata = {**job.metadata(self.family, self.device), "quality": quality}
        return Panorama(image, job.request.closed_axis, metadata, seconds)

    def generate(self, request: Request, on_step: Progress | None = None) -> Panorama:
        """Make the panorama of a request; see `prepare` and `run`."""
        return self.run(self.prepare(request), on_step)

    def _cost(self, request: ResolvedRequest) -> float:
        """Return the cost of a request."""
        pipeline = Pipeline(self.bases[request.mode])
        stages = stages_of(Job(request), pipeline)
        whole = sum(estimate(pipeline, stage.settings, stage.steps) for stage in stages)
        return whole + sum(estimate(pipeline, stage.poles, stage.pole_steps) for stage in stages)

    def _lora(self, request: Request) -> Lora | None:
        """Fetch and read the LoRA that a request names, if it names one."""
        if request.lora is None:
            return None
        rule, networks = INPUTS["lora"], self.bases[request.mode].lora_networks
        try:
            if isinstance(request.lora, str):
                return read_lora(self.fetcher.fetch(request.lora), networks)
            return read_lora(request.lora, networks)
        except LoraError as error:
            reason = f"be {LEGAL}, not {error}"
        except FetchError as error:
            reason = str(error)
        except FileNotFoundError:
            reason = "be a file that exists"
        raise rule.refuse(request.lora, reason, rule.example)

    def _check(self, image: Image.Image, request: ResolvedRequest) -> Image.Image:
        """Return an image; raise ImageWithheldError if the safety checker flags it."""
        if self.checker and not request.disable_safety_checker:
            self.checker.check(image, request.closed_axis)
        return image


def load(
    family: str = DEFAULT_FAMILY,
    *,
    modes: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    max_cost: float | None = None,
) -> Models:
    """Load a family from local files, without a network.

    Args:
        family: its name, or the path of its folder.
        modes: those to load; None for all that the family offers.
        device: None for the GPU if there is one.
        max_cost: of a request, in guided evaluations of the UNet for one window; None for the
            device's entry in `MAX_COST`, infinity for no bound.

    Raises:
        FileNotFoundError: there is no such family.
        ValueError: the family offers no such mode, its family.toml is not legal, or max_cost is
            too small.
        WeightsError: a file of it is missing or wrong.
    """
    offered = weights.describe(family)
    modes = tuple(offered) if modes is None else tuple(modes)
    for mode in modes:
        check_mode(mode, family, offered)
    weights.verify(family, modes)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # Half precision on a GPU, single precision on a CPU, which is slower in half.
    dtype = torch.float16 if place.type == "cuda" else torch.float32
    bases = load_bases(family, modes, dtype)
    for base in bases.values():
        base.to(place)
    folder = weights.safety_checker(family)
    checker = SafetyChecker.from_pretrained(folder, dtype) if folder else None
    if checker:
        require_finite_weights(f"{family}/safety_checker", checker.model)
        checker.model.to(place)
    table = weights.limits(family)
    limits = Limits(**table) if table else None
    if max_cost is None:
        max_cost = MAX_COST.get(place.type, MAX_COST["cpu"])
    models = Models(
        family,
        place,
        bases,
        offered,
        checker,
        limits=limits,
        usual=weights.usual_ranges(family),
        max_cost=max_cost,
    )
    for mode in modes:
        check_defaults(models, mode)
    return models


def load_bases(family: str, modes: Sequence[str], dtype: torch.dtype) -> dict[str, BaseModel]:
    """Load the base model of each mode. Modes of one base model share its networks.

    They are loaded one after another: transformers and diffusers set torch's default dtype while
    they build a model, and all threads share it.
    """
    specs = [MODES[mode] for mode in modes]
    loaded = {}
    for name in dict.fromkeys(spec.base for spec in specs):
        components = dict(weights.components(family, name))
        if any(spec.synchronised for spec in specs if spec.base == name):
            components |= weights.components(family, "perceptual")
        loaded[name] = load_base_model(components, dtype)
        require_finite_weights(f"{family}/{name}", *loaded[name].networks())
    return {mode: loaded[MODES[mode].base] for mode in modes}


def require_finite_weights(place: str, *networks: Any) -> None:
    """Raise WeightsError if a weight of a network holds NaN or infinity."""
    for network in networks:
        if name := weight_not_finite(network):
            raise weights.WeightsError(
                f"{place}: the weight {name} of its {type(network).__name__} must be finite, and "
                "holds NaN or infinity; fetch or copy the file again"
            )


def check_mode(mode: str, family: str, offered: Mapping[str, Any]) -> None:
    """Raise ValueError for a mode that a family does not offer."""
    if mode not in offered:
        rule = f"be one that the family {family} offers, {', '.join(offered)}"
        raise INPUTS["mode"].refuse(mode, rule, next(iter(offered)))


def check_defaults(models: Models, mode: str) -> None:
    """Raise ValueError if a mode of a family has defaults that its networks cannot do."""
    try:
        Request(prompt="night over the sea", mode=mode).resolve(models.settings(mode))
    except ValueError as error:
        raise ValueError(f"{models.family}/family.toml: [{mode}] {error}") from error
