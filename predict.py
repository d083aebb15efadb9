"""The Cog boundary: typed inputs in, one image out. Nothing else imports cog.

Cog reads the signature of `predict` without running this file, so every value in it is a
literal. They repeat the table in panorama/request.py; a test checks this.
"""

import sys
import time
import traceback
import warnings
import weakref
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from threading import Event
from typing import TYPE_CHECKING, Optional
from uuid import uuid4

from cog import BasePredictor, CancelationException, Input, Path

from panorama.environment import load_models
from panorama.request import Request
from panorama.worker import OwnFolder, Termination, drain_seconds, hide_folders

if TYPE_CHECKING:
    from panorama.images.files import Panorama
    from panorama.jobs import Job

# Cog prefers its newer names, BaseRunner and run, and warns while it loads a class with these.
warnings.filterwarnings("ignore", r"(BasePredictor|Predictor\.predict\(\)) is", DeprecationWarning)


class Predictor(BasePredictor):  # type: ignore[misc]  # cog is untyped
    """Make panoramas with the family and modes of PANORAMA_FAMILY and PANORAMA_MODES."""

    def setup(self) -> None:
        """Fetch missing weights and load the models, once."""
        self.termination = Termination(drain_seconds())
        self.models = load_models()
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="panorama")
        self.running: Future[Panorama] | None = None
        self.open_folder()

    def open_folder(self) -> None:
        """Create the folder of images, which goes when this object does."""
        folder = OwnFolder()
        self.folder = Path(folder.path)
        self.cleanup = weakref.finalize(self, folder.remove)

    def predict(
        self,
        prompt: str = Input(
            description="What the panorama shows. In syncdiffusion and syncdiffusion-xl, texts between vertical bars follow one another along the longer side; a bar after a backslash is literal."
        ),
        negative_prompt: str = Input(description="What the panorama should not show.", default=""),
        mode: str = Input(
            description="How to make it. syncdiffusion: a wide or tall strip from overlapping windows of Stable Diffusion 2, synchronised to keep it coherent. syncdiffusion-xl: the same with SDXL, and a depth image to follow if given. sdxl-360: a 360 degree image by SDXL that always closes left to right, with or without a depth image.",
            default="syncdiffusion",
            choices=["syncdiffusion", "syncdiffusion-xl", "sdxl-360"],
        ),
        width: Optional[int] = Input(
            description="Width in pixels: a multiple of 8, at least one window of the model; in sdxl-360 a multiple of 32. Defaults to the width of the image or depth image. If only the height is given, the file's aspect ratio is kept. Without a file, defaults to the mode's own width.",
            default=None,
            ge=64,
            le=16384,
        ),
        height: Optional[int] = Input(
            description="Height in pixels: a multiple of 8, at least one window of the model; in sdxl-360 a multiple of 32. Defaults to the height of the image or depth image. If only the width is given, the file's aspect ratio is kept. Without a file, defaults to the mode's own height.",
            default=None,
            ge=64,
            le=16384,
        ),
        guidance_scale: Optional[float] = Input(
            description="How closely to follow the prompt; 1 turns guidance off. Defaults to the model family's own value.",
            default=None,
            ge=0.0,
            le=20.0,
        ),
        sync_weight: float = Input(
            description="How strongly windows are pulled towards one another; 0 turns it off.",
            default=20.0,
            ge=0.0,
            le=30.0,
        ),
        sync_decay_rate: float = Input(
            description="Factor by which sync_weight is multiplied after each step.",
            default=0.99,
            ge=0.0,
            le=1.0,
        ),
        sync_freq: int = Input(description="Synchronise at every n-th step.", default=1, ge=1),
        sync_threshold: Optional[int] = Input(
            description="Number of steps, counted from the first, that synchronise the windows. With speed=exact, windows also share means for eight times as many. Defaults to 5, or 8 with speed=fast.",
            default=None,
            ge=0,
            le=200,
        ),
        num_inference_steps: Optional[int] = Input(
            description="Number of denoising steps. Defaults to 50, or 20 with speed=fast.",
            default=None,
            ge=1,
            le=200,
        ),
        stride: int = Input(
            description="Distance between neighbouring windows in latent cells of 8 pixels, at most the side of a window. Smaller is smoother and slower. Leave it out with speed=fast, which places its windows itself.",
            default=16,
            ge=8,
        ),
        seed: Optional[int] = Input(
            description="Seed of the noise: on one machine, the same seed and inputs give the same image. Random by default.",
            default=None,
            ge=0,
            le=4294967295,
        ),
        loop_closure: bool = Input(
            description="Close the panorama into a ring along its longer side.", default=False
        ),
        speed: Optional[str] = Input(
            description="exact: the gradient of SyncDiffusion on windows that overlap, and shared means. fast: shared means alone, with fewer windows and fewer steps, about ten times cheaper. Defaults to exact in syncdiffusion and to fast in syncdiffusion-xl.",
            default=None,
            choices=["exact", "fast"],
        ),
        scheduler: Optional[str] = Input(
            description="Solver of the denoising steps: DDIM, Euler, DPM-Solver++ 2M or UniPC. Defaults to the model's own, or to dpm++ with speed=fast.",
            default=None,
            choices=["ddim", "euler", "dpm++", "unipc"],
        ),
        depth_image: Optional[Path] = Input(
            description="Depth image to follow. If the panorama closes, the edges that meet should match. Without it, only the prompt decides.",
            default=None,
        ),
        depth_kind: str = Input(
            description="What the depth image holds. nearness: brighter is nearer. inverted: brighter is farther. distance: distances in any unit, such as metres or millimetres.",
            default="nearness",
            choices=["nearness", "inverted", "distance"],
        ),
        controlnet_conditioning_scale: float = Input(
            description="How closely to follow the depth image; 0 ignores it.",
            default=0.5,
            ge=0.0,
            le=2.0,
        ),
        lora: Optional[str] = Input(
            description="LoRA for SDXL to use in place of the model family's own: owner/name or owner/name/file.safetensors on the Hugging Face hub, or an https URL, if its host is allowed here.",
            default=None,
        ),
        lora_scale: float = Input(
            description="Strength of the LoRA that lora names, or else of the model family's own, if it has one; 0 turns it off. While the family's own is on, TOK in the prompt stands for its trigger tokens. A prompt that contains none of them gets them at its start.",
            default=0.8,
            ge=0.0,
            le=2.0,
        ),
        image: Optional[Path] = Input(
            description="Image to start from, resized to the panorama's size if that differs. Without upscale it is redrawn as the prompt says, with upscale it is enlarged. If the panorama closes, the edges that meet should match.",
            default=None,
        ),
        upscale: int = Input(
            description="Enlarge the panorama by this factor, to at most 16384 pixels a side. Each doubling redraws the details through windows of the model and keeps the composition, and takes four times as long as the one before.",
            default=1,
            choices=[1, 2, 4, 8],
        ),
        strength: Optional[float] = Input(
            description="How much of the image to redraw: 0 for nothing, 1 for everything. With upscale it applies to each doubling, which always keeps the composition. Defaults to 0.35 with upscale, and to 0.6 with an image alone.",
            default=None,
            ge=0.0,
            le=1.0,
        ),
        fix_poles: bool = Input(
            description="Redraw what lies straight up and straight down as views of their own, where a 360 degree image is most distorted.",
            default=False,
        ),
        zenith_prompt: Optional[str] = Input(
            description="What the view straight up shows. Defaults to 'looking up' followed by the prompt.",
            default=None,
        ),
        nadir_prompt: Optional[str] = Input(
            description="What the view straight down shows. Defaults to 'looking down' followed by the prompt.",
            default=None,
        ),
        output_format: str = Input(
            description="Format of the image. webp has at most 16383 pixels a side.",
            default="png",
            choices=["png", "jpg", "webp"],
        ),
        output_quality: int = Input(
            description="Quality of a jpg or webp. A png is lossless, so leave this out with png.",
            default=95,
            ge=1,
            le=100,
        ),
        disable_safety_checker: bool = Input(
            description="Return the image unchecked. Otherwise a deployment with a safety checker withholds an image that it flags.",
            default=False,
        ),
    ) -> Path:
        """Make one panorama and return the path of its image."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        try:
            with self.termination.prediction():
                return self.make(self.models.prepare(Request(**inputs)))
        except Exception as error:
            # Cog would report only the message. One write is one record of its log.
            sys.stderr.write(hide_folders("".join(traceback.format_exception(error))))
            shown = hide_folders(str(error))
            if shown == str(error) or isinstance(error, ValueError):  # it names what a user gave
                raise
            raise RuntimeError(f"{type(error).__name__}: {shown}") from None

    def make(self, job: "Job") -> Path:
        """Make a panorama, print its seed, cost and steps, and record metrics.

        Returns:
            The path of an image, which stays until the next prediction.
        """
        print(f"seed: {job.request.seed}\ncost: {job.cost:.0f}", flush=True)
        panorama = self.run_cancellable(job)
        path = self.new_path(job.request.output_format)
        started = time.perf_counter()
        panorama.save(path, job.request.output_quality)
        seconds = {**panorama.seconds, "save": time.perf_counter() - started}
        self.record_metric("seed", job.request.seed)
        for stage, duration in seconds.items():
            self.record_metric(f"seconds.{stage}", round(duration, 3))
        for name, value in panorama.quality.items():
            self.record_metric(f"quality.{name}", value)
        return path

    def new_path(self, suffix: str) -> Path:
        """Return a path that no image had before, and delete the older images.

        Cog reads an image before it starts the next prediction. If something else removed the
        folder, there is a new one.
        """
        if not self.folder.is_dir():
            self.open_folder()
        for old in self.folder.iterdir():
            old.unlink()
        return self.folder / f"{uuid4()}.{suffix}"

    def run_cancellable(self, job: "Job") -> "Panorama":
        """Run a job so that a cancellation takes effect between two blocks of the networks.

        Cog cancels by raising in the thread that called `predict`, at any line. In the middle of a
        step that could leave the models half changed, so the steps run in a thread of their own,
        and the calling thread only waits.
        """
        cancelled = Event()

        def poll() -> None:
            if cancelled.is_set():
                raise CancelledError

        def on_step(step: int, steps: int, preview: object) -> None:
            print(f"step {step}/{steps}", flush=True)

        if (running := self.running) and not running.done():
            print("waiting for a cancelled prediction to stop", flush=True)
        future = None
        try:
            # The context tells Cog which prediction a printed line belongs to.
            run = self.models.run
            future = self.running = self.thread.submit(copy_context().run, run, job, on_step, poll)
            future.add_done_callback(self.forget)
            while not wait([future], timeout=0.1).done:  # Cog cannot raise in an endless wait
                if self.termination.over.is_set():
                    seconds = self.termination.seconds
                    print(f"canceled: shutting down {seconds:g} s after SIGTERM", flush=True)
                    raise CancelationException
            return future.result()
        finally:
            cancelled.set()  # the next prediction queues for the same thread
            future = None  # or an error's traceback would keep the run's tensors on the GPU

    def forget(self, future: "Future[Panorama]") -> None:
        """Let go of a run that is over, with its panorama or the frames of its error."""
        if self.running is future:
            self.running = None
