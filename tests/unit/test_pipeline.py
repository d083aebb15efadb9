"""SyncDiffusionPipeline as users call it, on a small random model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from panorama.perceptual import LPIPS
from panorama.sampler import sample
from panorama.syncdiffusion import SyncDiffusionPipeline
from tests.small import small_unet, small_vae
from weights.train.diffusion import build_text_encoder, build_tokenizer

LONG = "sunset over snowy mountains with trees under clouds, " * 9


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> SyncDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    pipe = SyncDiffusionPipeline(
        vae=small_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=small_unet(),
        scheduler=DDIMScheduler(clip_sample=False),
        perceptual=LPIPS(channels=((4,), (8,), (8,))),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: SyncDiffusionPipeline, **changes: Any) -> Any:
    """A small panorama, three windows wide, as latents."""
    arguments: dict[str, Any] = {
        "prompt": "night over the sea",
        "height": 64,
        "width": 128,
        "num_inference_steps": 3,
        "stride": 8,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    if "prompt_embeds" in changes:
        del arguments["prompt"]
    return pipe(**arguments | changes).images


def test_the_kinds_of_output_agree(pipe: SyncDiffusionPipeline) -> None:
    (image,), tensor = run(pipe, output_type="pil"), run(pipe, output_type="pt")
    assert image.size == (128, 64)
    assert tensor.shape == (1, 3, 64, 128) and tensor.min() >= 0 and tensor.max() <= 1
    levels = torch.tensor(list(image.get_flattened_data())).view(64, 128, 3).permute(2, 0, 1)
    assert (levels - tensor[0] * 255).abs().max() <= 0.5 + 1e-3
    assert run(pipe).shape == (1, 4, 16, 32)


def test_the_size_has_a_default(pipe: SyncDiffusionPipeline) -> None:
    assert run(pipe, height=None, width=None, num_inference_steps=1).shape == (1, 4, 16, 64)


def test_one_run_leaves_no_trace_in_the_next(pipe: SyncDiffusionPipeline) -> None:
    multistep = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    for scheduler in (pipe.scheduler, multistep):
        pipe.register_modules(scheduler=scheduler)
        before = run(pipe)

        def stop(*_: Any) -> dict[str, Tensor]:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            run(pipe, callback_on_step_end=stop, loop_closure=True)
        assert all(p.requires_grad for p in pipe.unet.parameters())
        assert torch.equal(run(pipe), before)


def test_synchronising_and_closing_change_the_picture(pipe: SyncDiffusionPipeline) -> None:
    plain = run(pipe, sync_weight=0.0)
    assert torch.equal(plain, run(pipe, sync_threshold=0))
    assert not torch.allclose(plain, run(pipe, sync_weight=30.0))
    assert not torch.allclose(plain, run(pipe, sync_weight=0.0, loop_closure=True))


def test_the_callback_sees_every_step_and_may_change_the_latents(
    pipe: SyncDiffusionPipeline,
) -> None:
    steps = []

    def note(_: Any, step: int, t: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append((step, int(t), tuple(state["latents"].shape)))
        return {"latents": torch.zeros_like(state["latents"])} if step == 2 else {}

    latents = run(pipe, callback_on_step_end=note)
    assert [step for step, _, _ in steps] == [0, 1, 2]
    assert [t for _, t, _ in steps] == sorted((t for _, t, _ in steps), reverse=True)
    assert {shape for _, _, shape in steps} == {(1, 4, 16, 32)}
    assert not latents.any()


@pytest.mark.parametrize("text", ["", "night over the sea", "word " * 30, LONG])
def test_a_short_text_is_embedded_as_the_tokenizer_pads_it(
    pipe: SyncDiffusionPipeline, text: str
) -> None:
    embeds, negative = pipe.encode_prompt(text, "")
    assert embeds.shape == negative.shape
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        first = pipe.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(embeds[:, :length], first)


def test_texts_of_any_length_make_a_picture(pipe: SyncDiffusionPipeline) -> None:
    plain = run(pipe)
    long_negative = run(pipe, negative_prompt=LONG)
    assert not torch.allclose(plain, long_negative)
    assert not torch.allclose(long_negative, run(pipe, negative_prompt=LONG + "no rain"))
    assert run(pipe, prompt=LONG).isfinite().all()


def test_embeddings_stand_in_for_texts(pipe: SyncDiffusionPipeline) -> None:
    embeds, negative = pipe.encode_prompt("night over the sea", "people")
    given = run(pipe, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert torch.equal(given, run(pipe, negative_prompt="people"))


def test_without_guidance_the_negative_prompt_has_no_say(pipe: SyncDiffusionPipeline) -> None:
    plain = run(pipe, guidance_scale=1.0)
    assert torch.equal(plain, run(pipe, guidance_scale=1.0, negative_prompt="people"))


def test_it_comes_back_from_its_folder(pipe: SyncDiffusionPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = SyncDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run(again), run(pipe), rtol=1e-4, atol=1e-3)


def test_the_distance_stays_in_single_precision(
    pipe: SyncDiffusionPipeline, tmp_path: Path
) -> None:
    pipe.perceptual.save_pretrained(tmp_path)
    half = LPIPS.from_pretrained(tmp_path, torch_dtype=torch.float16)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        distance = half.distance(images, half.embed(images[:1]))
        expected = pipe.perceptual.distance(images, pipe.perceptual.embed(images[:1]))
    torch.testing.assert_close(distance, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt": ["a", "b"]}, "one text"),
        ({"prompt_embeds": torch.zeros(1, 32, 128)}, "negative_prompt_embeds=None"),
        ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 32, 128)}, "beside"),
        ({"negative_prompt_embeds": torch.zeros(1, 9, 128)}, "shape"),
        ({"width": 60}, "width=60: width must be at least 64.*64 would do"),
        ({"height": 66}, "height=66.*64 would do"),
        ({"height": 0}, "height=0"),
        ({"stride": 17}, "stride=17"),
        ({"stride": 16, "loop_closure": True}, "stride=16.*8 would do"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: must be at least 1"),
        ({"sync_freq": 0}, "sync_freq=0"),
        ({"sync_weight": float("nan")}, "sync_weight=nan"),
        ({"view_batch_size": 0}, "view_batch_size=0"),
        ({"output_type": "np"}, "output_type='np': must be one of pil, pt, latent"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents has shape"),
    ],
)
def test_bad_arguments_are_refused(
    pipe: SyncDiffusionPipeline, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(pipe, **changes)


def test_a_scheduler_that_cannot_be_fused_is_refused(pipe: SyncDiffusionPipeline) -> None:
    kept = pipe.scheduler
    try:
        pipe.scheduler = EulerDiscreteScheduler.from_config(kept.config)
        with pytest.raises(ValueError, match="scheduler=EulerDiscreteScheduler"):
            run(pipe)
    finally:
        pipe.scheduler = kept


def test_every_lever_changes_the_picture_and_all_go_together(pipe: SyncDiffusionPipeline) -> None:
    levers: list[dict[str, Any]] = [
        {},
        {"disjoint": True},
        {"sync_on_x0": True},
        {"sync_pooling": 2},
        {"scheduler": DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)},
    ]
    levers.append({name: value for lever in levers for name, value in lever.items()})
    pictures = [run(pipe, width=192, sync_weight=3000.0, **lever) for lever in levers]
    for index, picture in enumerate(pictures):
        assert picture.isfinite().all()
        assert not any(torch.equal(picture, other) for other in pictures[:index])


def test_disjoint_windows_overlap_at_the_last_step_whatever_the_solver_makes_of_their_number(
    pipe: SyncDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    solver.set_timesteps(3)
    steps = len(solver.timesteps)
    assert steps != 3
    seen: list[Any] = []

    def watched(latents: torch.Tensor, views: Any, *args: Any, **options: Any) -> torch.Tensor:
        seen.extend(views)
        return sample(latents, views, *args, **options)

    monkeypatch.setattr("panorama.syncdiffusion.sample", watched)
    run(pipe, width=128, num_inference_steps=3, disjoint=True, scheduler=solver)
    assert len(seen) == steps
    assert all(len(views) <= 3 for views in seen[:-1])
    assert [view.left for view in seen[-1]] == [0, 8, 16]


def test_checkpointing_changes_nothing_and_leaves_nothing(pipe: SyncDiffusionPipeline) -> None:
    plain = run(pipe, sync_weight=30.0)
    torch.testing.assert_close(run(pipe, sync_weight=30.0, checkpointing=True), plain)
    assert not pipe.unet.is_gradient_checkpointing and not pipe.vae.is_gradient_checkpointing


def test_every_step_runs_on_lean_networks_in_batches_of_the_size_asked_for(
    pipe: SyncDiffusionPipeline,
) -> None:
    batches: list[int] = []
    seen: list[tuple[bool, bool, bool]] = []

    def look(*_: Any) -> dict[str, Tensor]:
        networks = (pipe.unet, pipe.vae)
        seen.append(
            (
                any(p.requires_grad for n in networks for p in n.parameters()),
                "_conv_forward" in vars(pipe.unet.conv_in)
                and "_conv_forward" in vars(pipe.vae.decoder.conv_in),
                all(n.is_gradient_checkpointing for n in networks),
            )
        )
        return {}

    counter = pipe.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    try:
        for checkpointing in (False, True):
            run(
                pipe,
                width=192,
                sync_threshold=1,
                num_inference_steps=2,
                view_batch_size=4,
                checkpointing=checkpointing,
                callback_on_step_end=look,
            )
    finally:
        counter.remove()
    assert seen == [(False, True, False)] * 2 + [(False, True, True)] * 2
    # Of both halves of guidance: the anchor; three times two windows, each moved and seen again;
    # then the plain step.
    assert batches == 2 * [2, *[4, 4] * 2, 8, 2]


def test_a_large_canvas_is_decoded_in_slices_as_asked(pipe: SyncDiffusionPipeline) -> None:
    sizes: list[int] = []
    counter = pipe.vae.decoder.register_forward_pre_hook(
        lambda _, inputs: sizes.append(inputs[0].shape[-1])
    )
    options = {"width": 640, "num_inference_steps": 1, "sync_weight": 0.0, "output_type": "pt"}
    try:
        run(pipe, **options)
        run(pipe, **options, max_cells=1)
    finally:
        counter.remove()
    assert sizes == [160, 32, 128, 128]


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_it_runs_in_inference_mode(pipe: SyncDiffusionPipeline, guidance_scale: float) -> None:
    expected = run(pipe, guidance_scale=guidance_scale)
    with torch.inference_mode():
        noise = torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(0))
        prompt, negative = pipe.encode_prompt("night over the sea")
        found = run(
            pipe,
            guidance_scale=guidance_scale,
            latents=noise,
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("solver", [DDIMScheduler, UniPCMultistepScheduler])
def test_one_window_is_never_synchronised(pipe: SyncDiffusionPipeline, solver: Any) -> None:
    scheduler = solver.from_config(pipe.scheduler.config)
    pictures = [
        run(pipe, width=64, num_inference_steps=6, scheduler=scheduler, sync_threshold=threshold)
        for threshold in (0, 5)
    ]
    assert torch.equal(*pictures)


def test_a_scheduler_for_one_call_is_neither_kept_nor_changed(pipe: SyncDiffusionPipeline) -> None:
    own, before = pipe.scheduler, run(pipe)
    solver = UniPCMultistepScheduler.from_config(own.config)
    solver.set_timesteps(3)
    first = run(pipe, scheduler=solver)
    assert torch.equal(run(pipe, scheduler=solver), first)
    assert pipe.scheduler is own and torch.equal(run(pipe), before)
    assert not any(output is not None for output in solver.model_outputs)


def test_pooling_has_to_divide_a_window(pipe: SyncDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="sync_pooling=3: must divide the window's 16 latent"):
        run(pipe, sync_pooling=3)
