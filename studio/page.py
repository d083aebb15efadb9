"""The page: a form with every input, the progress of a run, and its result in the viewer."""

import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any
from uuid import uuid4

import gradio as gr
from PIL import Image, ImageChops

from panorama.images.files import closed_axis, metadata_of, read_whole
from panorama.images.viewer import PAGE, page
from panorama.request import INPUTS, Request
from studio.backends import Backend
from studio.fields import BY_DEFAULT, COMMON, Field, build_field, named_inputs, read_inputs

RESULTS = "results"  # the path of the folder of results, as a URL
PREVIEW_SECONDS = 1.0  # from one preview to the next
DEPTH = Path(__file__).parents[1] / "docs" / "depth.png"
ROOM = "hdri view, bedroom in the color of green"
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # by the format of a file
EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "A ring": {"prompt": "sunset over volcanic land", "loop_closure": True, "speed": "fast"},
    "From night to dawn": {
        "prompt": "night over the sea | dawn over the sea",
        "width": 1024,
        "speed": "fast",
    },
    "A strip of SDXL": {"mode": "syncdiffusion-xl", "prompt": "hdri view, dawn over green hills"},
    "A room": {"mode": "sdxl-360", "prompt": ROOM},
    "A room by its depth": {"mode": "sdxl-360", "prompt": ROOM, "depth_image": str(DEPTH)},
}
"""Inputs by what to call them, in words that the family `tiny` knows."""
CSS = """
.gradio-container { max-width: 1500px !important; margin: auto; }
.field { gap: 4px; }
[data-testid="block-info"] { color: var(--body-text-color) !important; }
.field .html-container { padding: 0 4px; }
.fields:not(:has(.field)) { display: none; }
.description * { font-size: 12px; }
summary { cursor: pointer; }
.field:has(.problem) { border-left: 4px solid #c62828; padding-left: 8px; }
.problem * { color: #c62828; overflow-wrap: anywhere; }
.result iframe { width: 100%; aspect-ratio: 16 / 9; border: 0; background: #000; }
.result img, progress { width: 100%; }
"""


class StoppedError(Exception):
    """The user stopped the run."""


@dataclass(frozen=True)
class Step:
    """A step that is done."""

    number: int
    total: int
    preview: Image.Image | None  # None to keep showing the last one


def run(backend: Backend, request: Request, stopped: Event) -> Iterator[Step | bytes]:
    """Yield the steps of a run as they are done, then the bytes of its file.

    Raises:
        StoppedError: `stopped` was set.
        ValueError: an input is not legal.
    """
    events: SimpleQueue[Step | bytes | Exception] = SimpleQueue()
    shown = 0.0  # when the last preview was made

    def on_step(number: int, total: int, preview: Callable[[], Image.Image] | None) -> None:
        nonlocal shown
        image = None
        if preview and time.monotonic() - shown >= PREVIEW_SECONDS:
            image, shown = preview(), time.monotonic()
        events.put(Step(number, total, image))

    def poll() -> None:
        if stopped.is_set():
            raise StoppedError

    def work() -> None:
        try:
            events.put(backend.make(request, on_step, poll))
        except Exception as error:
            events.put(error)

    Thread(target=work, daemon=True).start()
    while isinstance(event := events.get(), Step):
        yield event
    try:
        if isinstance(event, Exception):
            raise event
        yield event
    finally:
        del event  # an error holds this frame, and all that the run had on the GPU


class Studio:
    """The page on a backend.

    Args:
        backend: what makes the panoramas.
        folder: where the results are written, to be served as `RESULTS`.
    """

    def __init__(self, backend: Backend, folder: Path) -> None:
        self.backend, self.folder = backend, folder
        self.running: dict[str | None, Event] = {}  # what stops a run, by the session of its page
        self.blocks = gr.Blocks(title="panorama", analytics_enabled=False)
        with self.blocks, gr.Row():
            with gr.Column(scale=2, min_width=340):
                self.build_form()
            with gr.Column(scale=3, min_width=340):
                self.build_result()
            self.connect()

    def build_form(self) -> None:
        """Build the fields, the buttons and the examples."""
        modes = self.backend.modes
        default = INPUTS["mode"].default
        start = default if default in modes else modes[0]
        self.fields: dict[str, Field] = {}

        def add(name: str) -> None:
            choices = modes if name == "mode" else INPUTS[name].choices
            self.fields[name] = build_field(INPUTS[name], start, choices)

        common = [name for row in COMMON for name in row]
        for row in COMMON:
            with gr.Row(elem_classes="fields"):
                for name in row:
                    add(name)
        with gr.Row():
            self.start = gr.Button("Make the panorama", variant="primary")
            self.stop = gr.Button("Stop", interactive=False)
        examples = {k: v for k, v in EXAMPLES.items() if v.get("mode", default) in modes}
        shown = [name for name in common if any(name in inputs for inputs in examples.values())]
        gr.Examples(
            [[inputs.get(name, empty(name)) for name in shown] for inputs in examples.values()],
            [self.fields[name].component for name in shown],
            example_labels=list(examples),
        )
        with gr.Accordion("More inputs", open=False) as self.more, gr.Row():
            for name in INPUTS:
                if name not in common:
                    add(name)

    def build_result(self) -> None:
        """Build what shows the progress of a run, its error and its result."""
        self.progress = gr.HTML(visible=False)
        self.problem = gr.HTML(visible=False, elem_id="problem", elem_classes="problem")
        self.preview = gr.Image(
            visible=False, label="Preview", interactive=False, format="jpeg", buttons=[]
        )
        self.result = gr.HTML("The panorama appears here.", elem_classes="result")
        self.again = gr.Button("Again with these inputs and this seed", size="sm", visible=False)
        self.made = gr.State({})  # the inputs of the result, with its seed

    def connect(self) -> None:
        """Connect the components with the methods."""
        fields = self.fields.values()
        components = [field.component for field in fields]
        prompt, mode = self.fields["prompt"].component, self.fields["mode"].component
        outputs = [
            *(field.note for field in fields),
            *(self.more, self.start, self.stop, self.progress, self.problem),
            *(self.preview, self.result, self.again, self.made),
        ]
        # One run at a time: further ones wait.
        make = {"concurrency_limit": 1, "show_progress": "hidden", "trigger_mode": "once"}
        run = gr.on([self.start.click, prompt.submit], self.make, set(components), outputs, **make)
        # Not before the run is over: Gradio would drop a click.
        run.then(self.be_ready, None, [self.start, self.stop], queue=False)
        self.stop.click(self.end, queue=False)
        self.blocks.unload(self.end)
        mode.change(self.show_mode, mode, [field.box for field in fields], queue=False)
        self.again.click(self.fill_in, self.made, components, queue=False)

    def make(self, values: Mapping[Any, Any], session: gr.Request) -> Iterator[Any]:
        """Make a panorama of what the form holds, and yield changes of the page."""
        inputs = read_inputs(self.fields.values(), values, values[self.fields["mode"].component])
        stopped = self.running[session.session_hash] = Event()
        started = time.monotonic()
        busy = {self.start: gr.update(interactive=False), self.stop: gr.update(interactive=True)}
        idle = {
            self.progress: gr.update(visible=False),
            self.preview: gr.update(value=None, visible=False),
        }
        try:
            yield self.show_error("", ()) | busy | self.show_progress("Starting")
            for event in run(self.backend, Request(**inputs), stopped):
                if isinstance(event, Step):
                    yield self.show_step(event)
                else:
                    yield idle | self.show_result(event, inputs, time.monotonic() - started)
        except StoppedError:
            yield idle | self.show_progress("Stopped.")
        except ValueError as error:
            yield idle | self.show_error(str(error), named_inputs(str(error)))
        except Exception as error:
            traceback.print_exc()
            yield idle | self.show_error(f"{type(error).__name__}: {error}", ())
        finally:
            stopped.set()  # a page that was closed leaves no run behind
            del self.running[session.session_hash]

    def be_ready(self) -> list[Any]:
        """Let the user start a run, and none be stopped."""
        return [gr.update(interactive=True), gr.update(interactive=False)]

    def end(self, session: gr.Request) -> None:
        """Stop the run of a page, if there is one."""
        if stopped := self.running.get(session.session_hash):
            stopped.set()

    def end_all(self) -> None:
        """Stop every run."""
        for stopped in self.running.values():
            stopped.set()

    def show_mode(self, mode: str) -> list[Any]:
        """Show the inputs of a mode, and hide the others."""
        return [gr.update(visible=mode in field.rule.modes) for field in self.fields.values()]

    def fill_in(self, made: Mapping[str, Any]) -> list[Any]:
        """Return the values of the form for inputs that made a panorama."""
        values = {name: made.get(name, empty(name)) for name in self.fields}
        return [str(v) if isinstance(v, Path) else v for v in values.values()]

    def show_error(self, message: str, names: Collection[str]) -> dict[Any, Any]:
        """Show a message at the inputs that it names, or else above the result; "" for none."""
        problem = f'<span role="alert">{escape(message)}</span>'
        changes = {
            field.note: gr.update(value=problem, visible=name in names)
            for name, field in self.fields.items()
        }
        changes[self.problem] = gr.update(value=problem, visible=bool(message and not names))
        if set(names) - {name for row in COMMON for name in row}:
            changes[self.more] = gr.update(open=True)
        return changes

    def show_progress(self, text: str, share: str = "") -> dict[Any, Any]:
        """Show what a run does, with the attributes of a progress bar, "" for no bar."""
        bar = f"<progress {share}></progress>" if share else ""
        return {self.progress: gr.update(value=f"{escape(text)}{bar}", visible=True)}

    def show_step(self, step: Step) -> dict[Any, Any]:
        """Show a step, and its preview if it has one."""
        share = f'value="{step.number}" max="{step.total}"'
        changes = self.show_progress(f"Step {step.number} of {step.total}", share)
        if step.preview:
            changes[self.preview] = gr.update(value=step.preview, visible=True)
        return changes

    def show_result(self, data: bytes, inputs: dict[str, Any], seconds: float) -> dict[Any, Any]:
        """Show the file of a panorama."""
        seed, html = write_result(self.folder, data)
        return {
            self.result: f"<p>Seed {seed}, made in {seconds:.0f} s</p>{html}",
            self.again: gr.update(visible=True),
            self.made: inputs | {"seed": seed},
        }


def empty(name: str) -> Any:
    """Return the value of a component that leaves its input out."""
    rule = INPUTS[name]
    if rule.optional and rule.choices:
        return BY_DEFAULT[1]
    return None if rule.required else rule.default


def write_result(folder: Path, data: bytes) -> tuple[int | None, str]:
    """Write the file of a panorama, its viewer and its seam check; return its seed and HTML."""
    image = read_whole(data, "panorama")
    seed = metadata_of(image).get("inputs", {}).get("seed")
    axis, name = closed_axis(image), uuid4().hex
    file, seam = f"{name}.{SUFFIXES[image.format or '']}", f"{name}-seam.jpg"
    (folder / file).write_bytes(data)
    (folder / f"{name}{PAGE}").write_bytes(page(data, f"panorama {seed}"))
    roll(image.convert("RGB"), axis).save(folder / seam, quality=95)
    ends = "Its ends meet in the middle." if axis else "It is open, so its ends need not match."
    return (
        seed,
        f"""
<iframe src="{RESULTS}/{name}{PAGE}" title="Viewer" allow="fullscreen"></iframe>
<p><a href="{RESULTS}/{file}" download="panorama-{seed}{Path(file).suffix}">Download the image</a>
· <a href="{RESULTS}/{name}{PAGE}" download="panorama-{seed}{PAGE}">Download the viewer</a>
· <a href="{RESULTS}/{name}{PAGE}" target="_blank">Open the viewer in a tab</a></p>
<details><summary>Seam check: the image rolled by half. {ends}</summary>
<a href="{RESULTS}/{seam}" target="_blank"><img src="{RESULTS}/{seam}" alt="Rolled by half"></a>
</details>""",
    )


def roll(image: Image.Image, axis: str) -> Image.Image:
    """Roll an image by half along the axis that closes, or else along its longer side."""
    axis = axis or ("x" if image.width >= image.height else "y")
    return ImageChops.offset(
        image, *((image.width // 2, 0) if axis == "x" else (0, image.height // 2))
    )
