"""The real server, over HTTP. A failed prediction is 200 with status "failed": Cog's way."""

import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from panorama import Request, load

from .conftest import LONG, QUICK, ROOT, Server, Webhook, decoded, png, serving

pytestmark = pytest.mark.server


def test_health_goes_from_starting_to_ready(server: Server):
    assert server.statuses[0] == "STARTING"
    assert server.statuses[-1] == "READY"
    assert "Setup complete" in server.log()


def test_setup_prints_no_warnings(server: Server):
    assert "torchvision" not in server.log()
    assert "Warning:" not in server.log()


def test_it_serves_the_committed_openapi_document(server: Server):
    committed = json.loads((ROOT / ".cog" / "openapi_schema.json").read_text())
    assert server.call("GET", "/openapi.json") == (200, committed)


def test_a_prediction_is_an_image_of_the_given_size(server: Server):
    code, prediction = server.predict(QUICK | {"width": 384, "seed": 5})
    assert (code, prediction["status"]) == (200, "succeeded")
    image = decoded(prediction)
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (384, 256))


def test_a_prediction_logs_its_seed_and_steps_and_records_metrics(server: Server):
    _, prediction = server.predict(QUICK | {"seed": 5})
    assert re.fullmatch(r"seed: 5\ncost: \d+\nstep 1/2\nstep 2/2\n?", prediction["logs"])
    assert prediction["metrics"]["seed"] == 5
    stages = {"denoise", "decode", "check", "measure", "save"}
    assert set(prediction["metrics"]["seconds"]) == stages
    assert set(prediction["metrics"]["quality"]) == {"sharpness"}  # of one window


def test_a_random_seed_can_be_used_again(server: Server):
    inputs = {name: value for name, value in QUICK.items() if name != "seed"}
    _, first = server.predict(inputs)
    _, again = server.predict(inputs | {"seed": first["metrics"]["seed"]})
    assert png(again) == png(first)


def test_one_prediction_leaves_nothing_to_the_next(server: Server):
    _, first = server.predict(QUICK)
    server.predict(QUICK | {"loop_closure": True, "width": 384, "sync_weight": 5.0, "seed": 9})
    server.predict(QUICK | {"width": 258})
    _, again = server.predict(QUICK)
    assert png(again) == png(first)


@pytest.mark.parametrize(
    ("inputs", "name", "message"),
    [
        (QUICK | {"num_inference_steps": 0}, "num_inference_steps", "1"),
        (QUICK | {"width": 20000}, "width", "16384"),
        (QUICK | {"width": 256.5}, "width", "integer"),
        (QUICK | {"loop_closure": "yes"}, "loop_closure", "boolean"),
        (QUICK | {"mode": "cubes"}, "mode", "syncdiffusion-xl"),
        ({"seed": 1}, "prompt", "required"),
    ],
    ids=["too small", "too large", "no integer", "wrong type", "no such choice", "missing"],
)
def test_an_input_that_the_document_forbids_is_refused_at_once(
    server: Server, inputs, name, message
):
    code, answer = server.predict(inputs)
    assert code == 422
    (problem,) = answer["detail"]
    assert problem["loc"] == ["body", "input", name]
    assert message in problem["msg"]


def test_integral_floats_are_integers(server: Server):
    """As the document says, and JSON knows no difference."""
    _, prediction = server.predict(QUICK | {"width": 256.0, "seed": 7.0})
    assert prediction["status"] == "succeeded"
    assert prediction["logs"].splitlines()[0] == "seed: 7"
    assert decoded(prediction).size == (256, 256)


def test_an_unknown_input_is_dropped_with_a_warning(server: Server):
    code, prediction = server.predict(QUICK | {"colour": "red"})
    assert (code, prediction["status"]) == (200, "succeeded")
    assert "Stripped unknown input fields" in server.log()


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"prompt": " "}, ("prompt=' '", "empty")),
        ({"prompt": "a" * 10_001}, ("prompt='aaa", "10000 characters")),
        ({"negative_prompt": "fog", "guidance_scale": 1}, ("negative_prompt='fog'", "empty")),
        ({"lora_scale": 0.5}, ("lora_scale=0.5", "mode='syncdiffusion'", "try 0.8")),
        ({"depth_image": "/etc/passwd"}, ("depth_image='/etc/passwd'", "file")),
        ({"depth_image": "A" * 8_000_000}, ("depth_image='AAA", "file")),
        ({"width": 258}, ("width=258", "multiple of 8", "try width=256")),
        ({"height": 128}, ("height=128", "at least 256", "try height=256")),
        ({"stride": 33}, ("stride=33", "at most 32", "try 16")),
        ({"stride": 32, "loop_closure": True}, ("stride=32", "ring", "try 16")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_input_that_only_the_model_forbids_fails_and_says_why(server: Server, inputs, told):
    code, prediction = server.predict(QUICK | inputs)
    assert (code, prediction["status"]) == (200, "failed")
    for words in told:
        assert words in prediction["error"]
    assert len(prediction["error"]) < 400
    assert "output" not in prediction


def test_a_failing_prediction_logs_its_traceback_as_one_record(server: Server, webhook: Webhook):
    server.start("failing", QUICK | {"width": 258}, webhook.url)
    event = webhook.last()
    assert event["status"] == "failed"
    assert event["logs"].startswith("Traceback (most recent call last):\n")
    assert "ValueError: width=258" in event["logs"]
    assert str(ROOT) not in event["logs"]
    lines = [line for line in server.log().splitlines() if '"prediction_id":"failing"' in line]
    records = [json.loads(line)["fields"]["message"] for line in lines]
    (record,) = (record for record in records if record.startswith("Traceback"))
    assert "ValueError: width=258" in record.splitlines()[-1]


def test_a_webhook_is_told_of_the_result(server: Server, webhook: Webhook):
    code, answer = server.start("with-webhook", QUICK, webhook.url)
    assert (code, answer) == (202, {"id": "with-webhook", "status": "starting"})
    event = webhook.last()
    assert event["status"] == "succeeded"
    assert decoded(event).size == (256, 256)


def test_a_second_request_at_once_is_refused(server: Server, webhook: Webhook):
    server.start("busy", LONG, webhook.url)
    code, answer = server.call("POST", "/predictions", {"input": QUICK})
    assert code == 409
    assert "busy" in answer["error"]
    assert server.status() == "BUSY"
    webhook.event(lambda event: "step 1/200" in event["logs"])  # Cog ignores an earlier cancel
    server.call("POST", "/predictions/busy/cancel")
    webhook.last()


def test_after_a_cancel_in_mid_run_the_next_prediction_is_right(server: Server, webhook: Webhook):
    ring = QUICK | {"loop_closure": True, "width": 512}
    _, before = server.predict(ring)

    server.start("cancelled", LONG | {"loop_closure": True, "width": 512}, webhook.url)
    webhook.event(lambda event: "step 1/200" in event["logs"])
    assert server.call("POST", "/predictions/cancelled/cancel")[0] == 200
    event = webhook.last()
    assert event["status"] == "canceled"
    assert "step 200/200" not in event["logs"]

    _, after = server.predict(ring)
    assert png(after) == png(before)
    assert "step 200/200" not in server.log()  # or the cancelled one went on to its end


@pytest.mark.parametrize(
    ("seconds", "steps", "status"), [("60", 20, "succeeded"), ("0.5", 200, "canceled")]
)
def test_sigterm_leaves_a_running_prediction_its_time(tmp_path: Path, seconds, steps, status):
    with serving(tmp_path / "log", PANORAMA_DRAIN_SECONDS=seconds) as server:
        answers = []
        inputs = LONG | {"num_inference_steps": steps}
        thread = threading.Thread(target=lambda: answers.append(server.predict(inputs)))
        thread.start()
        while f"step 1/{steps}" not in server.log():
            assert thread.is_alive()
        os.killpg(server.process.pid, signal.SIGTERM)
        thread.join(60)
        assert server.process.wait(60) == 0
    ((code, prediction),) = answers
    assert (code, prediction["status"]) == (200, status)
    assert (f"step {steps}/{steps}" in server.log()) == (status == "succeeded")


def test_the_same_image_from_the_command_line_from_python_and_over_http(
    server: Server, tmp_path: Path
):
    inputs = QUICK | {"loop_closure": True, "width": 512, "guidance_scale": 4.0}

    from_command_line = tmp_path / "command-line.png"
    pairs = [f"-i{name}={value}" for name, value in inputs.items()]
    command = [ROOT / "script" / "predict", *pairs, "-o", from_command_line]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stderr == ""

    from_python = tmp_path / "python.png"
    load().generate(Request(**inputs)).save(from_python)

    _, over_http = server.predict(inputs)
    assert from_command_line.read_bytes() == from_python.read_bytes() == png(over_http)
