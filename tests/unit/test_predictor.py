"""The Predictor around the models: files, metrics, logs, and cancelling between two steps."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import predict
from panorama.images.files import Panorama, read_metadata
from panorama.modes import Progress
from panorama.request import ModeSettings, Request, SpeedSettings
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
        return SimpleNamespace(request=request.resolve(SETTINGS))

    def run(self, job: SimpleNamespace, on_step: Progress) -> Panorama:
        steps = job.request.num_inference_steps
        self.steps_done = 0
        for step in range(1, steps + 1):
            self.before_step(step)
            on_step(step, steps, pytest.fail)  # Cog gets one image, and no previews
            self.steps_done = step
        image = Image.new("RGB", (job.request.width, job.request.height))
        return Panorama(image, "", job.request.mode_inputs(), {"denoise": 1.0, "check": 2.0})


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Predictor]:
    """A Predictor as Cog leaves it after setup, with `metrics` that it recorded."""
    monkeypatch.setattr(predict, "load_models", FakeModels)
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
    assert capsys.readouterr().out == "seed: 7\nstep 1/3\nstep 2/3\nstep 3/3\n"


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_a_prediction_has_the_format_that_was_asked_for(predictor, name, kind):
    quality = {} if name == "png" else {"output_quality": 20}
    path = call(predictor, output_format=name, **quality)
    assert path.suffix == f".{name}"
    with Image.open(path) as image:
        assert image.format == kind
        assert name != "jpg" or max(image.quantization[0]) > 100
    assert read_metadata(path)["output_format"] == name


def test_metrics_have_the_seed_and_the_seconds_of_every_stage(predictor):
    call(predictor)
    assert predictor.metrics.pop("seconds.save") < 10
    assert predictor.metrics == {"seed": 7, "seconds.denoise": 1.0, "seconds.check": 2.0}


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


def test_a_cancelled_prediction_stops_at_the_next_step(predictor, monkeypatch):
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
    resume.set()
    predictor.thread.submit(lambda: None).result(60)  # the thread is free again
    assert predictor.models.steps_done == 1

    predictor.models.before_step = lambda step: None
    call(predictor)
    assert predictor.models.steps_done == 3


def test_its_folder_goes_with_it(predictor):
    folder = Path(predictor.folder)
    assert folder.is_dir()
    predictor.cleanup()
    assert not folder.exists()
