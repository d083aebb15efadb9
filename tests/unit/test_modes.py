"""A family, loaded: requests become panoramas, one at a time, or errors that say why."""

import builtins
import hashlib
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tifffile import imwrite
from torch import Tensor

from panorama.__main__ import main
from panorama.base_model import BaseModel
from panorama.errors import NotFiniteError
from panorama.images.files import Panorama, read_metadata
from panorama.images.vae import MAX_CELLS, resize, to_pil
from panorama.jobs import MODES
from panorama.modes import Models, load, load_bases
from panorama.pipeline import Pipeline
from panorama.request import INPUTS, Request
from panorama.sampling.presets import WINDOWED
from panorama.sampling.solver import SCHEDULERS
from tests import small_sd2, small_sdxl
from tests.state import State

HEIGHT, WIDTH = 128, 256  # pixels: two windows of the small SDXL
PROMPT = "hdri view, bedroom in the color of blue"
DEFAULTS = {"width": WIDTH, "height": HEIGHT, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """For tests that leave it as it was."""
    return load(small_sd2.save_family(tmp_path_factory.mktemp("family"), **DEFAULTS), device="cpu")


@pytest.fixture
def fresh(tmp_path: Path) -> Models:
    """One to change."""
    return load(small_sd2.save_family(tmp_path, **DEFAULTS), device="cpu")


def request(mode: str = "sdxl-360", **inputs: Any) -> Request:
    defaults = {"prompt": PROMPT, "mode": mode, "num_inference_steps": 2, "seed": 1}
    return Request(**defaults | inputs)


def generate(models: Models, mode: str = "sdxl-360", **inputs: Any) -> Image.Image:
    return models.generate(request(mode, **inputs)).image


def save_depth(path: Path, values: np.ndarray) -> Path:
    Image.fromarray((values * 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def depth_image(tmp_path: Path) -> Path:
    values = np.random.default_rng(3).random((HEIGHT // 2, WIDTH))
    return save_depth(tmp_path / "depth.png", values)


# --- the table of modes and the inputs agree ---


def test_modes_schedulers_and_presets_are_those_of_requests() -> None:
    assert tuple(MODES) == INPUTS["mode"].choices
    assert set(SCHEDULERS) == set(INPUTS["scheduler"].choices)
    assert set(WINDOWED) == set(INPUTS["speed"].choices)
    for name, mode in MODES.items():
        assert (mode.presets is WINDOWED) == (name in INPUTS["speed"].modes)
        assert mode.synchronised == (name in INPUTS["sync_weight"].modes)
        assert mode.speed in mode.presets


def test_a_family_offers_what_its_models_can_do(models: Models) -> None:
    ring, strip, xl = map(models.settings, ("sdxl-360", "syncdiffusion", "syncdiffusion-xl"))
    assert (ring.width, ring.height, ring.guidance_scale) == (WIDTH, HEIGHT, 3.0)
    assert (ring.multiple, ring.smallest, ring.largest) == (32, 32, MAX_CELLS * 8**2)
    assert (strip.multiple, strip.smallest) == (4, 64)
    assert (xl.multiple, xl.smallest) == (8, 128)
    assert (ring.window, strip.window, xl.window) == (0, 16, 16)
    assert ring.tokens == xl.tokens == ("<s0>", "<s1>") and strip.tokens == ()
    assert (strip.speed, xl.speed) == ("exact", "fast")
    assert strip.speeds["fast"].num_inference_steps < strip.speeds["exact"].num_inference_steps


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_makes_the_image_of_a_request(models: Models, mode: str) -> None:
    image = generate(models, mode)
    assert image.size == (WIDTH, HEIGHT) and image.mode == "RGB"
    assert np.array_equal(image, generate(models, mode))
    assert not np.array_equal(image, generate(models, mode, seed=2))
    other = "ddim" if mode == "sdxl-360" else "euler"
    assert not np.array_equal(image, generate(models, mode, scheduler=other))


def test_modes_of_one_base_model_share_its_networks(models: Models) -> None:
    assert models.bases["sdxl-360"] is models.bases["syncdiffusion-xl"]
    folder = models.family
    alone = load_bases(folder, ["sdxl-360"], torch.float32)["sdxl-360"]
    assert alone.perceptual is None and alone.controlnet is not None


def test_trigger_tokens_precede_a_prompt_that_names_none(models: Models) -> None:
    image = generate(models)
    assert np.array_equal(image, generate(models, prompt=f"<s0><s1> {PROMPT}"))
    assert not np.array_equal(image, generate(models, prompt=f"<s0> {PROMPT}"))
    assert not np.array_equal(image, generate(models, lora_scale=0))


# --- the image and what is said of it ---


def test_an_image_is_rounded_to_the_nearest_level(models: Models) -> None:
    values = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(1))
    values[0, :, 0, :2] = torch.tensor([0.0, 1.0])
    levels = torch.from_numpy(np.array(to_pil(values.clone()))).permute(2, 0, 1)
    assert (levels - 255 * values[0]).abs().max() <= 0.5 + 1e-4
    assert levels[:, 0, 0].eq(0).all() and levels[:, 0, 1].eq(255).all()


def test_an_image_is_that_of_the_pipeline(models: Models) -> None:
    job = models.prepare(request())
    pipe = Pipeline(models.bases["sdxl-360"])
    expected = pipe(job.settings(), torch.Generator().manual_seed(1))
    assert np.array_equal(models.run(job).image, to_pil(expected))


@pytest.mark.parametrize("mode", MODES)
def test_metadata_make_the_same_image_again(models: Models, mode: str, tmp_path: Path) -> None:
    panorama = models.generate(request(mode, negative_prompt="people"))
    metadata = json.loads(json.dumps(dict(panorama.metadata)))
    assert metadata == panorama.metadata
    assert set(metadata["inputs"]) == {n for n, rule in INPUTS.items() if mode in rule.modes}
    assert metadata["closed"] == panorama.closed
    assert metadata["family"] == Path(models.family).name != models.family  # no local path
    assert metadata["tokens"] == ("" if mode == "syncdiffusion" else "<s0><s1>")
    assert set(metadata["versions"]) == {"panorama", "torch", "diffusers"}
    assert (metadata["device"], metadata["threads"]) == ("cpu", torch.get_num_threads())
    panorama.save(tmp_path / "a.png")
    again = models.generate(Request(**read_metadata(tmp_path / "a.png")["inputs"]))
    assert np.array_equal(again.image, panorama.image)
    assert again.metadata == panorama.metadata


def test_metadata_name_the_model_of_a_gpu(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {torch.device("cuda", 0): "NVIDIA L4", torch.device("cuda", 1): "NVIDIA H100"}
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    job = models.prepare(request())
    for device, name in names.items():
        assert job.metadata(models.family, device)["device"] == name


@pytest.mark.parametrize(
    ("mode", "inputs", "closed"),
    [
        ("sdxl-360", {}, "x"),
        ("syncdiffusion-xl", {}, ""),
        ("syncdiffusion-xl", {"loop_closure": True}, "x"),
        ("syncdiffusion", {"loop_closure": True, "height": WIDTH}, "x"),
        ("syncdiffusion", {"loop_closure": True, "height": 2 * WIDTH}, "y"),
    ],
)
def test_a_panorama_knows_which_axis_closes(
    models: Models, mode: str, inputs: dict[str, Any], closed: str
) -> None:
    if mode == "syncdiffusion":
        inputs = inputs | {"speed": "fast", "sync_weight": 0.0}
    assert models.generate(request(mode, **inputs)).closed == closed


def test_every_stage_is_timed(models: Models) -> None:
    seconds = models.generate(request()).seconds
    assert list(seconds) == ["denoise", "decode", "check", "measure"]
    assert all(value >= 0 for value in seconds.values()) and seconds["denoise"] > 0


def test_steps_are_reported(models: Models) -> None:
    steps: list[tuple[int, int]] = []
    job = models.prepare(request(num_inference_steps=3, width=64, height=64))
    models.run(job, lambda step, count, preview: steps.append((step, count)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("mode", MODES)
def test_a_preview_is_the_predicted_image_of_its_step(models: Models, mode: str) -> None:
    previews, predicted = [], []
    job = models.prepare(request(mode))
    models.run(job, lambda step, steps, preview: previews.append(preview()))
    pipe, settings = Pipeline(models.bases[mode]), job.settings()
    noise = pipe.noise(settings, torch.Generator().manual_seed(1))
    pipe.denoise(settings, pipe.encode(settings), noise, lambda *step: predicted.append(step[2]))
    assert not torch.equal(*predicted)
    for image, x0 in zip(previews, predicted, strict=True):
        assert np.array_equal(image, to_pil(pipe.preview(settings, x0)))


def test_previews_change_nothing_about_the_image(models: Models) -> None:
    job = models.prepare(request("syncdiffusion"))
    watched = models.run(job, lambda step, steps, preview: preview().load())
    assert np.array_equal(watched.image, models.run(job).image)


# --- depth ---


@contextmanager
def counted_opens(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count how often each file is opened, in whichever way Python code opens files."""
    opens: Counter[str] = Counter()
    real = io.open

    def counting(file: Any, *args: Any, **kwargs: Any) -> Any:
        opens[str(file)] += 1
        return real(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", counting)
        patch.setattr(builtins, "open", counting)
        yield opens


@pytest.mark.parametrize("mode", ["sdxl-360", "syncdiffusion-xl"])
def test_a_depth_image_is_read_once(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    path = save_depth(tmp_path / "depth.png", np.random.default_rng(0).random((HEIGHT, WIDTH)))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with counted_opens(monkeypatch) as opens:
        job = models.prepare(request(mode, depth_image=path))
        path.unlink()
        panorama = models.run(job)
    assert opens[str(path)] == 1
    assert panorama.metadata["inputs"]["depth_image"] == f"sha256:{digest}"
    assert str(tmp_path) not in json.dumps(panorama.metadata["inputs"])


def test_a_request_follows_its_depth_image(models: Models, depth_image: Path) -> None:
    image = generate(models, depth_image=depth_image)
    assert image.size == (WIDTH, HEIGHT // 2)
    assert not np.array_equal(image, generate(models, height=HEIGHT // 2))
    ignored = generate(models, depth_image=depth_image, controlnet_conditioning_scale=0)
    assert np.array_equal(ignored, generate(models, height=HEIGHT // 2))
    stretched = generate(models, depth_image=depth_image, width=128, height=HEIGHT // 2)
    assert stretched.size == (128, HEIGHT // 2)


def test_each_kind_of_depth_is_followed_as_the_nearness_that_it_means(
    models: Models, tmp_path: Path
) -> None:
    metres = 2 + 8 * np.random.default_rng(3).random((HEIGHT // 2, WIDTH))
    metres.flat[:2] = 2, 10
    nearness = (1 / metres - 0.1) / (0.5 - 0.1)
    files = {"nearness": nearness, "inverted": 1 - nearness, "distance": metres}
    depths = {}
    for kind, values in files.items():
        imwrite(tmp_path / f"{kind}.tif", values)
        job = models.prepare(request(depth_image=tmp_path / f"{kind}.tif", depth_kind=kind))
        depths[kind] = job.settings().depth
        assert job.metadata("tiny", models.device)["inputs"]["depth_kind"] == kind
    for depth in depths.values():
        assert torch.allclose(depth, depths["nearness"], atol=1e-6)
    assert np.allclose(depths["nearness"], nearness, atol=1e-6)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_an_image_of_any_format_can_be_made_again_from_its_metadata(
    models: Models, tmp_path: Path, name: str
) -> None:
    asked = request(num_inference_steps=1, seed=3, output_format=name[2:])
    models.generate(asked).save(tmp_path / name)
    inputs = read_metadata(tmp_path / name)["inputs"]
    models.generate(Request(**inputs)).save(tmp_path / f"again-{name}")
    assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()


def test_depth_is_resized_around_the_axis_that_closes(models: Models, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((WIDTH, 2 * WIDTH))
    depths = {}
    for loop_closure, name in ((False, ""), (True, "x")):
        path = save_depth(tmp_path / "depth.png", values)
        job = models.prepare(
            request(
                "syncdiffusion-xl",
                depth_image=path,
                width=WIDTH,
                height=HEIGHT,
                loop_closure=loop_closure,
            )
        )
        depths[name] = job.settings().depth
    flat, ring = depths.values()
    assert flat.shape == ring.shape == (HEIGHT, WIDTH)
    assert torch.allclose(flat[:, 1:-1], ring[:, 1:-1], atol=1e-6)
    assert (flat - ring)[:, [0, -1]].abs().max() > 0.01


@pytest.mark.parametrize(
    ("mode", "inputs", "warnings"),
    [
        ("sdxl-360", {"controlnet_conditioning_scale": 0}, 0),
        ("sdxl-360", {"controlnet_conditioning_scale": 0.5}, 1),
        ("syncdiffusion-xl", {}, 0),
        ("syncdiffusion-xl", {"loop_closure": True}, 1),
    ],
)
def test_edges_that_do_not_meet_are_warned_of_where_they_close_and_are_followed(
    models: Models,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    inputs: dict[str, Any],
    warnings: int,
) -> None:
    ramp = np.tile(np.linspace(0, 1, WIDTH), (HEIGHT, 1))
    path = save_depth(tmp_path / "depth.png", ramp)
    generate(models, mode, depth_image=path, num_inference_steps=1, **inputs)
    assert len([r for r in caplog.records if "edges differ" in r.getMessage()]) == warnings


# --- speeds of syncdiffusion-xl ---


@pytest.mark.parametrize(("speed", "exact"), [(None, False), ("fast", False), ("exact", True)])
def test_windows_of_sdxl_are_synchronised_without_a_gradient_by_default(
    models: Models, speed: str | None, exact: bool
) -> None:
    unet, seen = models.bases["syncdiffusion-xl"].unet, []
    hook = unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    decoded: list[bool] = []
    decoder = models.bases["syncdiffusion-xl"].vae.decoder
    watcher = decoder.register_forward_pre_hook(
        lambda _, args: decoded.append(args[0].requires_grad)
    )
    try:
        image = generate(models, "syncdiffusion-xl", speed=speed)
    finally:
        hook.remove()
        watcher.remove()
    assert any(seen) == any(decoded) == exact
    unsynchronised = generate(models, "syncdiffusion-xl", speed=speed, sync_weight=0.0)
    assert image.tobytes() != unsynchronised.tobytes()


def test_fast_is_fewer_steps_of_another_solver(models: Models) -> None:
    def resolved(**inputs: Any) -> tuple[Any, ...]:
        wanted = {"prompt": "sea", "mode": "syncdiffusion-xl", **inputs}
        found = models.prepare(Request(**wanted)).request
        return found.speed, found.num_inference_steps, found.scheduler

    assert resolved() == resolved(speed="fast") == ("fast", 20, "dpm++")
    assert resolved(speed="exact", stride=8) == ("exact", 50, None)
    assert resolved(scheduler="euler", num_inference_steps=7) == ("fast", 7, "euler")


# --- what is refused ---


def test_a_mode_that_a_family_lacks_is_refused_with_those_it_has(tmp_path: Path) -> None:
    small_sdxl.save_family(tmp_path, **DEFAULTS)
    models = load(str(tmp_path), device="cpu")
    for refused in (models.settings, lambda mode: load(models.family, modes=[mode])):
        with pytest.raises(ValueError, match=r"^mode='syncdiffusion': .*; try 'sdxl-360'$"):
            refused("syncdiffusion")


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_of_too_many_tokens_is_refused_before_any_work(
    models: Models, mode: str, field: str
) -> None:
    most = models.bases[mode].text_encoders[0].max_tokens
    tokens = 0 if mode == "syncdiffusion" or field == "negative_prompt" else 2  # of the LoRA
    models.prepare(request(mode, **{field: "sea " * (most - tokens)}))
    with pytest.raises(ValueError, match=rf"^{field}='.*at most {most} tokens") as error:
        models.prepare(request(mode, **{field: "sea " * (most - tokens + 1)}))
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("field", ["zenith_prompt", "nadir_prompt"])
def test_a_pole_of_too_many_tokens_is_refused_before_any_work(models: Models, field: str) -> None:
    most = models.bases["sdxl-360"].text_encoders[0].max_tokens
    models.prepare(request(fix_poles=True, **{field: "sea " * (most - 2)}))
    for long in ({field: "sea " * (most - 1)}, {"prompt": "sea " * (most - 2)}):
        name = field if field in long else "zenith_prompt"  # which begins with the prompt's text
        with pytest.raises(ValueError, match=rf"^{name}='.*at most {most} tokens"):
            models.prepare(request(fix_poles=True, **long))


def test_a_depth_image_without_a_controlnet_is_refused_before_any_work(
    models: Models, depth_image: Path
) -> None:
    bare = replace(models.bases["sdxl-360"], controlnet=None)
    without = replace(models, bases={"sdxl-360": bare})
    with pytest.raises(ValueError, match=r"^depth_image='depth\.png': .*ControlNet; leave it out"):
        without.prepare(request(depth_image=depth_image))
    assert without.prepare(request()).depth is None


def test_a_depth_image_that_cannot_be_read_is_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^depth_image='none\.png'"):
        models.prepare(request(depth_image=tmp_path / "none.png"))


# --- two threads (issue 19, fault 2) ---


def interleaved(models: Models, first: Request, second: Request) -> list[Panorama]:
    """Run two requests in two threads; if they can overlap at all, they do.

    The second begins inside the first's first step, and would end after the first.
    """
    inside, overtaken, ended = threading.Event(), threading.Event(), threading.Event()

    def first_step(step: int, steps: int, preview: Any) -> None:
        if step == 1:
            inside.set()
            overtaken.wait(0.5)

    def second_step(step: int, steps: int, preview: Any) -> None:
        overtaken.set()
        ended.wait(5)

    def run_first() -> Panorama:
        try:
            return models.generate(first, first_step)
        finally:
            ended.set()

    def run_second() -> Panorama:
        assert inside.wait(60)
        return models.generate(second, second_step)

    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(run) for run in (run_first, run_second)]
        return [run.result(60) for run in runs]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (request("sdxl-360", lora_scale=1.5), request("syncdiffusion-xl", lora_scale=0.0)),
        (request("syncdiffusion-xl"), request("sdxl-360")),
        (request("sdxl-360", lora_scale=1.5), request("sdxl-360", lora_scale=0.5, seed=2)),
    ],
    ids=["modes of one base", "the other way round", "one mode"],
)
def test_two_threads_make_what_they_make_one_after_the_other(
    models: Models, first: Request, second: Request
) -> None:
    expected = [models.generate(each) for each in (first, second)]
    base = models.bases["sdxl-360"]
    before = State.of(base)
    found = interleaved(models, first, second)
    before.check(base)
    for panorama, alone in zip(found, expected, strict=True):
        assert np.array_equal(panorama.image, alone.image)


def test_threads_that_generate_at_once_make_what_each_makes_alone(models: Models) -> None:
    requests = [request(mode, seed=seed) for mode in MODES for seed in (1, 2)]
    alone = [models.generate(each).image.tobytes() for each in requests]
    with ThreadPoolExecutor(len(requests)) as threads:
        together = threads.map(lambda each: models.generate(each).image.tobytes(), requests)
        assert list(together) == alone


# --- an exception ---


@pytest.mark.parametrize("mode", MODES)
def test_a_poll_ends_a_run_anywhere_in_a_step(models: Models, mode: str) -> None:
    job, calls, steps = models.prepare(request(mode, num_inference_steps=1)), [], []
    image = models.run(job, poll=lambda: calls.append(1)).image
    base, polls = models.bases[mode], len(calls)
    assert polls > 50
    before = State.of(base)
    for last in (1, polls // 10, polls // 3, polls // 2, polls - 1):
        left = iter(range(last))

        def poll(left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise InterruptedError

        steps.clear()
        with pytest.raises(InterruptedError):
            models.run(job, lambda *step: steps.append(step), poll)
        assert len(steps) == (last == polls - 1)  # then the image is being decoded
        before.check(base)
    assert np.array_equal(models.run(job).image, image)


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_leaves_the_networks_as_they_were(models: Models, mode: str) -> None:
    def stop(step: int, steps: int, preview: Any) -> None:
        raise InterruptedError

    image = generate(models, mode, num_inference_steps=1)
    base = models.bases[mode]
    before = State.of(base)
    for _ in range(2):  # the lock is free again
        with pytest.raises(InterruptedError):
            models.generate(request(mode), stop)
        before.check(base)
    assert np.array_equal(generate(models, mode, num_inference_steps=1), image)


# --- an image that is not finite (issue 19, fault 10) ---


def spoil(weights: Iterable[tuple[str, Tensor]], part: str) -> None:
    """Put NaN into one weight."""
    (name, weight), *_ = (pair for pair in weights if part in pair[0])
    with torch.no_grad():
        weight.view(-1)[0] = torch.nan
    assert not weight.isfinite().all(), name


def lora_weights(base: BaseModel) -> list[tuple[str, Tensor]]:
    return [(name, change.down) for name, change in base.lora.changes["unet"].items()]


Weights = Callable[[BaseModel], Iterable[tuple[str, Tensor]]]

STAGES: dict[str, tuple[Weights, str, str]] = {
    "UNet": (lambda base: base.unet.named_parameters(), "mid_block", r"latents .* step 1 of 2"),
    "LoRA": (lora_weights, "attn1", r"latents .* step 1 of 2"),
    "ControlNet": (
        lambda base: base.controlnet.named_parameters(),
        "mid_block",
        r"latents .* step 1 of 2",
    ),
    "text encoder": (
        lambda base: base.text_encoders[0].model.named_parameters(),
        "fc1",
        "embeddings of the prompts",
    ),
    "VAE": (lambda base: base.vae.decoder.named_parameters(), "mid_block", "decoded image"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_image_that_is_not_finite_is_an_error_that_says_where(
    fresh: Models, depth_image: Path, stage: str
) -> None:
    weights, part, where = STAGES[stage]
    spoil(weights(fresh.bases["sdxl-360"]), part)
    for mode in ("sdxl-360", "syncdiffusion-xl"):
        size = {"height": HEIGHT, "width": WIDTH}
        # Synchronising decodes at the first step already.
        sync = {"sync_weight": 0.0} if mode == "syncdiffusion-xl" else {}
        with pytest.raises(NotFiniteError, match=where):
            generate(fresh, mode, depth_image=depth_image, **size, **sync)
    if stage == "LoRA":
        assert generate(fresh, lora_scale=0, depth_image=depth_image).size[0] == WIDTH


@pytest.mark.parametrize("part", ["unet", "vae.decoder", "perceptual"])
def test_a_synchronised_image_that_is_not_finite_is_an_error(fresh: Models, part: str) -> None:
    spoil(attrgetter(part)(fresh.bases["syncdiffusion"]).named_parameters(), "weight")
    with pytest.raises(NotFiniteError, match=r"latents .* step 1 of 2"):
        generate(fresh, "syncdiffusion")


def test_no_file_is_made_of_an_image_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = load(small_sd2.save_family(tmp_path / "family", **DEFAULTS), device="cpu")
    spoil(models.bases["sdxl-360"].unet.named_parameters(), "conv_out")
    monkeypatch.setattr("panorama.__main__.load_models", lambda: models)
    output = tmp_path / "output"
    output.mkdir()
    inputs = ["-i", f"prompt={PROMPT}", "-i", "mode=sdxl-360", "-i", "num_inference_steps=1"]
    assert main([*inputs, "-o", str(output / "a.png")]) == 1
    assert "NotFiniteError" in capsys.readouterr().err
    assert list(output.iterdir()) == []


# --- precision ---


def test_a_seed_means_the_same_noise_in_half_precision(models: Models) -> None:
    half = load_bases(models.family, ["sdxl-360"], torch.bfloat16)["sdxl-360"]
    job = models.prepare(request())
    noise: list[Tensor] = [
        Pipeline(base).noise(job.settings(), torch.Generator().manual_seed(1))
        for base in (half, models.bases["sdxl-360"])
    ]
    assert torch.equal(*noise)


# --- enlarging, poles, and an image to start from ---


@pytest.fixture
def source(tmp_path: Path, models: Models) -> Path:
    path = tmp_path / "in.png"
    generate(models, seed=7).save(path)
    return path


def test_each_stage_is_counted_and_previewed_at_its_size(models: Models) -> None:
    seen: list[tuple[int, int, tuple[int, int]]] = []
    inputs = {"upscale": 4, "num_inference_steps": 3, "strength": 0.7, "fix_poles": True}
    panorama = models.generate(
        request(**inputs), lambda step, steps, preview: seen.append((step, steps, preview().size))
    )
    assert panorama.image.size == (4 * WIDTH, 4 * HEIGHT)
    # Three steps, then twice two; after each stage both poles, two steps each, of one window.
    stages = [(WIDTH, HEIGHT)] * 3, [(2 * WIDTH, 2 * HEIGHT)] * 2, [(4 * WIDTH, 4 * HEIGHT)] * 2
    poles = [(HEIGHT, HEIGHT)] * 4
    sizes = [size for stage in stages for size in (*stage, *poles)]
    assert seen == [(k + 1, len(sizes), size) for k, size in enumerate(sizes)]
    timed = {"denoise", "decode", "upscale", "poles", "check", "measure"}
    assert set(panorama.seconds) == timed


def test_the_zenith_is_up(models: Models) -> None:
    own = {"zenith_prompt": "a kite", "nadir_prompt": "sand", "lora_scale": 0.0}
    assert models.prepare(request(fix_poles=True, **own)).poles() == {True: "a kite", False: "sand"}
    assert models.prepare(request()).poles() == {}


def test_the_metadata_makes_an_enlarged_panorama_again(models: Models, tmp_path: Path) -> None:
    panorama = models.generate(request(upscale=2, fix_poles=True))
    panorama.save(tmp_path / "out.png")
    inputs = read_metadata(tmp_path / "out.png")["inputs"]
    again = models.generate(Request(**inputs))
    assert np.array_equal(panorama.image, again.image)


@pytest.mark.parametrize("mode", MODES)
def test_strength_is_how_far_an_image_is_left(models: Models, source: Path, mode: str) -> None:
    own = {"image": source, "num_inference_steps": 4}
    kept, mixed, drawn = (generate(models, mode, **own, strength=x) for x in (0.0, 0.5, 1.0))
    other = {"prompt": "night over the sea", "seed": 5}
    assert np.array_equal(kept, generate(models, mode, **own, **other, strength=0.0))
    assert np.array_equal(drawn, generate(models, mode, num_inference_steps=4))
    assert not np.array_equal(mixed, kept) and not np.array_equal(mixed, drawn)


def test_an_image_is_enlarged_as_it_is(models: Models, source: Path) -> None:
    """No step is made at its own size."""
    steps: list[int] = []
    job = models.prepare(request(image=source, upscale=2, strength=0.5, num_inference_steps=4))
    panorama = models.run(job, lambda step, total, _: steps.append(total))
    assert steps == [2, 2]
    assert panorama.image.size == (2 * WIDTH, 2 * HEIGHT)
    recorded = panorama.metadata["inputs"]["image"]
    assert recorded == f"sha256:{hashlib.sha256(source.read_bytes()).hexdigest()}"


def test_an_image_of_another_size_is_resized_around_the_seam_and_then_enlarged(
    models: Models, source: Path
) -> None:
    with Image.open(source) as image:
        image.resize((WIDTH - 32, HEIGHT)).save(source)
    own = {"image": source, "upscale": 2, "strength": 0.0, "width": WIDTH, "height": HEIGHT}
    job = models.prepare(request(**own))
    pipeline, settings = Pipeline(models.bases["sdxl-360"]), job.settings(2)
    small = resize(job.image.pixels, (HEIGHT, WIDTH), "x")
    latents = pipeline.encode_image(settings, small)
    expected = to_pil(pipeline.decode(settings, latents))
    assert np.array_equal(models.run(job).image, expected)


def test_steps_from_an_image_are_counted(models: Models, source: Path) -> None:
    steps: list[tuple[int, int]] = []
    job = models.prepare(request(image=source, strength=0.5, num_inference_steps=4))
    models.run(job, lambda step, total, _: steps.append((step, total)))
    assert steps == [(1, 2), (2, 2)]
    whole = models.prepare(request(num_inference_steps=4))
    assert job.cost == pytest.approx(whole.cost / 2)


def test_an_image_gives_the_size_before_a_depth_image_does(
    models: Models, source: Path, depth_image: Path
) -> None:
    job = models.prepare(request(image=source, depth_image=depth_image))
    assert (job.request.width, job.request.height) == job.image.size == (WIDTH, HEIGHT)
    assert job.depth.size != job.image.size


def test_an_image_whose_edges_do_not_meet_is_warned_of(
    models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ramp = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8)[None, :, None], (HEIGHT, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    models.prepare(request("syncdiffusion", image=tmp_path / "ramp.png"))
    assert caplog.records == []
    models.prepare(request(image=tmp_path / "ramp.png"))
    (record,) = caplog.records
    assert "image: its left and right edges differ by 1.000" in record.getMessage()


def test_an_image_of_an_illegal_size_is_refused_before_any_work(
    models: Models, tmp_path: Path
) -> None:
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(tmp_path / "odd.png")
    with pytest.raises(ValueError, match=rf"width={WIDTH + 1} \(from image\): must .*; try"):
        models.prepare(request(image=tmp_path / "odd.png"))


def test_an_enlarged_panorama_follows_its_depth_image(models: Models, depth_image: Path) -> None:
    own = {"upscale": 2, "width": WIDTH, "height": HEIGHT}
    followed, ignored, plain = (
        generate(models, **own, **inputs)
        for inputs in (
            {"depth_image": depth_image},
            {"depth_image": depth_image, "controlnet_conditioning_scale": 0.0},
            {},
        )
    )
    assert not np.array_equal(followed, plain) and np.array_equal(ignored, plain)
