"""The Predictor around the models: files, metrics, logs, and cancelling between two steps."""

import gc
import io
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cog import CancelationException
from PIL import Image

import predict
from panorama.images.files import Panorama, read_metadata
from panorama.jobs import Progress
from panorama.modes import load
from panorama.request import ModeSettings, Request, SpeedSettings
from panorama.worker import Termination
from predict import Predictor

SETTINGS = ModeSettings(
    width=512,
    height=128,
    guidance_scale=7.5,
    multiple=8,
    smallest=128,
    window=32,
    speeds={"exact": SpeedSettings(3)},
)


class FakeModels:
    """Models that draw a black image, and call a hook before each step."""

    def __init__(self) -> None:
        self.before_step: Callable[[int], None] = lambda step: None
        self.steps_done = 0

    def prepare(self, request: Request) -> SimpleNamespace:
        return SimpleNamespace(request=request.resolve(SETTINGS), cost=811.4)

    def run(self, job: SimpleNamespace, on_step: Progress, poll: Callable[[], None]) -> Panorama:
        steps = job.request.num_inference_steps
        self.steps_done = 0
        for step in range(1, steps + 1):
            self.before_step(step)
            poll()
            on_step(step, steps, pytest.fail)  # Cog gets one image, and no previews
            self.steps_done = step
        image = Image.new("RGB", (job.request.width, job.request.height))
        metadata = {**job.request.mode_inputs(), "quality": {"seam_ratio": 1.2, "sharpness": 3.0}}
        return Panorama(image, "", metadata, {"denoise": 1.0, "check": 2.0})


def untouched_signals(seconds: float) -> Termination:
    """Return a Termination that leaves the signals of this process alone."""
    handler, descriptor = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    termination = Termination(seconds)
    signal.signal(signal.SIGTERM, handler)
    signal.set_wakeup_fd(descriptor)
    return termination


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Predictor]:
    """Yield a Predictor as Cog leaves it after setup, with `metrics` that it recorded."""
    monkeypatch.setattr(predict, "load_models", FakeModels)
    monkeypatch.setattr(predict, "Termination", untouched_signals)
    predictor = Predictor()
    predictor.setup()
    predictor.metrics = {}
    monkeypatch.setattr(predictor, "record_metric", predictor.metrics.__setitem__)
    yield predictor
    predictor.thread.shutdown()


def call(predictor: Predictor, **inputs: Any) -> Path:
    """Predict with defaults for all inputs that are not given."""
    return predictor.predict(**Request(**{"prompt": "sea", "seed": 7, **inputs}).inputs())


def test_a_prediction_writes_a_png_of_its_inputs(predictor, capsys):
    path = call(predictor, prompt="night over the sea")
    metadata = read_metadata(path)
    assert (metadata["prompt"], metadata["seed"]) == ("night over the sea", 7)
    assert capsys.readouterr().out == "seed: 7\ncost: 811\nstep 1/3\nstep 2/3\nstep 3/3\n"


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_a_prediction_has_the_format_that_was_asked_for(predictor, name, kind):
    quality = {} if name == "png" else {"output_quality": 20}
    path = call(predictor, output_format=name, **quality)
    assert path.suffix == f".{name}"
    with Image.open(path) as image:
        assert image.format == kind
        assert name != "jpg" or max(image.quantization[0]) > 100
    assert read_metadata(path)["output_format"] == name


def test_metrics_have_the_seed_the_seconds_of_every_stage_and_the_quality(predictor):
    call(predictor)
    assert predictor.metrics.pop("seconds.save") < 10
    seconds = {"seconds.denoise": 1.0, "seconds.check": 2.0}
    quality = {"quality.seam_ratio": 1.2, "quality.sharpness": 3.0}
    assert predictor.metrics == {"seed": 7, **seconds, **quality}


def test_a_prediction_deletes_the_image_of_the_one_before(predictor):
    first = call(predictor)
    second = call(predictor)
    assert first != second
    assert list(Path(predictor.folder).iterdir()) == [second]


def test_a_bad_input_fails_with_a_printed_traceback(predictor, capsys):
    inputs = Request(prompt="sea").inputs() | {"width": 258}
    with pytest.raises(ValueError, match=r"width=258.*multiple of 8.*256"):
        predictor.predict(**inputs)
    assert "Traceback" in capsys.readouterr().err


def test_a_traceback_is_one_write_without_the_folders_of_the_machine(predictor, monkeypatch):
    writes: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Stream())
    with pytest.raises(ValueError, match="width=258"):
        predictor.predict(**Request(prompt="sea").inputs() | {"width": 258})
    (text,) = writes
    assert text.startswith("Traceback (most recent call last):\n")
    assert 'File "predict.py", line' in text
    assert 'File "panorama/request.py", line' in text
    assert "ValueError: width=258" in text.splitlines()[-1]
    assert str(Path(predict.__file__).parent) not in text


def test_an_error_names_a_file_but_no_folder(predictor, tmp_path, capsys):
    predictor.models.before_step = lambda step: (tmp_path / "none" / "a.txt").read_text()
    with pytest.raises(RuntimeError) as caught:
        call(predictor)
    assert str(caught.value) == ("FileNotFoundError: [Errno 2] No such file or directory: 'a.txt'")
    assert str(tmp_path) not in capsys.readouterr().err


def test_a_folder_that_vanished_is_made_again(predictor):
    call(predictor)
    shutil.rmtree(predictor.folder)
    path = call(predictor)
    assert read_metadata(path)["prompt"] == "sea"
    predictor.cleanup()
    assert not path.parent.exists()


def test_a_prediction_is_cancelled_when_its_time_after_sigterm_is_over(predictor, capsys):
    resume = threading.Event()

    def before_step(step: int) -> None:
        if step == 2:
            predictor.termination.over.set()
            assert resume.wait(60)

    predictor.models.before_step = before_step
    with pytest.raises(CancelationException):
        call(predictor)
    resume.set()
    predictor.thread.submit(lambda: None).result(60)
    assert predictor.models.steps_done == 1
    assert "canceled: " in capsys.readouterr().out


def test_a_cancelled_prediction_stops_and_the_next_says_that_it_waits(
    predictor, monkeypatch, capsys
):
    """As Cog cancels: by raising in the thread that waits for the steps."""

    class Cancellation(BaseException):
        pass

    in_second_step, resume = threading.Event(), threading.Event()

    def before_step(step: int) -> None:
        if step == 2:
            in_second_step.set()
            assert resume.wait(60)

    def interrupted_wait(*_: Any, **__: Any) -> None:
        assert in_second_step.wait(60)
        raise Cancellation

    predictor.models.before_step = before_step
    with monkeypatch.context() as patch:
        patch.setattr(predict, "wait", interrupted_wait)
        with pytest.raises(Cancellation):
            call(predictor)
    waiting = "waiting for a cancelled prediction to stop"
    assert waiting not in capsys.readouterr().out
    threading.Timer(0.5, resume.set).start()
    stopped: list[int] = []
    predictor.thread.submit(lambda: stopped.append(predictor.models.steps_done))

    predictor.models.before_step = lambda step: None
    for lines in (["seed: 7", "cost: 811", waiting], ["seed: 7", "cost: 811", "step 1/3"]):
        call(predictor)
        assert capsys.readouterr().out.splitlines()[:3] == lines
    assert stopped == [1]
    assert predictor.models.steps_done == 3


@pytest.mark.parametrize("step", [2, 99])
def test_a_run_that_is_over_leaves_nothing_behind(predictor, step):
    """No memory of a GPU either, which a failed run's frames would hold until the next one."""

    class Activations:
        pass

    found: list[weakref.ref[Activations]] = []

    def before_step(number: int) -> None:
        activations = Activations()
        found.append(weakref.ref(activations))
        if number == step:
            raise RuntimeError("out of memory")

    predictor.models.before_step = before_step
    gc.collect()
    gc.disable()
    try:
        with nullcontext() if step == 99 else pytest.raises(RuntimeError):
            call(predictor)
        predictor.thread.submit(lambda: None).result(60)
        assert found and not any(reference() for reference in found)
        assert predictor.running is None
    finally:
        gc.enable()


def test_a_cancellation_takes_effect_within_a_step(monkeypatch):
    """On the tiny family, whose next image is what it was before."""
    monkeypatch.setattr(predict, "load_models", lambda: load("tiny", modes=["sdxl-360"]))
    predictor = Predictor()
    predictor.setup()
    monkeypatch.setattr(predictor, "record_metric", lambda *_: None)
    small = {"mode": "sdxl-360", "width": 128, "height": 64, "num_inference_steps": 1}
    large = small | {"width": 2048, "height": 512}
    before = call(predictor, **small).read_bytes()
    times = [time.perf_counter()]
    request = Request(prompt="sea", **large)
    predictor.models.generate(request, lambda *_: times.append(time.perf_counter()))
    step = times[1] - times[0]

    def interrupted_wait(*_: Any, **__: Any) -> None:
        time.sleep(step / 4)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict, "wait", interrupted_wait)
        with pytest.raises(KeyboardInterrupt):
            call(predictor, **large)
    cancelled = time.perf_counter()
    predictor.thread.submit(lambda: None).result(60)  # after the run
    assert time.perf_counter() - cancelled < step / 2
    assert call(predictor, **small).read_bytes() == before
    predictor.thread.shutdown()
    predictor.cleanup()


def test_its_folder_goes_with_it(predictor):
    folder = Path(predictor.folder)
    assert folder.is_dir()
    predictor.cleanup()
    assert not folder.exists()
