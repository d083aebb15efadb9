"""The Cog boundary: typed inputs in, one PNG out. Nothing else imports cog.

Cog reads the signature of `predict` without running this file, so every value in it is a
literal. They repeat the table in panorama/request.py; a test holds the two equal.
"""

import logging
import os
import shutil
import sys
import time
import traceback
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from tempfile import mkdtemp
from threading import Event
from typing import TYPE_CHECKING, Any, Optional
from uuid import uuid4

from cog import BasePredictor, Input, Path

from panorama import picture, weights
from panorama.fetch import fetch
from panorama.quiet import hush_libraries
from panorama.request import Request, ResolvedRequest

if TYPE_CHECKING:
    from PIL.Image import Image

# Cog prefers its newer names, BaseRunner and run, and warns while it loads a class with these.
warnings.filterwarnings("ignore", r"(BasePredictor|Predictor\.predict\(\)) is", DeprecationWarning)


class Predictor(BasePredictor):  # type: ignore[misc]  # cog is untyped
    """Makes panoramas with what PANORAMA_FAMILY and PANORAMA_MODES name."""

    def setup(self) -> None:
        """Fetches what is missing of the family's modes, and loads them, once."""
        hush_libraries()
        from panorama import models  # not above: loading it is what has to be hushed

        family = os.environ.get("PANORAMA_FAMILY", models.DEFAULT_FAMILY)
        modes = asked_modes(family)
        bring(family, modes)
        self.models = models.load(family, modes=modes)
        checker = self.models.checker
        print(f"safety checker: {checker.name if checker else 'none'}", flush=True)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="panorama")
        self.folder = Path(mkdtemp(prefix="panorama-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def predict(
        self,
        prompt: str = Input(description="What the panorama shows."),
        negative_prompt: str = Input(description="What it should not show.", default=""),
        mode: str = Input(
            description="How it is made. syncdiffusion: a wide or tall strip of overlapping windows, kept coherent by synchronising them. sdxl-360: a 360 picture that always closes left to right, from text alone or following a depth image.",
            default="syncdiffusion",
            choices=["syncdiffusion", "sdxl-360"],
        ),
        width: Optional[int] = Input(
            description="Width in pixels: a multiple of 8, at least one window of the model; in sdxl-360 a multiple of 32. If left out, the depth image's own width, or else the mode's.",
            default=None,
            ge=64,
            le=16384,
        ),
        height: Optional[int] = Input(
            description="Height in pixels: a multiple of 8, at least one window of the model; in sdxl-360 a multiple of 32. If left out, the depth image's own height, or else the mode's.",
            default=None,
            ge=64,
            le=16384,
        ),
        guidance_scale: Optional[float] = Input(
            description="How closely to follow the prompt; in sdxl-360 at least 1. If left out, the model family's own default.",
            default=None,
            ge=0.0,
            le=20.0,
        ),
        sync_weight: float = Input(
            description="Weight of the gradient that pulls the windows towards one another. 0 turns it off.",
            default=20.0,
            ge=0.0,
            le=30.0,
        ),
        sync_decay_rate: float = Input(
            description="Factor by which that weight shrinks from one step to the next.",
            default=0.99,
            ge=0.0,
            le=1.0,
        ),
        sync_freq: int = Input(description="Synchronise at every n-th step.", default=1, ge=1),
        sync_threshold: int = Input(
            description="Number of steps, from the first on, during which to synchronise.",
            default=5,
            ge=0,
            le=200,
        ),
        num_inference_steps: Optional[int] = Input(
            description="Number of denoising steps. If left out, 50, or 20 with speed=fast.",
            default=None,
            ge=1,
            le=200,
        ),
        stride: int = Input(
            description="Distance between neighbouring windows in latent cells (of 8 pixels), at most the side of a window. Smaller is smoother and slower. speed=fast lays its windows itself, and it has to be left out.",
            default=16,
            ge=8,
        ),
        seed: Optional[int] = Input(
            description="The same seed and inputs give the same picture. If left out, a random one.",
            default=None,
            ge=0,
            le=4294967295,
        ),
        loop_closure: bool = Input(
            description="Close the panorama into a ring, along its longer side.", default=False
        ),
        speed: str = Input(
            description="exact: as the paper describes it. fast: several times cheaper, by fewer windows, fewer steps and cheaper synchronising.",
            default="exact",
            choices=["exact", "fast"],
        ),
        scheduler: Optional[str] = Input(
            description="Solver of the denoising steps: DDIM, DPM-Solver++ 2M or UniPC. If left out, the model's own, or dpm++ with speed=fast.",
            default=None,
            choices=["ddim", "dpm++", "unipc"],
        ),
        depth_image: Optional[Path] = Input(
            description="A depth image to follow, brighter is nearer. Its left and right edges should match. If left out, the picture follows the prompt alone.",
            default=None,
        ),
        controlnet_conditioning_scale: float = Input(
            description="How closely to follow the depth image. 0 gives the picture of the prompt alone.",
            default=0.5,
            ge=0.0,
            le=2.0,
        ),
        lora_scale: float = Input(
            description="Strength of the model family's LoRA, if it has one. 0 turns it off. While it is on, its tokens are put in front of a prompt that names none of them.",
            default=0.8,
            ge=0.0,
            le=2.0,
        ),
        disable_safety_checker: bool = Input(
            description="Return the picture unchecked. Otherwise a deployment that has a safety checker withholds a picture that it flags.",
            default=False,
        ),
    ) -> Path:
        """Makes one panorama and returns the path of its PNG."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        try:
            return self.make(self.resolve(inputs))
        except Exception:
            traceback.print_exc()  # Cog would report no more than the message
            raise

    def resolve(self, inputs: dict[str, Any]) -> ResolvedRequest:
        """Checks inputs against their table and against the family.

        Raises:
            ValueError: An input is not legal.
        """
        request = Request(**inputs)
        return request.resolve(self.models.settings(request.mode))

    def make(self, request: ResolvedRequest) -> Path:
        """Makes the picture, printing the seed and each step, and recording metrics.

        Returns:
            The path of a PNG, which stays until the next picture is made.
        """
        print(f"seed: {request.seed}", flush=True)
        path = self.new_path()
        clock = Stopwatch()

        def on_step(step: int, steps: int) -> None:
            print(f"step {step}/{steps}", flush=True)
            clock.lap("sample")

        image = self.generate(request, on_step)
        clock.lap("decode")
        picture.save(image, path, request, self.models.family)
        clock.lap("save")
        self.record_metric("seed", request.seed)
        for stage, seconds in clock.seconds.items():
            self.record_metric(f"seconds.{stage}", round(seconds, 3))
        return path

    def new_path(self) -> Path:
        """A path in our own folder that no picture had before, and none beside it.

        Cog reads a picture before it starts the next prediction, so older ones can go.
        """
        for old in self.folder.iterdir():
            old.unlink()
        return self.folder / f"{uuid4()}.png"

    def generate(self, request: ResolvedRequest, on_step: Callable[[int, int], None]) -> "Image":
        """Runs the models so that a cancel takes effect between two steps and nowhere else.

        Cog cancels by raising in the thread that called `predict`, at whatever line that is.
        In the midst of a step that could leave the models half changed, so the steps run in a
        thread of their own, and the one that Cog raises in only waits for it.
        """
        cancelled = Event()

        def step(k: int, steps: int) -> None:
            if cancelled.is_set():
                raise CancelledError
            on_step(k, steps)

        try:
            # The context tells Cog which prediction a printed line belongs to.
            job = self.thread.submit(copy_context().run, self.models.generate, request, step)
            while not wait([job], timeout=0.1).done:  # Cog cannot raise in a wait without end
                pass
            return job.result()
        finally:
            cancelled.set()  # the next prediction waits in the queue of the one thread


def asked_modes(family: str) -> tuple[str, ...]:
    """The modes that PANORAMA_MODES names, or all that a family has.

    Raises:
        ValueError: The family has no such mode.
    """
    offered = tuple(weights.describe(family))
    names = [name.strip() for name in os.environ.get("PANORAMA_MODES", "").split(",")]
    asked = tuple(dict.fromkeys(name for name in names if name))
    for mode in asked:
        if mode not in offered:
            raise ValueError(
                f"PANORAMA_MODES: {mode!r} must be one that the family {family} offers, "
                f"{', '.join(offered)}; {offered[0]} would do"
            )
    return asked or offered


def bring(family: str, modes: Sequence[str]) -> None:
    """Fetches and verifies what modes lack; a family that is whole needs no network."""
    lacks = weights.missing(family, modes)
    if lacks:
        print(f"{weights.home(family)} lacks {len(lacks)} files of {family}", flush=True)
        with logged():
            fetch(family, modes)
        print(f"{family} is there, verified", flush=True)


@contextmanager
def logged() -> Iterator[None]:
    """Lets a user see what this project does: Cog keeps what is printed at setup."""
    logger, handler = logging.getLogger("panorama"), logging.StreamHandler(sys.stdout)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class Stopwatch:
    """Seconds by stage: each lap belongs to the stage that it ends in."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Adds the time since the lap before to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now
