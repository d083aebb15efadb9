"""Every input of the model: its default, its range, and the rules between inputs.

`Request` is the one table of inputs. Validation, the command line, the README's table and the test
of predict.py's literals all derive from it, through `INPUTS`.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from math import ceil, inf, log, prod
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args

from panorama.errors import LONGEST_TEXT, shorten

SEED_BITS = 32  # torch's CPU generator reads only the low 32 bits of a seed
LONGEST_EXIF = 60_000  # bytes of the prompts as JSON, which have to fit into 64 KiB of EXIF
LARGEST_WEBP = 16383  # pixels a side

EVERY_MODE = ("syncdiffusion", "syncdiffusion-xl", "sdxl-360")
WINDOW_MODES = ("syncdiffusion", "syncdiffusion-xl")
SDXL_MODES = ("syncdiffusion-xl", "sdxl-360")
UPSCALE_STRENGTH, IMAGE_STRENGTH = 0.35, 0.6  # defaults
ALWAYS_CLOSED = ("sdxl-360",)  # closes left to right without `loop_closure`


@dataclass(frozen=True)
class SpeedSettings:
    """The defaults and limits that a value of `speed` sets."""

    num_inference_steps: int  # default
    scheduler: str | None = None  # default; None for the model's own
    sync_threshold: int = 5  # default
    takes_stride: bool = True  # False if `stride` must be left at its default


@dataclass(frozen=True, kw_only=True)
class ModeSettings:
    """The defaults and limits of a mode in a loaded family."""

    width: int  # default, pixels
    height: int  # default, pixels
    guidance_scale: float  # default
    multiple: int  # pixels, divides every width and height
    smallest: int  # least width and height in pixels, a multiple of `multiple`
    largest: float = inf  # greatest area, pixels
    window: int = 0  # side of a window in latent cells, 0 without windows
    has_lora: bool = False  # takes `lora_scale` other than 0 and the default
    tokens: tuple[str, ...] = ()  # trigger tokens of the LoRA, empty if it has none
    speed: str = "exact"  # default
    speeds: Mapping[str, SpeedSettings]  # meaning of every value of `speed`


@dataclass(frozen=True, kw_only=True)
class Input:
    """The rules of one input."""

    name: str
    kind: type[str] | type[bool] | type[int] | type[float] | type[Path]
    optional: bool  # takes None
    takes_file: bool  # takes a file, perhaps in place of text
    default: Any  # dataclasses.MISSING if a request must give it
    example: Any  # a legal value to suggest; None for none
    description: str  # one or two sentences for users
    minimum: float = -inf  # inclusive
    maximum: float = inf  # inclusive
    choices: tuple[Any, ...] = ()  # every legal value, () for any
    modes: tuple[str, ...] = EVERY_MODE  # those that take it
    needs: tuple[str, ...] = ()  # inputs of which one at least must be set, or it means nothing
    draws: bool = False  # belongs to the first stage, which enlarging an image leaves out

    @property
    def required(self) -> bool:
        """True if a request must give the input."""
        return self.default is MISSING

    @property
    def legal(self) -> str:
        """The legal values in words, such as "0 to 9", "at least 8" or "png, jpg"; "" for any."""
        limits = [str(limit) for limit in (self.minimum, self.maximum) if abs(limit) != inf]
        range_ = f"at least {limits[0]}" if len(limits) == 1 else " to ".join(limits)
        return range_ or ", ".join(map(str, self.choices))

    def check(self, value: object) -> object:
        """Return a legal value in the input's own type, such as 7 for 7.0; refuse any other."""
        if value is None and self.optional:
            return None
        checked = self._check(value)
        if self.choices and checked not in self.choices:
            raise self.refuse(value, f"be one of {', '.join(map(str, self.choices))}", self.example)
        return checked

    def _check(self, value: object) -> object:
        """Check a value's type, range and content, and return it in the input's own type."""
        number = self.kind in (int, float)
        # A string is not accepted as a file: it could name any file on this machine.
        fits = isinstance(value, int | float if number else self.kind)
        fits = fits or (self.takes_file and isinstance(value, Path))
        if not fits or (number and isinstance(value, bool)):
            raise self.refuse(value, f"be {_NOUNS[self.kind]}", self.example)
        if isinstance(value, str):
            _check_text(self, value)
        return _check_number(self, value) if number else value

    def refuse(self, value: object, rule: str, legal: object) -> ValueError:
        """Build the error for a value that must `rule`; try `legal`, None to leave it out."""
        # Do not reveal the file's folder.
        shown = shorten(value.name if isinstance(value, Path) else value)
        advice = "leave it out" if legal is None else f"try {legal!r}"
        return ValueError(f"{self.name}={shown}: must {rule}; {advice}")


_NOUNS = {
    str: "text",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    Path: "a file: a data or http URL, or @FILE in a shell",
}


def _check_number(rule: Input, value: Any) -> float:
    """Check the range of a number, and return it in the input's own type."""
    if not rule.choices and not rule.minimum <= value <= rule.maximum:  # refuses NaN too
        legal = rule.maximum if value > rule.maximum else rule.minimum
        upper = "" if rule.maximum == inf else f" and at most {rule.maximum}"
        raise rule.refuse(value, f"be at least {rule.minimum}{upper}", legal)
    if rule.kind is float:
        return float(value)
    if value % 1:  # NaN for infinity and NaN
        raise rule.refuse(value, f"be {_NOUNS[int]}", rule.example)
    return int(value)


def _check_text(rule: Input, value: str) -> None:
    """Check the content of a text input."""
    if len(value) > LONGEST_TEXT:
        raise rule.refuse(value, f"have at most {LONGEST_TEXT} characters", rule.example)
    if rule.required and not value.strip():
        raise rule.refuse(value, "not be empty", rule.example)
    if value != value.encode(errors="ignore").decode():
        raise rule.refuse(value, "be valid Unicode, without lone surrogates", rule.example)


def _input(
    description: str,
    *,
    default: Any = MISSING,
    example: Any = None,
    bounds: tuple[float, float] = (-inf, inf),
    **rules: Any,
) -> Any:
    """Declare a field of `Request`; `rules` are further fields of its `Input`."""
    rules |= {"description": description, "minimum": bounds[0], "maximum": bounds[1]}
    rules["example"] = default if example is None else example
    return field(default=default, metadata=rules)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One panorama to make, as a user asks for it.

    None leaves an input to the mode and the model family; `resolve` fills it in. The constructor
    checks what can be checked without a model.

    Raises:
        ValueError: an input has the wrong type or is out of range. The message names the input,
            its value, the rule and a legal value.
    """

    prompt: str = _input(
        "What the panorama shows. In syncdiffusion and syncdiffusion-xl, texts between vertical "
        "bars follow one another along the longer side; a bar after a backslash is literal.",
        example="sunset over snowy mountains",
    )
    negative_prompt: str = _input("What the panorama should not show.", default="")
    mode: str = _input(
        "How to make it. syncdiffusion: a wide or tall strip from overlapping windows of Stable "
        "Diffusion 2, synchronised to keep it coherent. syncdiffusion-xl: the same with SDXL, and "
        "a depth image to follow if given. sdxl-360: a 360 degree image by SDXL that always "
        "closes left to right, with or without a depth image.",
        default="syncdiffusion",
        choices=EVERY_MODE,
    )
    width: int | None = _input(
        "Width in pixels: a multiple of 8, at least one window of the model; in sdxl-360 a "
        "multiple of 32. Defaults to the width of the image or depth image. If only the height is "
        "given, the file's aspect ratio is kept. Without a file, defaults to the mode's own width.",
        default=None,
        example=1024,
        bounds=(64, 16384),
    )
    height: int | None = _input(
        "Height in pixels: a multiple of 8, at least one window of the model; in sdxl-360 a "
        "multiple of 32. Defaults to the height of the image or depth image. If only the width is "
        "given, the file's aspect ratio is kept. Without a file, defaults to the mode's own "
        "height.",
        default=None,
        example=512,
        bounds=(64, 16384),
    )
    guidance_scale: float | None = _input(
        "How closely to follow the prompt; 1 turns guidance off. Defaults to the model family's "
        "own value.",
        default=None,
        example=7.5,
        bounds=(0.0, 20.0),
    )
    sync_weight: float = _input(
        "How strongly windows are pulled towards one another; 0 turns it off.",
        default=20.0,
        bounds=(0.0, 30.0),
        modes=WINDOW_MODES,
        draws=True,
    )
    sync_decay_rate: float = _input(
        "Factor by which sync_weight is multiplied after each step.",
        default=0.99,
        bounds=(0.0, 1.0),
        modes=WINDOW_MODES,
        draws=True,
    )
    sync_freq: int = _input(
        "Synchronise at every n-th step.",
        default=1,
        bounds=(1, inf),
        modes=WINDOW_MODES,
        draws=True,
    )
    sync_threshold: int | None = _input(
        "Number of steps, counted from the first, that synchronise the windows. With speed=exact, "
        "windows also share means for eight times as many. Defaults to 5, or 8 with speed=fast.",
        default=None,
        example=5,
        bounds=(0, 200),
        modes=WINDOW_MODES,
        draws=True,
    )
    num_inference_steps: int | None = _input(
        "Number of denoising steps. Defaults to 50, or 20 with speed=fast.",
        default=None,
        example=50,
        bounds=(1, 200),
    )
    stride: int = _input(
        "Distance between neighbouring windows in latent cells of 8 pixels, at most the side of a "
        "window. Smaller is smoother and slower. Leave it out with speed=fast, which places its "
        "windows itself.",
        default=16,
        bounds=(8, inf),
        modes=WINDOW_MODES,
        draws=True,
    )
    seed: int | None = _input(
        "Seed of the noise: on one machine, the same seed and inputs give the same image. Random "
        "by default.",
        default=None,
        example=1,
        bounds=(0, 2**SEED_BITS - 1),
    )
    loop_closure: bool = _input(
        "Close the panorama into a ring along its longer side.", default=False, modes=WINDOW_MODES
    )
    speed: str | None = _input(
        "exact: the gradient of SyncDiffusion on windows that overlap, and shared means. fast: "
        "shared means alone, with fewer windows and fewer steps, about ten times cheaper. Defaults "
        "to exact in syncdiffusion and to fast in syncdiffusion-xl.",
        default=None,
        example="exact",
        choices=("exact", "fast"),
        modes=WINDOW_MODES,
    )
    scheduler: str | None = _input(
        "Solver of the denoising steps: DDIM, Euler, DPM-Solver++ 2M or UniPC. Defaults to the "
        "model's own, or to dpm++ with speed=fast.",
        default=None,
        example="ddim",
        choices=("ddim", "euler", "dpm++", "unipc"),
    )
    depth_image: Path | None = _input(
        "Depth image to follow. If the panorama closes, the edges that meet should match. "
        "Without it, only the prompt decides.",
        default=None,
        modes=SDXL_MODES,
    )
    depth_kind: str = _input(
        "What the depth image holds. nearness: brighter is nearer. inverted: brighter is farther. "
        "distance: distances in any unit, such as metres or millimetres.",
        default="nearness",
        choices=("nearness", "inverted", "distance"),
        modes=SDXL_MODES,
        needs=("depth_image",),
    )
    controlnet_conditioning_scale: float = _input(
        "How closely to follow the depth image; 0 ignores it.",
        default=0.5,
        bounds=(0.0, 2.0),
        modes=SDXL_MODES,
        needs=("depth_image",),
    )
    lora: str | Path | None = _input(
        "LoRA for SDXL to use in place of the model family's own: owner/name or "
        "owner/name/file.safetensors on the Hugging Face hub, or an https URL, if its host is "
        "allowed here.",
        default=None,
        example="owner/name/file.safetensors",
        modes=SDXL_MODES,
    )
    lora_scale: float = _input(
        "Strength of the LoRA that lora names, or else of the model family's own, if it has one; "
        "0 turns it off. While the family's own is on, TOK in the prompt stands for its trigger "
        "tokens. A prompt that contains none of them gets them at its start.",
        default=0.8,
        bounds=(0.0, 2.0),
        modes=SDXL_MODES,
    )
    image: Path | None = _input(
        "Image to start from, resized to the panorama's size if that differs. Without upscale it "
        "is redrawn as the prompt says, with upscale it is enlarged. If the panorama closes, the "
        "edges that meet should match.",
        default=None,
    )
    upscale: int = _input(
        "Enlarge the panorama by this factor, to at most 16384 pixels a side. Each doubling "
        "redraws the details through windows of the model and keeps the composition, and takes "
        "four times as long as the one before.",
        default=1,
        choices=(1, 2, 4, 8),
        modes=SDXL_MODES,
    )
    strength: float | None = _input(
        "How much of the image to redraw: 0 for nothing, 1 for everything. With upscale it applies"
        " to each doubling, which always keeps the composition. Defaults to 0.35 with upscale, and"
        " to 0.6 with an image alone.",
        default=None,
        example=0.35,
        bounds=(0.0, 1.0),
        needs=("image", "upscale"),
    )
    fix_poles: bool = _input(
        "Redraw what lies straight up and straight down as views of their own, where a 360 degree "
        "image is most distorted.",
        default=False,
        modes=("sdxl-360",),
    )
    zenith_prompt: str | None = _input(
        "What the view straight up shows. Defaults to 'looking up' followed by the prompt.",
        default=None,
        example="a blue sky",
        modes=("sdxl-360",),
        needs=("fix_poles",),
    )
    nadir_prompt: str | None = _input(
        "What the view straight down shows. Defaults to 'looking down' followed by the prompt.",
        default=None,
        example="green grass",
        modes=("sdxl-360",),
        needs=("fix_poles",),
    )
    output_format: str = _input(
        "Format of the image. webp has at most 16383 pixels a side.",
        default="png",
        choices=("png", "jpg", "webp"),
    )
    output_quality: int = _input(
        "Quality of a jpg or webp. A png is lossless, so leave this out with png.",
        default=95,
        bounds=(1, 100),
    )
    disable_safety_checker: bool = _input(
        "Return the image unchecked. Otherwise a deployment with a safety checker withholds an "
        "image that it flags.",
        default=False,
    )

    def __post_init__(self) -> None:
        for name, rule in INPUTS.items():
            object.__setattr__(self, name, rule.check(getattr(self, name)))
        _check_parts(self)
        _check_output(self)
        for name, rule in INPUTS.items():
            value = getattr(self, name)
            if value == rule.default:
                continue  # so that a client may send every input to every mode
            if self.mode not in rule.modes:
                only = ", ".join(rule.modes)
                reason = f"not be set with mode={self.mode!r}, only with {only}"
                raise rule.refuse(value, reason, rule.default)
            if rule.needs and not any(self.sets(name) for name in rule.needs):
                reason = f"not be set without {' or '.join(rule.needs)}"
                raise rule.refuse(value, reason, rule.default)
            if rule.draws and self.only_enlarges:
                reason = "not be set with image and upscale, which only enlarge the image"
                raise rule.refuse(value, reason, rule.default)

    def resolve(
        self, settings: ModeSettings, file_size: tuple[int, int] | None = None
    ) -> "ResolvedRequest":
        """Fill in what was left open, and check what depends on the family.

        Args:
            settings: the settings of the request's mode, in the family that will run it.
            file_size: width and height of the image to start from, or else of the depth image,
                if there is one.

        Raises:
            ValueError: a size, the stride, the number of the prompt's parts, the negative prompt
                or lora_scale is not legal there.
        """
        speed = settings.speeds[self.speed or settings.speed]
        sides = _sides(self, settings, file_size)
        origin = "image" if self.image else "depth_image"
        measured = {name: origin for name in sides if file_size and getattr(self, name) is None}
        _check_size(sides, settings, measured)
        _check_upscale(self, sides)
        open_inputs = {
            "guidance_scale": settings.guidance_scale,
            "num_inference_steps": speed.num_inference_steps,
            "scheduler": speed.scheduler,
            "seed": secrets.randbits(SEED_BITS),
        }
        if self.upscale > 1 or self.image:
            open_inputs["strength"] = UPSCALE_STRENGTH if self.upscale > 1 else IMAGE_STRENGTH
        if self.mode in WINDOW_MODES:
            open_inputs["speed"] = settings.speed
            if not self.only_enlarges:
                open_inputs["sync_threshold"] = speed.sync_threshold
        given = {name: value for name, value in self.inputs().items() if value is not None}
        resolved = ResolvedRequest(**open_inputs | given | sides | _resolve_lora(self, settings))
        if resolved.negative_prompt and resolved.guidance_scale == 1:
            rule = "be empty with guidance_scale=1, which ignores it"
            raise INPUTS["negative_prompt"].refuse(resolved.negative_prompt, rule, "")
        if settings.window:
            _check_stride(resolved, settings.window, speed)
            _check_room(resolved, settings)
        return resolved

    def inputs(self) -> dict[str, Any]:
        """Return every input by name, so that `Request(**request.inputs()) == request`."""
        return {name: getattr(self, name) for name in INPUTS}

    def sets(self, name: str) -> bool:
        """Return True if an input has another value than its default."""
        return bool(getattr(self, name) != INPUTS[name].default)

    @property
    def only_enlarges(self) -> bool:
        """True if the image is enlarged as it is, and not redrawn before."""
        return self.image is not None and self.upscale > 1

    def mode_inputs(self) -> dict[str, Any]:
        """Return the inputs that the mode takes, by name."""
        inputs = self.inputs().items()
        return {name: value for name, value in inputs if self.mode in INPUTS[name].modes}


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(Request):
    """A request with nothing left open, checked against the family that runs it."""

    width: int
    height: int
    guidance_scale: float
    num_inference_steps: int
    seed: int
    parts: tuple[str, ...]  # texts of the prompt's parts, with the tokens that precede them
    tokens: str = ""  # the LoRA's trigger tokens that a part was given, "" if none was
    poles: tuple[str, ...] = ()  # texts of the zenith and the nadir, () to leave them

    @property
    def closed_axis(self) -> Literal["", "x", "y"]:
        """The axis along which the panorama closes, "" for none."""
        if self.mode in ALWAYS_CLOSED:
            return "x"
        if not self.loop_closure:
            return ""
        return "x" if self.width >= self.height else "y"


def _rules(f: Field[Any]) -> Input:
    """Return the rules of a field of `Request`, whose type is T, T | None or str | Path | None."""
    kind, *others = get_args(f.type) or (f.type,)
    rules = {"optional": NoneType in others, "takes_file": Path in (kind, *others), **f.metadata}
    return Input(name=f.name, kind=kind, default=f.default, **rules)


INPUTS: Mapping[str, Input] = MappingProxyType({f.name: _rules(f) for f in fields(Request)})


def split_prompt(prompt: str) -> tuple[str, ...]:
    r"""Split a prompt at its bars, without the whitespace around them; `\|` is a literal bar."""
    parts = re.split(r"(?<!\\)\|", prompt)
    return tuple(part.replace(r"\|", "|").strip() for part in parts)


def _check_parts(request: Request) -> None:
    """Check that the mode takes several parts, if there are, and that none is empty."""
    rule, parts = INPUTS["prompt"], split_prompt(request.prompt)
    if len(parts) == 1:
        return
    if request.mode not in WINDOW_MODES:
        reason = f"have one part with mode={request.mode!r}, where one view spans everything"
    elif not all(parts):
        reason = "not have an empty part beside a bar"
    else:
        return
    raise rule.refuse(request.prompt, rf"{reason} (a literal bar is written \|)", rule.example)


def _check_room(request: ResolvedRequest, settings: ModeSettings) -> None:
    """Check that every part of the prompt is at least one window long."""
    rule, parts = INPUTS["prompt"], len(request.parts)
    sides = {"width": request.width, "height": request.height}
    longer = max(sides, key=lambda name: sides[name])  # the width if both are equal
    room = sides[longer] // settings.smallest
    if parts <= room:
        return
    reason = (
        f"not have {parts} parts with {longer}={sides[longer]}, which has room for {room}: "
        f"each needs at least one window, {settings.smallest} pixels"
    )
    enough = sides | {longer: parts * settings.smallest}
    if _nearest_size(enough, settings) != enough:
        raise rule.refuse(request.prompt, reason, rule.example)
    shown = shorten(request.prompt)
    raise ValueError(f"prompt={shown}: must {reason}; try {longer}={enough[longer]}")


def _check_output(request: Request) -> None:
    """Check that the output's format has a quality, and room for the prompts in its metadata."""
    rule, quality = INPUTS["output_quality"], request.output_quality
    if request.output_format == "png" and quality != rule.default:
        reason = "not be set with output_format='png', which is exact"
        raise rule.refuse(quality, reason, rule.default)
    poles = [request.zenith_prompt, request.nadir_prompt]
    length = len(json.dumps([request.prompt, request.negative_prompt, *poles]))
    if request.output_format == "jpg" and length > LONGEST_EXIF:
        reason = f"be 'png' or 'webp' with prompts of {length} bytes, which a JPEG cannot record"
        raise INPUTS["output_format"].refuse("jpg", reason, "png")


def _check_upscale(request: Request, sides: Mapping[str, int]) -> None:
    """Check that the enlarged panorama fits the size limit and its format."""
    rule, largest = INPUTS["upscale"], INPUTS["width"].maximum
    name, longest = max(sides.items(), key=lambda side: side[1])
    longest *= request.upscale
    if longest > largest:
        reason = f"make no side larger than {largest} pixels, with {name}={sides[name]}"
        fits = max(factor for factor in rule.choices if factor * sides[name] <= largest)
        raise rule.refuse(request.upscale, reason, fits)
    if request.output_format == "webp" and longest > LARGEST_WEBP:
        reason = f"be 'png' or 'jpg' with a side of more than {LARGEST_WEBP} pixels"
        raise INPUTS["output_format"].refuse("webp", reason, "png")


def _sides(
    request: Request, settings: ModeSettings, file_size: tuple[int, int] | None
) -> dict[str, int]:
    """Return the width and height: those given, or else the file's or the mode's own.

    Where only one is given, the other keeps the file's ratio, as closely as it can.
    """
    width, height = file_size or (settings.width, settings.height)
    own = {"width": width, "height": height}
    given = {name: getattr(request, name) for name in own if getattr(request, name) is not None}
    if file_size and len(given) == 1:
        ((name, side),) = given.items()
        (other,) = own.keys() - given.keys()
        multiple = settings.multiple if side % settings.multiple == 0 else 1
        own[other] = max(_round(own[other] * side / own[name], multiple), multiple)
    return own | given


def _check_size(
    sides: Mapping[str, int], settings: ModeSettings, measured: Mapping[str, str]
) -> None:
    """Check that `sides`, some of which were `measured` in a file, make a legal size.

    Args:
        sides: width and height.
        settings: of the mode.
        measured: from a side to the input whose file gave it.
    """
    legal, bounds = _nearest_size(sides, settings, tuple(measured)), INPUTS["width"]
    wrong = [name for name in sides if sides[name] != legal[name]]
    if not wrong:
        return
    least = max(settings.smallest, bounds.minimum)
    rule = f"be a multiple of {settings.multiple}, at least {least} and at most {bounds.maximum}"
    if prod(sides.values()) > settings.largest:
        rule += f", and at most {settings.largest} pixels in all"
    origin = {name: f" (from {file})" for name, file in measured.items()}
    found = " and ".join(f"{name}={sides[name]}{origin.get(name, '')}" for name in wrong)
    if len(measured) == len(sides) and len(wrong) == 1:
        # The other side would follow by the file's ratio, perhaps too far.
        (other,) = sides.keys() - set(wrong)
        followed = sides[other] * legal[wrong[0]] / sides[wrong[0]]
        if not least <= _round(followed, settings.multiple) <= bounds.maximum:
            wrong = list(sides)
    advice = " and ".join(f"{name}={legal[name]}" for name in wrong)
    raise ValueError(f"{found}: must {rule}; try {advice}")


def _nearest_size(
    sides: Mapping[str, int], settings: ModeSettings, measured: Sequence[str] = ()
) -> dict[str, int]:
    """Return the legal size nearest to `sides`, above all in its aspect ratio.

    A side that is legal stays, unless it is `measured` or there are too many pixels.
    """
    multiple, bounds = settings.multiple, INPUTS["width"]
    least = ceil(max(settings.smallest, bounds.minimum) / multiple) * multiple
    every = range(least, int(bounds.maximum) + 1, multiple)
    largest = int(min(settings.largest, every[-1] ** 2))
    width, height = sides["width"], sides["height"]
    stays = {
        name: side in every
        and name not in measured
        and max(width * height, side * least) <= largest
        for name, side in sides.items()
    }

    def legal_width(height: int) -> int:
        """Return the width that is nearest to the ratio at a legal height, 0 for none."""
        widest = min(every[-1], largest // height // multiple * multiple)
        nearest = width if stays["width"] else _round(width * height / sides["height"], multiple)
        return min(max(nearest, least), widest) if widest >= least else 0

    def difference(size: tuple[int, int]) -> float:
        """Return how far a size is from `sides`; the ratio counts ten times as much as the area."""
        wider, higher = log(size[0] / width), log(size[1] / height)
        return 10 * abs(wider - higher) + abs(wider + higher)

    heights = (height,) if stays["height"] else every
    sizes = [(legal_width(h), h) for h in heights]
    best = min((size for size in sizes if size[0]), key=difference)
    return {"width": best[0], "height": best[1]}


def _round(side: float, multiple: int) -> int:
    """Return the multiple nearest to a side in pixels."""
    return round(side / multiple) * multiple


def _check_stride(request: ResolvedRequest, window: int, speed: SpeedSettings) -> None:
    """Check that windows leave no gaps, and overlap on a ring.

    The windows of a ring start at even distances of at most `stride`. At the distance of a whole
    window they would touch without overlapping, and their joints would stay open.
    """
    rule, stride = INPUTS["stride"], request.stride
    largest, ring = (window - 1, " on a ring") if request.loop_closure else (window, "")
    if speed.takes_stride and stride > largest:
        reason = f"be at most {largest}{ring}, with windows of {window} latent cells"
        raise rule.refuse(stride, reason, window // 2)
    if not speed.takes_stride and stride != rule.default:
        reason = f"not be set with speed={request.speed!r}, which places its windows itself"
        raise rule.refuse(stride, reason, rule.default)


def _resolve_lora(request: Request, settings: ModeSettings) -> dict[str, Any]:
    """Return lora_scale (0 without a LoRA), and the texts with its trigger tokens inserted."""
    rule, scale = INPUTS["lora_scale"], request.lora_scale
    if request.mode in rule.modes and not settings.has_lora and request.lora is None:
        if scale not in (0, rule.default):
            raise rule.refuse(scale, "not be set with a model family without a LoRA", 0.0)
        scale = 0.0
    tokens = settings.tokens if scale and request.lora is None else ()
    plain = split_prompt(request.prompt)
    parts = tuple(_name_tokens(part, tokens) for part in plain)
    return {
        "lora_scale": scale,
        "parts": parts,
        "tokens": "".join(tokens) if parts != plain else "",
        "poles": _poles(request, parts[0], tokens) if request.fix_poles else (),
    }


def _poles(request: Request, whole: str, tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Return the texts of the zenith and the nadir: those given, or made from the prompt."""
    zenith = f"looking up {whole}", request.zenith_prompt
    nadir = f"looking down {whole}", request.nadir_prompt
    return tuple(_name_tokens(text, tokens) if text else own for own, text in (zenith, nadir))


def _name_tokens(text: str, tokens: tuple[str, ...]) -> str:
    """Put trigger tokens in place of TOK, or else before a text that names none of them."""
    if not tokens:
        return text
    every = "".join(tokens)
    text = re.sub(r"\bTOK\b", every, text)
    return text if any(token in text.lower() for token in tokens) else f"{every} {text}"
