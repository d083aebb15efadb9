"""Request: every input of the model, its default, its range, and the rules between them.

`Request` is the one table of inputs. Validation, the command line, the README's table and the
test that holds predict.py's literals are all derived from it, through `INPUTS`.
"""

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from math import ceil, floor, inf, prod
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args, get_type_hints

from panorama import depth

SEED_BITS = 32  # torch's CPU generator looks at no more than the low 32 bits of a seed

OWN_INPUTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "syncdiffusion": (
            "sync_weight",
            "sync_decay_rate",
            "sync_freq",
            "sync_threshold",
            "stride",
            "loop_closure",
            "speed",
            "scheduler",
        ),
        "sdxl-360": ("depth_image", "controlnet_conditioning_scale", "lora_scale"),
    }
)
"""The inputs that belong to one mode alone. All others belong to every mode."""

NEEDS: Mapping[str, str] = MappingProxyType({"controlnet_conditioning_scale": "depth_image"})
"""The inputs that say how another one is used, and which: they mean nothing without it."""


@dataclass(frozen=True)
class Speed:
    """How mode syncdiffusion saves time.

    Attributes:
        num_inference_steps: Where a request leaves it open.
        scheduler: Likewise; None for the model's own.
        disjoint: Whether windows lie next to one another, elsewhere at each step but the last,
            where they overlap, rather than every `stride` cells.
        sync_on_x0: Whether synchronising leaves the UNet out of its gradient.
        sync_pooling: How many latent cells it sees as one, along either axis.
    """

    num_inference_steps: int
    scheduler: str | None = None
    disjoint: bool = False
    sync_on_x0: bool = False
    sync_pooling: int = 1


SPEEDS: Mapping[str, Speed] = MappingProxyType(
    {
        "exact": Speed(num_inference_steps=50),
        "fast": Speed(20, "dpm++", disjoint=True, sync_on_x0=True, sync_pooling=2),
    }
)
"""What the values of the input `speed` stand for."""

SCHEDULERS = ("ddim", "dpm++", "unipc")

ALWAYS_CLOSED = ("sdxl-360",)
"""The modes whose pictures close left to right without being asked to."""


@dataclass(frozen=True)
class ModeSettings:
    """What a mode of one model family asks and offers, read from the family's own files.

    Attributes:
        width: The mode's own width, pixels.
        height: The mode's own height, pixels.
        guidance_scale: The family's default.
        multiple: Widths and heights are multiples of it, pixels.
        smallest: The least width and height, pixels, a multiple of `multiple`.
        largest: The largest area, pixels; inf where nothing sets a bound.
        least_guidance: The least guidance_scale that there is a meaning to.
        window: Side of the square windows on the canvas, latent cells, where there are windows.
        tokens: Words that the LoRA listens to, if it has any; a prompt has to name one.
    """

    width: int
    height: int
    guidance_scale: float
    multiple: int
    smallest: int
    largest: float = inf
    least_guidance: float = 0.0
    window: int = 0
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Input:
    """The rules of one input.

    Attributes:
        name: As clients write it.
        kind: str, bool, int, float or Path.
        optional: Whether None is allowed.
        default: What holds where a request does not say; `dataclasses.MISSING` if it must say.
        minimum: Smallest number, inclusive; -inf for what is not a number.
        maximum: Largest number, inclusive; inf where only the model sets a bound, or nothing.
        choices: All there are, or () if there is no list.
        modes: Those that it belongs to.
        description: One or two sentences for users.
    """

    name: str
    kind: type[str] | type[bool] | type[int] | type[float] | type[Path]
    optional: bool
    default: Any
    minimum: float
    maximum: float
    choices: tuple[str, ...]
    modes: tuple[str, ...]
    description: str

    @property
    def required(self) -> bool:
        """Whether a request must give it."""
        return self.default is MISSING

    @property
    def range(self) -> str:
        """The range of a number, in words."""
        upto = "" if self.maximum == inf else f" and at most {self.maximum}"
        return f"at least {self.minimum}{upto}"

    def check(self, value: object) -> None:
        """Checks type and range.

        Raises:
            ValueError: With the name, the value, the rule and a value that would do.
        """
        if value is None and self.optional:
            return
        _CHECKS[self.kind](self, value)

    def check_mode(self, value: object, mode: str) -> None:
        """Checks that the input belongs to a mode, or was left at its default.

        Clients that send every input, each with its published default, so can use any mode.

        Raises:
            ValueError: As for `check`.
        """
        if mode not in self.modes and value != self.default:
            rule = f"be left out with mode={mode!r}, as it belongs to {', '.join(self.modes)}"
            raise self.refuse(value, rule, self.default)

    def check_need(self, value: object, inputs: Mapping[str, object]) -> None:
        """Checks that the input which this one is about is there, or this one at its default.

        Raises:
            ValueError: As for `check`.
        """
        need = NEEDS.get(self.name)
        if need and inputs[need] is None and value != self.default:
            raise self.refuse(value, f"be left out without {need}", self.default)

    def refuse(self, value: object, rule: str, legal: object) -> ValueError:
        """The error to raise: names the input, its value, the rule, and a value that would do.

        Of a file it says the name and not the folder, which only this machine knows.
        """
        shown = value.name if isinstance(value, Path) else value
        return ValueError(f"{self.name}={shown!r}: {self.name} must {rule}; {legal!r} would do")


def _check_bool(rule: Input, value: object) -> None:
    if not isinstance(value, bool):
        raise rule.refuse(value, "be true or false", rule.default)


def _check_number(rule: Input, value: object) -> None:
    kinds, noun = ((int,), "an integer") if rule.kind is int else ((int, float), "a number")
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise rule.refuse(value, f"be {noun}", rule.default)
    if not value >= rule.minimum:  # rather than <, so that NaN is refused too
        raise rule.refuse(value, f"be {rule.range}", rule.minimum)
    if value > rule.maximum:
        raise rule.refuse(value, f"be {rule.range}", rule.maximum)


def _check_text(rule: Input, value: object) -> None:
    legal = "sunset over snowy mountains" if rule.required else rule.default
    if not isinstance(value, str):
        raise rule.refuse(value, "be text", legal)
    if rule.choices and value not in rule.choices:
        raise rule.refuse(value, f"be one of {', '.join(rule.choices)}", legal)
    if rule.required and not value.strip():
        raise rule.refuse(value, "not be empty", legal)
    if value != value.encode(errors="ignore").decode():
        raise rule.refuse(value, "be text that UTF-8 can hold", legal)


def _check_file(rule: Input, value: object) -> None:
    """A text is no file: it could name any file of the machine that runs the model."""
    if not isinstance(value, Path):
        way = "be a file, sent as a data or http URL, or as @FILE on the command line"
        raise rule.refuse(value, way, rule.default)


_CHECKS = {
    str: _check_text,
    bool: _check_bool,
    int: _check_number,
    float: _check_number,
    Path: _check_file,
}


def _input(
    description: str,
    *,
    default: Any = MISSING,
    minimum: float = -inf,
    maximum: float = inf,
    choices: tuple[str, ...] = (),
) -> Any:
    rules = {
        "description": description,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
    }
    return field(default=default, metadata=rules)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One panorama to make, as asked. Constructing it checks what no model is needed for.

    None stands for what the mode and the model family like best; `resolve` fills it in.

    Raises:
        ValueError: An input has the wrong type or is out of its range. The message names the
            input, its value, the rule, and a value that would do.
    """

    prompt: str = _input("What the panorama shows.")
    negative_prompt: str = _input("What it should not show.", default="")
    mode: str = _input(
        "How it is made. syncdiffusion: a wide or tall strip of overlapping windows, kept "
        "coherent by synchronising them. sdxl-360: a 360 picture that always closes left to "
        "right, from text alone or following a depth image.",
        default="syncdiffusion",
        choices=tuple(OWN_INPUTS),
    )
    width: int | None = _input(
        "Width in pixels: a multiple of 8, at least one window of the model; in sdxl-360 a "
        "multiple of 32. If left out, the depth image's own width, or else the mode's.",
        default=None,
        minimum=64,
        maximum=16384,
    )
    height: int | None = _input(
        "Height in pixels: a multiple of 8, at least one window of the model; in sdxl-360 a "
        "multiple of 32. If left out, the depth image's own height, or else the mode's.",
        default=None,
        minimum=64,
        maximum=16384,
    )
    guidance_scale: float | None = _input(
        "How closely to follow the prompt; in sdxl-360 at least 1. If left out, the model "
        "family's own default.",
        default=None,
        minimum=0.0,
        maximum=20.0,
    )
    sync_weight: float = _input(
        "Weight of the gradient that pulls the windows towards one another. 0 turns it off.",
        default=20.0,
        minimum=0.0,
        maximum=30.0,
    )
    sync_decay_rate: float = _input(
        "Factor by which that weight shrinks from one step to the next.",
        default=0.99,
        minimum=0.0,
        maximum=1.0,
    )
    sync_freq: int = _input("Synchronise at every n-th step.", default=1, minimum=1)
    sync_threshold: int = _input(
        "Number of steps, from the first on, during which to synchronise.",
        default=5,
        minimum=0,
        maximum=200,
    )
    num_inference_steps: int | None = _input(
        "Number of denoising steps. If left out, 50, or 20 with speed=fast.",
        default=None,
        minimum=1,
        maximum=200,
    )
    stride: int = _input(
        "Distance between neighbouring windows in latent cells (of 8 pixels), at most the "
        "side of a window. Smaller is smoother and slower. speed=fast lays its windows itself, and "
        "it has to be left out.",
        default=16,
        minimum=8,
    )
    seed: int | None = _input(
        "The same seed and inputs give the same picture. If left out, a random one.",
        default=None,
        minimum=0,
        maximum=2**SEED_BITS - 1,
    )
    loop_closure: bool = _input(
        "Close the panorama into a ring, along its longer side.", default=False
    )
    speed: str = _input(
        "exact: as the paper describes it. fast: several times cheaper, by fewer windows, fewer "
        "steps and cheaper synchronising.",
        default="exact",
        choices=tuple(SPEEDS),
    )
    scheduler: str | None = _input(
        "Solver of the denoising steps: DDIM, DPM-Solver++ 2M or UniPC. If left out, the model's "
        "own, or dpm++ with speed=fast.",
        default=None,
        choices=SCHEDULERS,
    )
    depth_image: Path | None = _input(
        "A depth image to follow, brighter is nearer. Its left and right edges should match. "
        "If left out, the picture follows the prompt alone.",
        default=None,
    )
    controlnet_conditioning_scale: float = _input(
        "How closely to follow the depth image. 0 gives the picture of the prompt alone.",
        default=0.5,
        minimum=0.0,
        maximum=2.0,
    )
    lora_scale: float = _input(
        "Strength of the model family's LoRA, if it has one. 0 turns it off. While it is on, "
        "its tokens are put in front of a prompt that names none of them.",
        default=0.8,
        minimum=0.0,
        maximum=2.0,
    )
    disable_safety_checker: bool = _input(
        "Return the picture unchecked. Otherwise a deployment that has a safety checker "
        "withholds a picture that it flags.",
        default=False,
    )

    def __post_init__(self) -> None:
        for name, rule in INPUTS.items():
            value = getattr(self, name)
            rule.check(value)
            if rule.kind is float and value is not None:
                object.__setattr__(self, name, float(value))
        for name, rule in INPUTS.items():
            rule.check_mode(getattr(self, name), self.mode)
            rule.check_need(getattr(self, name), self.inputs())
        _check_speed(self)

    def resolve(self, settings: ModeSettings) -> "ResolvedRequest":
        """Fills in what was left open, then checks what depends on the family.

        Args:
            settings: Of this request's mode, in the family that is going to run it.

        Raises:
            ValueError: As for the class: a size, the stride, a ring that cannot close, or a
                depth image that cannot be read.
        """
        own = {
            "width": settings.width,
            "height": settings.height,
            "guidance_scale": settings.guidance_scale,
            "num_inference_steps": SPEEDS[self.speed].num_inference_steps,
            "scheduler": SPEEDS[self.speed].scheduler,
            "seed": secrets.randbits(SEED_BITS),
        }
        given = {name: value for name, value in self.inputs().items() if value is not None}
        resolved = ResolvedRequest(
            **own
            | _depth_sizes(self, settings)
            | given
            | {"lora_scale": _lora_scale(self, settings), "tokens": _tokens(self, settings)}
        )
        for name, check in _FAMILY_CHECKS.items():
            if self.mode in INPUTS[name].modes:
                check(resolved, settings)
        return resolved

    def inputs(self) -> dict[str, Any]:
        """Every input by name: what `Request(**inputs)` makes this request from again."""
        return {name: getattr(self, name) for name in INPUTS}

    def mode_inputs(self) -> dict[str, Any]:
        """The inputs that belong to the mode, by name; the others are at their defaults."""
        inputs = self.inputs().items()
        return {name: value for name, value in inputs if self.mode in INPUTS[name].modes}


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(Request):
    """A request with nothing left open, checked against the family that runs it.

    Attributes:
        tokens: The LoRA's tokens that go in front of the prompt; "" for none.
    """

    width: int
    height: int
    guidance_scale: float
    num_inference_steps: int
    seed: int
    tokens: str = ""

    @property
    def full_prompt(self) -> str:
        """The prompt, after the tokens that go in front of it."""
        return f"{self.tokens} {self.prompt}" if self.tokens else self.prompt

    @property
    def closed_axis(self) -> Literal["x", "y"] | None:
        """The axis along which the panorama closes, if it does: a ring's is its longer side."""
        if self.mode in ALWAYS_CLOSED:
            return "x"
        if not self.loop_closure:
            return None
        return "x" if self.width >= self.height else "y"


def _inputs() -> Mapping[str, Input]:
    types = get_type_hints(Request)
    table = {}
    for f in dataclasses.fields(Request):
        options = get_args(types[f.name]) or (types[f.name],)
        table[f.name] = Input(
            name=f.name,
            kind=next(t for t in options if t is not NoneType),
            optional=NoneType in options,
            default=f.default,
            modes=tuple(m for m, own in OWN_INPUTS.items() if f.name in own) or tuple(OWN_INPUTS),
            **f.metadata,
        )
    return MappingProxyType(table)


INPUTS = _inputs()


def check_size(name: str, size: int, multiple: int, smallest: int) -> None:
    """Checks a width or a height, pixels.

    Args:
        name: "width" or "height".
        size: What is asked for.
        multiple: Of what it has to be a multiple.
        smallest: The least that the model can make, a multiple too.

    Raises:
        ValueError: As for `Request`.
    """
    if size < smallest:
        rule = f"be at least {smallest}, the least that the model can make"
        raise INPUTS[name].refuse(size, rule, smallest)
    if size % multiple:
        raise INPUTS[name].refuse(size, f"be a multiple of {multiple}", size // multiple * multiple)


def check_guidance(guidance_scale: float, negative_prompt: str, least: float) -> None:
    """Checks that the guidance has a meaning, and that a negative prompt is read.

    Args:
        guidance_scale: Weight of classifier-free guidance; 1 is none.
        negative_prompt: What only guidance reads.
        least: The least guidance_scale that there is a meaning to.

    Raises:
        ValueError: As for `Request`.
    """
    if not guidance_scale >= least:
        rule = f"be at least {least}, which is no guidance, in this mode"
        raise INPUTS["guidance_scale"].refuse(guidance_scale, rule, least)
    if negative_prompt and guidance_scale == 1:
        rule = f"be empty with guidance_scale={guidance_scale}, at which nothing reads it"
        raise INPUTS["negative_prompt"].refuse(negative_prompt, rule, "")


def _check_speed(request: Request) -> None:
    """A stride is of windows that overlap."""
    rule = INPUTS["stride"]
    if SPEEDS[request.speed].disjoint and request.stride != rule.default:
        reason = f"be left out with speed={request.speed!r}, which lays its windows itself"
        raise rule.refuse(request.stride, reason, rule.default)


def _tokens(request: Request, settings: ModeSettings) -> str:
    """The LoRA's tokens, if the LoRA is on and the prompt names none of them."""
    named = any(token in request.prompt for token in settings.tokens)
    return "" if named or not request.lora_scale else "".join(settings.tokens)


def _lora_scale(request: Request, settings: ModeSettings) -> float:
    """The scale that is asked for; where there is no LoRA, 0 stands for the default."""
    rule = INPUTS["lora_scale"]
    idle = request.mode in rule.modes and not settings.tokens and request.lora_scale == rule.default
    return 0.0 if idle else request.lora_scale


def _depth_sizes(request: Request, settings: ModeSettings) -> dict[str, int]:
    """The depth image's own width and height, as far as the request leaves them open."""
    if request.depth_image is None:
        return {}
    height, width = depth.read(request.depth_image).shape
    given = {"width": request.width, "height": request.height}
    own = {"width": width, "height": height}
    sizes = {name: size for name, size in own.items() if given[name] is None}
    if not sizes:
        return {}
    across = prod(size for size in given.values() if size is not None)
    legal = _nearest(sizes, settings, settings.largest / across)
    if sizes != legal:
        advice = " and ".join(f"{name}={size}" for name, size in legal.items())
        area = "" if settings.largest == inf else f" and make up to {settings.largest} pixels"
        raise ValueError(
            f"depth_image has {width} x {height} pixels: width and height must be multiples of "
            f"{settings.multiple} from {_least(settings)} to {INPUTS['width'].maximum}{area}; "
            f"{advice} would do"
        )
    return sizes


def _least(settings: ModeSettings) -> int:
    """The least width and height that are legal, pixels."""
    least = max(settings.smallest, INPUTS["width"].minimum)
    return ceil(least / settings.multiple) * settings.multiple


def _nearest(sizes: Mapping[str, int], settings: ModeSettings, largest: float) -> dict[str, int]:
    """The legal sizes, by name, that are nearest to some; smaller alike if `largest` asks for it.

    Args:
        sizes: width, height or both, pixels.
        settings: of the mode.
        largest: what they may make when multiplied.
    """
    multiple, least, most = settings.multiple, _least(settings), INPUTS["width"].maximum

    def legal(size: float, whole: Callable[[float], int]) -> int:
        return int(min(max(whole(size / multiple) * multiple, least), most // multiple * multiple))

    near = {name: legal(size, round) for name, size in sizes.items()}
    if (area := prod(near.values())) <= largest:
        return near
    shrink = (largest / area) ** (1 / len(near))
    return {name: legal(size * shrink, floor) for name, size in near.items()}


def _check_sizes(request: ResolvedRequest, settings: ModeSettings) -> None:
    """Sizes are whole latent cells, large enough for the model, and not too large together."""
    sizes = {"width": request.width, "height": request.height}
    for name, size in sizes.items():
        check_size(name, size, settings.multiple, settings.smallest)
    if prod(sizes.values()) > settings.largest:
        (across, shorter), (name, longer) = sorted(sizes.items(), key=lambda item: item[1])
        legal = int(settings.largest / shorter) // settings.multiple * settings.multiple
        rule = f"be at most {legal} with {across}={shorter}, for {settings.largest} pixels in all"
        raise INPUTS[name].refuse(longer, rule, legal)


def _check_stride(request: ResolvedRequest, settings: ModeSettings) -> None:
    """Beyond a window's side there would be gaps between the windows."""
    if not SPEEDS[request.speed].disjoint and request.stride > settings.window:
        rule = f"be at most {settings.window}, the side of a window in latent cells"
        raise INPUTS["stride"].refuse(request.stride, rule, settings.window)


def _check_ring(request: ResolvedRequest, settings: ModeSettings) -> None:
    """Around a ring there are windows enough to overlap, or the joints between them stay open.

    They start at even distances of at most `stride` cells. At a whole window's distance they
    would touch and not overlap. Any ring of at least one window will do: a ring of just one is
    laid at least twice, and each window covers the other's joint.
    """
    overlapping = not SPEEDS[request.speed].disjoint
    if overlapping and request.loop_closure and request.stride >= settings.window:
        rule = f"be less than {settings.window} on a ring: it would have too few windows to close"
        raise INPUTS["stride"].refuse(request.stride, rule, settings.window // 2)


def _check_guidance(request: ResolvedRequest, settings: ModeSettings) -> None:
    """The guidance is one that the mode knows, and reads the negative prompt."""
    check_guidance(request.guidance_scale, request.negative_prompt, settings.least_guidance)


def _check_lora(request: ResolvedRequest, settings: ModeSettings) -> None:
    """There is a LoRA for the scale to be of."""
    if request.lora_scale and not settings.tokens:
        rule = "be left out with a model family that has no LoRA"
        raise INPUTS["lora_scale"].refuse(request.lora_scale, rule, 0.0)


_FAMILY_CHECKS = {
    "width": _check_sizes,
    "guidance_scale": _check_guidance,
    "stride": _check_stride,
    "loop_closure": _check_ring,
    "lora_scale": _check_lora,
}
"""What is checked against the family, by the input that it is about."""
