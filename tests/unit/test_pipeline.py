"""Pipeline as users call it, on a small random model of Stable Diffusion 2's shape."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from panorama.base_model import BaseModel, load_base_model
from panorama.conditioning.prompts import encode_prompts
from panorama.images.vae import decode_canvas
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.canvas import Axis, View
from panorama.sampling.sampler import OnStep, sample
from panorama.sampling.synchronize import SyncSettings
from panorama.sampling.views import Fixed, Sliding, Spanning
from tests.small_sd2 import build
from tests.small_sdxl import save
from tests.state import State

LONG = "sunset over snowy mountains with trees under clouds, " * 9
STRONG = SyncSettings(weight=30.0)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return build()


def settings(**changes: Any) -> Settings:
    """Return a small panorama, three windows wide."""
    inputs: dict[str, Any] = {"prompt": "night over the sea", "height": 64, "width": 128}
    inputs |= {"num_inference_steps": 3, "layout": Fixed(8), "sync": SyncSettings()}
    return Settings(**inputs | changes)


def denoise(base: BaseModel, on_step: OnStep | None = None, **changes: Any) -> Tensor:
    """Its latents."""
    return denoise_with(Pipeline(base), settings(**changes), on_step)


def denoise_with(pipe: Pipeline, chosen: Settings, on_step: OnStep | None = None) -> Tensor:
    noise = pipe.noise(chosen, torch.Generator().manual_seed(0))
    return pipe.denoise(chosen, pipe.encode(chosen), noise, on_step)


def test_an_image_is_what_the_stages_make_one_after_the_other(base: BaseModel) -> None:
    pipe, ring = Pipeline(base), settings(closed="x")
    latents = denoise_with(pipe, ring)
    assert latents.shape == (1, 4, 16, 32)
    image = pipe(ring, torch.Generator().manual_seed(0))
    assert torch.equal(image, pipe.decode(ring, latents))
    assert not torch.equal(image, pipe.decode(settings(), latents))
    assert image.shape == (1, 3, 64, 128) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1


@pytest.mark.parametrize("closed", ["", "x"])
def test_a_preview_is_decoded_by_the_tiny_vae_if_there_is_one(
    base: BaseModel, closed: Axis
) -> None:
    chosen = settings(closed=closed)
    x0 = denoise(base)
    preview = Pipeline(base).preview(chosen, x0)
    tiny = replace(base, vae=base.tiny_vae)
    assert torch.equal(preview, Pipeline(tiny).decode(chosen, x0))
    image = Pipeline(base).decode(chosen, x0)
    assert preview.shape == image.shape and not torch.allclose(preview, image)
    assert torch.equal(Pipeline(replace(base, tiny_vae=None)).preview(chosen, x0), image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_and_latents_are_in_single_precision_whatever_the_unet_is_in(
    dtype: torch.dtype,
) -> None:
    base = build()
    base.unet.to(dtype)
    pipe, seen = Pipeline(base), []

    def note(step: int, steps: int, latents: Tensor) -> None:
        seen.append(latents.dtype)

    noise = pipe.noise(settings(), torch.Generator().manual_seed(5))
    expected = torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(5))
    assert noise.dtype == torch.float32
    assert torch.equal(noise, expected)
    # A run starts from just that noise, unrounded.
    fed: list[Tensor] = []
    hook = base.unet.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    started = pipe(settings(num_inference_steps=1), torch.Generator().manual_seed(5), note)
    hook.remove()
    assert started.isfinite().all()
    assert seen == [torch.float32]
    assert torch.equal(fed[0][:1], expected[..., 8:24].to(dtype))  # of the anchor


@pytest.mark.parametrize(
    ("changes", "closed", "extended"),
    [
        ({}, "", "x"),
        ({"layout": Fixed(8)}, "", "x"),
        ({"height": 128, "width": 64}, "", "y"),
        ({"height": 128}, "", "xy"),
        ({"closed": "x"}, "x", ""),
        ({"closed": "x", "height": 128}, "x", "y"),
        ({"width": 64}, "", ""),
        ({"layout": Spanning()}, "", ""),
    ],
)
def test_a_canvas_goes_on_beyond_the_ends_that_windows_hang_over(
    base: BaseModel, changes: dict[str, Any], closed: Axis, extended: str
) -> None:
    pipe, chosen = Pipeline(base), settings(**{"layout": Sliding(8)} | changes)
    latents = pipe.noise(chosen, torch.Generator().manual_seed(0))
    expected = decode_canvas(base.vae, latents, closed, extended=extended)
    assert torch.equal(pipe.decode(chosen, latents), expected.add(1).div(2))


def test_one_run_leaves_no_trace_in_the_next(base: BaseModel) -> None:
    def stop(*_: Any) -> Tensor:
        raise InterruptedError

    for scheduler in (None, "unipc"):
        first = denoise(base, scheduler=scheduler)
        before = State.of(base)
        assert any(before.learning)
        with pytest.raises(InterruptedError):
            denoise(base, stop, closed="x", scheduler=scheduler)
        before.check(base)
        assert torch.equal(denoise(base, scheduler=scheduler), first)
        before.check(base)


def test_synchronising_and_closing_change_the_image(base: BaseModel) -> None:
    plain = denoise(base, sync=None)
    assert torch.equal(plain, denoise(base, sync=SyncSettings(weight=0.0)))
    assert torch.equal(plain, denoise(base, sync=SyncSettings(threshold=0)))
    assert not torch.allclose(plain, denoise(base, sync=STRONG))
    assert not torch.allclose(plain, denoise(base, sync=None, closed="x"))


def test_the_callback_sees_every_step(base: BaseModel) -> None:
    steps = []

    def note(step: int, count: int, latents: Tensor) -> None:
        steps.append((step, count, tuple(latents.shape)))

    denoise(base, note)
    assert steps == [(step, 3, (1, 4, 16, 32)) for step in (1, 2, 3)]


def test_texts_of_any_length_make_an_image(base: BaseModel) -> None:
    plain = denoise(base)
    long_negative = denoise(base, negative_prompt=LONG)
    assert not torch.allclose(plain, long_negative)
    assert not torch.allclose(long_negative, denoise(base, negative_prompt=LONG + "no rain"))
    assert denoise(base, prompt=LONG).isfinite().all()


def test_embeddings_stand_in_for_texts(base: BaseModel) -> None:
    pipe, chosen = Pipeline(base), settings(prompt="something else")
    conditioning = encode_prompts(base.text_encoders, None, "night over the sea", "people", 7.5)
    noise = pipe.noise(chosen, torch.Generator().manual_seed(0))
    given = pipe.denoise(chosen, conditioning, noise)
    assert torch.equal(given, denoise(base, negative_prompt="people"))


def test_guidance_weighs_the_difference_of_the_prompts(base: BaseModel) -> None:
    """Also below 1, where it is between them."""
    pipe, one_step = Pipeline(base), settings(num_inference_steps=1, sync=None)
    noise = pipe.noise(one_step, torch.Generator().manual_seed(0))
    results = {}
    for scale in (0.0, 0.5, 1.0, 3.0):
        chosen = replace(one_step, guidance_scale=scale)
        results[scale] = pipe.denoise(chosen, pipe.encode(chosen), noise)
    uncond, text = results[0.0], results[1.0]
    assert not torch.allclose(uncond, text)
    for scale in (0.5, 3.0):  # a step is affine in the noise
        expected = uncond + scale * (text - uncond)
        torch.testing.assert_close(results[scale], expected, atol=1e-3, rtol=1e-3)


def test_it_comes_back_from_its_files(base: BaseModel, tmp_path: Path) -> None:
    parts = save(base, tmp_path)
    base.perceptual.save_pretrained(tmp_path / "perceptual")
    loaded = load_base_model(parts | {"perceptual": tmp_path / "perceptual"}, torch.float32)
    assert torch.equal(denoise(loaded), denoise(base))
    assert type(loaded.scheduler) is DDIMScheduler


def test_half_precision_files_are_loaded_where_there_are_no_others(
    base: BaseModel, tmp_path: Path
) -> None:
    parts = save(base, tmp_path)
    half = build().unet.half()
    for file in (tmp_path / "unet").glob("*.safetensors"):
        file.unlink()
    half.save_pretrained(tmp_path / "unet", variant="fp16")
    loaded = load_base_model(parts, torch.float32).unet
    assert all(map(torch.equal, loaded.parameters(), half.float().parameters()))


def test_the_distance_stays_in_single_precision(base: BaseModel, tmp_path: Path) -> None:
    parts = save(base, tmp_path)
    base.perceptual.save_pretrained(tmp_path / "perceptual")
    half = load_base_model(parts | {"perceptual": tmp_path / "perceptual"}, torch.float16)
    # SD 2's VAE does not overflow, so it is as precise as the rest.
    assert half.unet.dtype == half.vae.dtype == torch.float16
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        distance = half.perceptual.distance(images, half.perceptual.embed(images[:1]))
        expected = base.perceptual.distance(images, base.perceptual.embed(images[:1]))
    torch.testing.assert_close(distance, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 60}, ["width=60", "at least 64", "try 64"]),
        ({"height": 66}, ["height=66", "multiple of 4", "try 64"]),
        ({"height": 0}, ["height=0", "multiple of 4", "try 64"]),
        ({"height": 0, "layout": Spanning()}, ["height=0", "multiple of 8", "try 8"]),
        ({"width": 132, "layout": Spanning()}, ["width=132", "multiple of 8", "try 128"]),
        ({"layout": Sliding(17)}, ["stride=17", "16 latent cells", "try 8"]),
        ({"layout": Sliding(16), "closed": "x"}, ["stride=16", "less than", "try 8"]),
        ({"layout": Fixed(17)}, ["stride=17", "16 latent cells", "try 8"]),
        ({"num_inference_steps": 0}, ["num_inference_steps=0", "at least 1", "try 1"]),
        ({"guidance_scale": -1}, ["guidance_scale=-1", "at least 0", "try 0"]),
        ({"guidance_scale": float("nan")}, ["guidance_scale=nan", "at least 0", "try 0"]),
        (
            {"controlnet_conditioning_scale": -0.5},
            ["controlnet_conditioning_scale=-0.5", "at least 0"],
        ),
        (
            {"guidance_scale": 1.0, "negative_prompt": "fog" * 1000},
            ["negative_prompt='fogfog", "must be empty", "guidance_scale=1"],
        ),
        ({"scheduler": "pndm"}, ["scheduler='pndm'", "one of", "unipc", "try 'ddim'"]),
        ({"scheduler": EulerAncestralDiscreteScheduler()}, ["scheduler=EulerAncestral", "affine"]),
        ({"depth": torch.zeros(64, 127)}, ["depth", "(64, 127)", "(64, 128)"]),
        ({"depth": torch.zeros(64, 128)}, ["depth", "ControlNet"]),
    ],
)
def test_bad_settings_are_refused(
    base: BaseModel, changes: dict[str, Any], words: Sequence[str]
) -> None:
    with pytest.raises(ValueError) as error:
        denoise(base, **changes)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message) < 400


def test_noise_of_another_shape_is_refused(base: BaseModel) -> None:
    pipe, chosen = Pipeline(base), settings()
    with pytest.raises(ValueError, match=r"noise has shape \(1, 4, 8, 8\).*\(1, 4, 16, 32\)"):
        pipe.denoise(chosen, pipe.encode(chosen), torch.zeros(1, 4, 8, 8))


def test_the_gradient_needs_a_distance_and_shared_means_do_not(base: BaseModel) -> None:
    without = replace(base, perceptual=None)
    with pytest.raises(ValueError, match=r"sync: .*perceptual.*threshold=0, means=8"):
        denoise(without)
    means = SyncSettings(threshold=0, means=5)
    assert torch.equal(denoise(without, sync=means), denoise(base, sync=means))


def test_the_tiny_decoder_takes_the_vaes_place_in_the_gradient(base: BaseModel) -> None:
    strong = SyncSettings(weight=3000.0)
    found = denoise(base, sync=replace(strong, tiny_decoder=True))
    assert torch.equal(found, denoise(replace(base, vae=base.tiny_vae), sync=strong))
    assert not torch.equal(found, denoise(base, sync=strong))
    with pytest.raises(ValueError, match=r"sync: .*tiny_vae"):
        denoise(replace(base, tiny_vae=None), sync=SyncSettings(tiny_decoder=True))


def test_every_lever_changes_the_image_and_all_go_together(base: BaseModel) -> None:
    strong = SyncSettings(weight=3000.0)
    means = replace(strong, threshold=0, means=5)
    levers: list[dict[str, Any]] = [
        {"sync": strong},
        {"sync": strong, "layout": Sliding(8)},
        {"sync": strong, "layout": Sliding(None)},
        {"sync": means},
        {"sync": replace(strong, means=5)},
        {"sync": strong, "scheduler": "dpm++"},
        {"sync": means, "layout": Sliding(None), "scheduler": "dpm++"},
    ]
    results = [denoise(base, width=192, **lever) for lever in levers]
    for index, latents in enumerate(results):
        assert latents.isfinite().all()
        assert not any(torch.equal(latents, other) for other in results[:index])


def test_moving_windows_overlap_at_the_last_step_whatever_the_solver_makes_of_their_number(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = PNDMScheduler.from_config(base.scheduler.config, skip_prk_steps=True)
    trial = PNDMScheduler.from_config(scheduler.config)
    trial.set_timesteps(3)
    steps = len(trial.timesteps)
    assert steps != 3
    seen: list[Sequence[View]] = []

    def watched(latents: Tensor, views: Any, *args: Any, **options: Any) -> Tensor:
        seen.extend(views)
        return sample(latents, views, *args, **options)

    monkeypatch.setattr("panorama.pipeline.sample", watched)
    denoise(base, layout=Sliding(None), scheduler=scheduler)
    assert len(seen) == steps
    assert all(len(views) <= 3 for views in seen[:-1])
    assert [view.left for view in seen[-1]] == [-4, 4, 12, 20]


def test_checkpointing_changes_nothing_and_leaves_nothing(base: BaseModel) -> None:
    plain, pipe = denoise(base, sync=STRONG), Pipeline(base, checkpointing=True)
    torch.testing.assert_close(denoise_with(pipe, settings(sync=STRONG)), plain)
    before = State.of(base)  # only now: diffusers notes in every block that it is off
    assert not any(network.is_gradient_checkpointing for network in (base.unet, base.vae))
    denoise_with(pipe, settings(sync=STRONG))
    before.check(base)


@contextmanager
def sizes_seen(network: Any) -> Iterator[list[torch.Size]]:
    """Note the shapes that a network is given."""
    sizes: list[torch.Size] = []
    hook = network.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    try:
        yield sizes
    finally:
        hook.remove()


def test_every_step_runs_on_lean_networks_in_batches_of_the_size_asked_for(
    base: BaseModel,
) -> None:
    networks = (base.unet, base.vae)
    seen: list[tuple[bool, bool, bool]] = []

    def look(step: int, t: Tensor, latents: Tensor) -> Tensor:
        seen.append(
            (
                any(p.requires_grad for n in networks for p in n.parameters()),
                all(
                    "_conv_forward" in vars(conv)
                    for conv in (base.unet.conv_in, base.vae.decoder.conv_in)
                ),
                all(n.is_gradient_checkpointing for n in networks),
            )
        )
        return latents

    chosen = settings(width=192, num_inference_steps=2, sync=SyncSettings(threshold=1))
    with sizes_seen(base.unet) as sizes:
        for checkpointing in (False, True):
            pipe = Pipeline(base, batch_size=4, checkpointing=checkpointing)
            denoise_with(pipe, chosen, look)
    assert seen == [(False, True, False)] * 2 + [(False, True, True)] * 2
    # Of both halves of guidance: the anchor; two batches of two windows, each moved and seen
    # again; then the plain step, of five windows.
    batches = [2, *[4, 4] * 2, 8, 2]
    recomputed = [size[0] for size in sizes]
    assert recomputed == 2 * batches


def test_a_large_canvas_is_decoded_in_slices_as_asked(base: BaseModel) -> None:
    chosen = settings(width=640, num_inference_steps=1, sync=None)
    with sizes_seen(base.vae.decoder) as sizes:
        Pipeline(base)(chosen)
        Pipeline(base, max_cells=1)(chosen)
    assert [size[-1] for size in sizes] == [160, 32, 128, 128]


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_it_runs_in_inference_mode(base: BaseModel, guidance_scale: float) -> None:
    chosen, pipe = settings(guidance_scale=guidance_scale), Pipeline(base)
    expected = pipe.decode(chosen, denoise_with(pipe, chosen))
    with torch.inference_mode():
        noise = torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(0))
        conditioning = encode_prompts(base.text_encoders, None, chosen.prompt, "", guidance_scale)
        latents = pipe.denoise(chosen, conditioning, noise)
        assert torch.equal(pipe.decode(chosen, latents), expected)
        assert torch.equal(pipe(chosen, torch.Generator().manual_seed(0)), expected)


@pytest.mark.parametrize("scheduler", [None, "unipc"])
def test_one_window_is_never_synchronised(base: BaseModel, scheduler: str | None) -> None:
    results = [
        denoise(base, width=64, num_inference_steps=6, scheduler=scheduler, sync=sync)
        for sync in (None, SyncSettings())
    ]
    assert torch.equal(*results)


def test_a_scheduler_for_one_run_is_neither_kept_nor_changed(base: BaseModel) -> None:
    before = denoise(base)
    solver = UniPCMultistepScheduler.from_config(base.scheduler.config)
    solver.set_timesteps(3)
    first = denoise(base, scheduler=solver)
    assert torch.equal(denoise(base, scheduler=solver), first)
    assert torch.equal(denoise(base, scheduler="unipc"), first)
    assert torch.equal(denoise(base), before) and not torch.equal(first, before)
    assert not any(output is not None for output in solver.model_outputs)


@pytest.mark.parametrize(
    ("gigabytes", "windows"), [(16, 8), (25.4, 8), (51, 16), (85, 24), (150.1, 48)]
)
def test_a_larger_gpu_takes_more_windows_at_once(
    monkeypatch: pytest.MonkeyPatch, gigabytes: float, windows: int
) -> None:
    card = SimpleNamespace(total_memory=int(gigabytes * 1e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    on_gpu: Any = SimpleNamespace(unet=SimpleNamespace(device=torch.device("cuda")))
    assert Pipeline(on_gpu).windows_at_once == windows
    assert Pipeline(on_gpu, batch_size=3).windows_at_once == 3


def test_a_cpu_takes_eight_windows_at_once(base: BaseModel) -> None:
    assert Pipeline(base).windows_at_once == 8


@pytest.mark.parametrize("option", ["batch_size", "max_cells"])
def test_an_option_below_1_is_refused(base: BaseModel, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}=0.*at least 1"):
        Pipeline(base, **{option: 0})
