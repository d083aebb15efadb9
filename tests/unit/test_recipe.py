"""The recipe of the tiny family, as far as it can be tested without training."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from panorama.base_model import BaseModel, load_base_model
from panorama.conditioning.lora import load_tokens, lora_applied, read_lora
from panorama.images.vae import decode
from panorama.modes import load
from panorama.request import Request
from tests import small_sd2
from tests.small_sdxl import build, components, save_family
from weights.train import (
    autoencoder,
    controlnet,
    dataset,
    diffusion,
    export,
    fit,
    measure,
    recognise,
    rooms,
    scenes,
    sdxl,
    style,
    tiny_vae,
    views,
)
from weights.train.depths import (
    CELL,
    DepthReader,
    cells,
    correlation,
    depth_image,
    subtract_row_means,
)
from weights.train.fit import Work
from weights.train.sdxl import Captions, Spheres, TextToSphere, time_ids, warm_start
from weights.train.views import halve, look

PROMPTS = ["hdri view, bedroom in the color of blue", "sunset over the sea"]
ROOM = rooms.Room("bedroom", "blue")
SCENE = scenes.Scene("noon", "desert", trees=True, clouds=False)


@pytest.fixture
def base() -> BaseModel:
    return build()


def text_to_sphere(base: BaseModel) -> TextToSphere:
    first, second = (encoder.model for encoder in base.text_encoders)
    return TextToSphere(first, second, base.unet).eval()


def stock_pipeline(base: BaseModel) -> StableDiffusionXLPipeline:
    parts = {name: part for name, part in components(base).items() if name != "controlnet"}
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def spheres(base: BaseModel) -> Spheres:
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.randn(3, 4, n, 2 * n, generator=generator) for n in (32, 64))
    ids = diffusion.draw_captions(
        [SCENE, ROOM, ROOM], sdxl.caption, base.text_encoders[0].tokenizer
    )
    return Spheres(small, large, (1, 2), ids)


def captions(base: BaseModel, texts: list[str], given: list[bool]) -> Captions:
    ids = diffusion.tokenize(base.text_encoders[0].tokenizer, texts)
    sizes = torch.tensor([[64.0, 128, 0, 0, 64, 128]] * len(texts))
    return Captions(ids, torch.tensor(given), sizes)


def test_a_depth_image_is_1_where_it_is_nearest_and_0_in_the_sky() -> None:
    distance = np.array([[6, 24, 150], [600, 6, np.inf]], np.float16)
    expected = [[1, 0.5, 0.2], [0.1, 1, 0]]
    assert depth_image(distance).dtype == np.float32
    assert np.allclose(depth_image(distance), expected, atol=1e-3)


@pytest.mark.parametrize("cut", sdxl.CUTS)
def test_depth_images_are_those_of_the_cuts(cut: sdxl.Cut, base: BaseModel) -> None:
    depths = torch.rand(3, 1, 256, 512, generator=torch.Generator().manual_seed(0))
    lessons = controlnet.Lessons(text_to_sphere(base), spheres(base), depths)
    top, left = torch.tensor([cut.tops[1], cut.tops[0]]), torch.tensor([0, 5])
    depth = lessons.depth(sdxl.Cuts(torch.empty(0), torch.tensor([2, 0]), cut, top, left))
    assert depth.shape == (2, 3, 256, 8 * cut.width)
    scale = 2 if cut.large else 1
    for found, index, row, column in zip(depth, [2, 0], top, left, strict=True):
        whole = depths[index, 0].numpy().repeat(scale, 0).repeat(scale, 1)
        rows = whole[8 * int(row) : 8 * int(row) + 256]
        expected = np.roll(rows, -8 * int(column), 1)[:, : 8 * cut.width]
        assert np.array_equal(found[1], expected)


@torch.no_grad()
def test_depth_is_learned_under_guidance(base: BaseModel) -> None:
    model = text_to_sphere(base)
    lessons = controlnet.Lessons(model, spheres(base), torch.rand(3, 1, 256, 512))
    batch = lessons.draw(torch.Generator().manual_seed(0))
    noisy, inputs, guidance, _ = lessons.unpack(batch)
    low, high = controlnet.GUIDANCES
    assert low <= guidance.min() < guidance.max() <= high
    guided = controlnet.guide(base.unet(**inputs).sample, guidance)

    def predict(given: bool) -> torch.Tensor:
        words = Captions(batch[4], torch.full((len(batch[4]),), given), batch[6])
        return model(noisy.latents, noisy.t, words)

    expected = guidance * predict(True) + (1 - guidance) * predict(False)
    torch.testing.assert_close(guided, expected, rtol=1e-3, atol=1e-4)


def test_all_lessons_are_given_at_each_step_and_their_losses_count_the_same(
    base: BaseModel,
) -> None:
    depths = torch.zeros(3, 1, 256, 512), torch.ones(3, 1, 256, 512)
    lessons = [controlnet.Lessons(text_to_sphere(base), spheres(base), depth) for depth in depths]

    def mean_depth(one: controlnet.Lessons, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        *_, depth = one.unpack(batch)
        assert torch.equal(depth, torch.full_like(depth, float(one.depths.max())))
        return depth.mean()

    draw, loss = controlnet.each(lessons, controlnet.Lessons.draw, mean_depth)
    assert loss(*draw(torch.Generator().manual_seed(0))) == 0.5


@pytest.mark.parametrize("seed", range(20))
def test_varied_depth_images_keep_their_order_and_some_stay(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    depth = torch.rand(16, 1, 8, 16, generator=generator).expand(-1, 3, -1, -1) * 0.8 + 0.2
    varied = controlnet.vary(depth, generator)
    assert varied.min() >= 0 and varied.max() <= 1
    order = depth.flatten(1).argsort(1)
    assert (varied.flatten(1).gather(1, order).diff(dim=1) >= 0).all()
    same = (varied == depth).flatten(1).all(1)
    assert 0 < same.sum() < 16


def test_an_empty_room_has_neither_furniture_nor_a_lamp() -> None:
    elevation = np.linspace(90, -90, 2 * rooms.HEIGHT + 1)[1::2, None]

    def flatness(room: rooms.Room) -> list[float]:
        heights = room.render(np.random.default_rng(3))[1] * np.sin(np.radians(elevation))
        rows = elevation[:, 0]
        return [float(np.ptp(heights[part])) for part in (rows > 65, rows < -65)]

    assert min(flatness(rooms.Room("bedroom", "red"))) > 0.015  # a lamp, and a rug
    assert max(flatness(rooms.EmptyRoom("bedroom", "red"))) < 2e-3
    empty = [rooms.EmptyRoom(kind, "red") for kind in rooms.KINDS]
    depths = [room.render(np.random.default_rng(3))[1] for room in empty]
    assert all(np.array_equal(depth, depths[0]) for depth in depths)


def test_vertical_steps_are_where_rows_of_cells_differ() -> None:
    images = torch.zeros(1, 3, 32, 16)
    images[:, :, 8:, 8:] = 0.6
    expected = torch.zeros(1, 3, 2)
    expected[0, 0, 1] = 0.6
    torch.testing.assert_close(measure.vertical_steps(images), expected)


def test_correlation_is_that_of_each_image() -> None:
    depth = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0))
    same = correlation(depth, torch.stack([2 * depth[0] + 1, -depth[1]]))
    torch.testing.assert_close(same, torch.tensor([1.0, -1.0]))
    expected = [np.corrcoef(a.flatten(), a.flip(0).flatten())[0, 1] for a in depth]
    assert np.allclose(correlation(depth, depth.flip(1)), expected, atol=1e-5)


def test_row_means_leave_nothing_that_follows_from_the_elevation() -> None:
    rows = torch.linspace(0, 1, 5)[None, :, None].expand(1, 5, 7)
    assert subtract_row_means(rows).abs().max() < 1e-6


def test_the_reader_sees_cells() -> None:
    images = torch.zeros(2, 3, 64, 96)
    depth = DepthReader(channels=(8, 8, 8, 8))(images)
    assert depth.shape == cells(images[:, 0]).shape == (2, 64 // CELL, 96 // CELL)


def test_captions_name_everything_or_nothing() -> None:
    rng = np.random.default_rng(0)
    assert ROOM.caption(rng, keep=1.0) == "bedroom in the color of blue"
    landscape = SCENE.caption(rng, keep=1.0)
    for words in (scenes.TIME_WORDS["noon"], scenes.LAND_WORDS["desert"], ["trees"]):
        assert any(word in landscape for word in words)
    for subject in (ROOM, SCENE):
        assert subject.caption(rng, keep=0.0) == ""


def test_captions_leave_out_each_attribute_at_times_and_begin_as_hdri_views_at_times() -> None:
    rng = np.random.default_rng(0)
    written = {sdxl.caption(ROOM, rng) for _ in range(200)}
    bare = {"bedroom in the color of blue", "room in the color of blue", "bedroom"}
    assert written == {""} | bare | {f"hdri view, {text}" for text in bare}


def test_every_word_of_a_caption_is_a_token() -> None:
    tokenizer = diffusion.build_tokenizer()
    rng = np.random.default_rng(0)
    for _ in range(50):
        room = rooms.Room(str(rng.choice(list(rooms.KINDS))), str(rng.choice(list(rooms.COLORS))))
        text = sdxl.caption(room, rng)
        words = text.replace(",", " ,").split()
        assert len(tokenizer.tokenize(text)) == len(words)


def test_the_vocabulary_is_the_same_every_time() -> None:
    first, *others = (diffusion.build_tokenizer().get_vocab() for _ in range(8))
    assert all(other == first for other in others)


def test_conditions_are_those_of_the_stock_pipeline(base: BaseModel) -> None:
    with torch.no_grad():
        own = text_to_sphere(base).conditions(captions(base, PROMPTS, [True, True]))
        stock = stock_pipeline(base)
        states, _, pooled, _ = stock.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    torch.testing.assert_close(own["encoder_hidden_states"], states)
    torch.testing.assert_close(own["added_cond_kwargs"]["text_embeds"], pooled)
    dim = stock.text_encoder_2.config.projection_dim
    ids = stock._get_add_time_ids((64, 128), (0, 0), (64, 128), torch.float32, dim)
    assert torch.equal(own["added_cond_kwargs"]["time_ids"], ids.expand(2, -1))


def test_a_caption_left_out_is_that_of_an_empty_negative_prompt(base: BaseModel) -> None:
    with torch.no_grad():
        own = text_to_sphere(base).conditions(captions(base, PROMPTS, [False, True]))
        _, negative, _, pooled = stock_pipeline(base).encode_prompt(PROMPTS[0])
    assert torch.equal(own["encoder_hidden_states"][:1], negative)
    assert torch.equal(own["added_cond_kwargs"]["text_embeds"][:1], pooled)


@pytest.mark.parametrize("cut", sdxl.CUTS)
def test_batches_are_cuts_of_rolled_spheres(cut: sdxl.Cut, base: BaseModel) -> None:
    drawn = replace(spheres(base), cuts=(cut,))
    batch, again = (drawn.draw(torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(batch.x0, again.x0) and torch.equal(batch.index, again.index)
    assert batch.x0.shape == (cut.count, 4, 32, cut.width)
    assert all(cut.tops[0] <= top <= cut.tops[1] for top in batch.top)
    latents = drawn.large if cut.large else drawn.small
    assert latents is not None
    for x0, index, top, left in zip(batch.x0, batch.index, batch.top, batch.left, strict=True):
        rolled = latents[index, :, int(top) : int(top) + 32].roll(-int(left), -1)
        assert torch.equal(x0, rolled[..., : cut.width])


@pytest.mark.parametrize("cut", sdxl.CUTS)
def test_cuts_are_declared_as_the_windows_of_a_canvas(cut: sdxl.Cut, base: BaseModel) -> None:
    batch = replace(spheres(base), cuts=(cut,)).draw(torch.Generator().manual_seed(1))
    sizes = time_ids(batch, torch.Generator().manual_seed(2))
    whole, place, part = sizes.split(2, 1)
    if cut is sdxl.SPHERE:
        assert torch.equal(whole, part) and not place.any()
    else:
        assert (whole == torch.tensor(cut.size)).all()
        assert (part == torch.tensor([256, 8 * cut.width])).all()
        moved = place[:, 1] == 8 * batch.left
        assert moved.any() and ((place[:, 1] == 0) | moved).all()
        varies = cut.tops[0] < cut.tops[1]
        assert torch.equal(place[:, 0], 8 * batch.top if varies else torch.zeros_like(batch.top))


def test_captions_left_out_are_not_given(base: BaseModel) -> None:
    drawn, generator = spheres(base), torch.Generator().manual_seed(2)
    sizes = torch.zeros(2, 6)
    index = torch.tensor([0, 1])
    assert not drawn.captions(index, sizes, 1.0, generator).given.any()
    assert drawn.captions(index, sizes, 0.0, generator).given.all()


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_training_that_is_stopped_goes_on_as_if_it_had_not_been(
    tmp_path: Path, average: float
) -> None:
    def draw(generator: torch.Generator) -> fit.Batch:
        return torch.randn(5, 3, generator=generator), torch.randn(5, 2, generator=generator)

    def train(work: Work) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)

        def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.mse_loss(model(x), y)

        plan = fit.Plan("line", steps=6, learning_rate=0.1, warmup=2, average=average)
        return fit.fit(model, draw, loss, plan, work).state_dict()

    whole, late = train(Work(tmp_path / "whole")), Work(tmp_path / "parts", deadline=0.0)
    for _ in range(5):
        with pytest.raises(fit.OutOfTime):
            train(late)
    parts = train(late)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)


def test_the_average_follows_the_weights_slowly(tmp_path: Path) -> None:
    """With its decay, or less at the start: (k + 1) / (k + 10) in step k."""
    model, seen = nn.Linear(1, 1, bias=False), []

    def draw(generator: torch.Generator) -> fit.Batch:
        seen.append(model.weight.item())
        return (torch.ones(1, 1),)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return -model(x).sum()

    expected = model.weight.item()
    plan = fit.Plan("line", steps=40, learning_rate=0.1, warmup=1, average=0.5)
    mean = fit.fit(model, draw, loss, plan, Work(tmp_path)).weight
    for k, weight in enumerate([*seen[1:], model.weight.item()]):
        decay = min(0.5, (k + 1) / (k + 10))
        expected = decay * expected + (1 - decay) * weight
    assert mean.item() == pytest.approx(expected, rel=1e-4)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    plan = fit.Plan("line", steps=110, learning_rate=1.0, warmup=10)
    rates = [plan.rate(step) for step in (0, 4, 9, 10, 60, 109)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5, 0.0], abs=1e-3)


def test_images_of_each_kind_are_drawn_as_often() -> None:
    drawn = Spheres(torch.empty(0), None, (10, 90), torch.empty(0))
    index = drawn.draw_index(4000, torch.Generator().manual_seed(0))
    assert set(index.tolist()) == set(range(100))
    assert 0.45 < (index < 10).float().mean() < 0.55


def test_gradients_are_those_of_the_last_batch_and_frozen_weights_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)

    def draw(generator: torch.Generator) -> fit.Batch:
        return torch.randn(5, 3, generator=generator), torch.randn(5, 2, generator=generator)

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(model(x), y)

    learned = list(model[1].parameters())
    gradients = fit.Gradients(loss, learned)
    for seed in range(2):
        batch = draw(torch.Generator().manual_seed(seed))
        value = gradients(batch)
        expected = torch.autograd.grad(loss(*batch), learned)
        assert value == loss(*batch) and not value.requires_grad
        for parameter, gradient in zip(learned, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    before = copy.deepcopy(model.state_dict())
    plan = fit.Plan("line", steps=5, learning_rate=0.1, warmup=1)
    fit.fit(model, draw, loss, plan, Work(tmp_path))
    after = model.state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("0."), name


def test_a_warm_start_copies_what_fits() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = model[1].weight.clone()
    warm_start(
        model, {"0.weight": torch.ones(3, 2), "1.weight": torch.ones(4, 2), "2.bias": before}
    )
    assert torch.equal(model[0].weight, torch.ones(3, 2))
    assert torch.equal(model[1].weight, before)


def test_all_of_the_unet_starts_warm_but_what_reads_the_words() -> None:
    own, first = sdxl.build_unet().state_dict(), diffusion.build_unet().state_dict()
    assert set(first) <= set(own)
    other = {name for name, weight in first.items() if own[name].shape != weight.shape}
    assert other == {
        name for name in first if name.endswith(("attn2.to_k.weight", "2.to_v.weight"))
    }


def test_a_controlnet_begins_with_all_of_the_depth_image_and_changes_nothing() -> None:
    torch.manual_seed(0)
    base = TextToSphere(nn.Identity(), nn.Identity(), sdxl.build_unet())
    built = controlnet.build(base)
    depth = torch.rand(1, 1, 8, 16).expand(-1, 3, -1, -1)
    with torch.no_grad():
        seen = built.controlnet_cond_embedding(F.interpolate(depth, scale_factor=8))
        latents = built.conv_in(torch.randn(1, 4, 8, 16))
    assert seen.shape == latents.shape
    varied = (seen - seen.mean((2, 3), keepdim=True)).std()
    assert 0.2 < varied / latents.std() < 5
    outputs = (*built.controlnet_down_blocks, built.controlnet_mid_block)
    assert not any(p.any() for module in outputs for p in module.parameters())


def test_a_lesson_has_noise_that_gives_the_latents_back_and_costs_nothing_if_it_is_found() -> None:
    x0 = torch.randn(3, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    noisy = diffusion.add_noise(x0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(noisy.x0(noisy.noise), x0, rtol=1e-3, atol=1e-3)
    assert noisy.error(noisy.noise) == 0
    assert noisy.error(noisy.noise + 0.1) > 0


def test_the_reader_that_teaches_sees_every_cell() -> None:
    reader = controlnet.LatentReader()
    latents = torch.randn(1, 4, 32, 64, requires_grad=True)
    depth = reader(latents)
    assert depth.shape == (1, 32, 64) and 0 <= depth.min() <= depth.max() <= 1
    depth.sum().backward()
    assert latents.grad is not None and latents.grad.abs().amin() > 0


def test_crisp_images_keep_areas_and_part_their_edges() -> None:
    image = np.full((64, 64, 3), (90, 100, 140), np.uint8)
    image[:, 32:] = (150, 160, 200)
    changed = style.crisp(image)
    assert np.array_equal(changed[:, [0, -1]], image[:, [0, -1]])
    assert (changed[:, 31] < image[:, 31] - 10).all()
    assert (changed[:, 32] > image[:, 32] + 10).all()


def test_a_style_loads_as_it_was_trained(base: BaseModel, tmp_path: Path) -> None:
    model = text_to_sphere(base)
    trained = style.build(model)
    learned = [name for name, p in trained.named_parameters() if p.requires_grad]
    assert learned and all("lora_" in name or name.endswith(".tokens") for name in learned)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    latents, t = torch.randn(1, 4, 8, 16), torch.tensor([500])
    extended = [f"{''.join(style.TOKENS)} {PROMPTS[0]}"]
    save_file(style.lora_weights(trained.unet), tmp_path / "lora.safetensors")
    save_file(style.token_embeddings(trained), tmp_path / "embeddings.safetensors")
    load_tokens(base.text_encoders, tmp_path / "embeddings.safetensors")
    words = captions(base, extended, [True])
    with torch.no_grad():
        expected = trained(latents, t, words)
        assert (model(latents, t, words) - expected).abs().max() > 1e-2
        lora = read_lora(tmp_path / "lora.safetensors", {"unet": base.unet})
        with lora_applied({"unet": base.unet}, lora, 1.0):
            torch.testing.assert_close(model(latents, t, words), expected)


def test_the_export_loads_and_shares_the_autoencoder(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TINY", tmp_path)
    base.vae.save_pretrained(tmp_path / "sd2" / "vae")
    shared = (tmp_path / "sd2" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    model, tokenizer = text_to_sphere(base), base.text_encoders[0].tokenizer
    for _ in range(2):  # the second time the link is there already
        export.export_base(model, tokenizer)
    _, read_tokenizer, read_model = export.load_base()
    words = captions(base, PROMPTS, [True, True])
    assert torch.equal(diffusion.tokenize(read_tokenizer, PROMPTS), words.ids)
    latents, t = torch.randn(2, 4, 8, 16), torch.tensor([500, 20])
    with torch.no_grad():
        written = model.float()  # saved in half precision
        assert torch.equal(read_model(latents, t, words), written(latents, t, words))
    export.export_style(style.build(read_model))
    export.save_components(tmp_path / "sdxl", controlnet=base.controlnet)
    folder = tmp_path / "sdxl"
    assert (folder / "vae").readlink() == Path("../sd2/vae")
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == shared
    loaded = load_base_model({path.name: path for path in folder.iterdir()}, torch.float32)
    assert loaded.tokens == style.TOKENS
    assert loaded.controlnet is not None


def test_the_first_model_and_its_features_load_from_where_they_are_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TINY", tmp_path)
    base = small_sd2.build()
    (encoder,) = base.text_encoders
    model = diffusion.TextToImage(encoder.model, base.unet)
    export.export_sd2(base.vae, model, encoder.tokenizer, base.perceptual)
    folders = [*(tmp_path / "sd2").iterdir(), tmp_path / "perceptual"]
    loaded = load_base_model({path.name: path for path in folders}, torch.float32)
    assert loaded.perceptual.config.distance_scale == export.DISTANCE_SCALE
    assert loaded.window == 16
    stored = load_file(tmp_path / "sd2" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}


def test_early_latents_lie_beyond_the_blurred_ones_away_from_another_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiny_vae, "BLUR", 0.0)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    away = latents - latents.flip(0)
    strengths = []
    for seed in range(20):
        early = tiny_vae.imitate_early(latents, torch.Generator().manual_seed(seed))
        strengths.append(float(((early - latents) / away).median()))
        torch.testing.assert_close(early, latents + strengths[-1] * away)
    assert 0 <= min(strengths) < 0.6 and 2.4 < max(strengths) <= tiny_vae.GUIDANCE


@pytest.mark.parametrize("scale", [1, 2])
def test_parts_of_spheres_are_those_of_their_latents(scale: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, 256, 512), generator=generator)
    latents = F.avg_pool2d(views.to_range(images), 8 * scale)
    parts, cut = autoencoder.draw_encoded(images, latents, (64, 128), 20, generator)
    assert parts.shape == (20, 3, 64, 128)
    torch.testing.assert_close(F.avg_pool2d(parts, 8), cut)
    assert len(cut.flatten(1).unique(dim=0)) > 10


def test_the_decoder_learns_and_the_encoder_stays(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "load", lambda work, kind, split: draw_images(kind, 1))
    plan = replace(autoencoder.DECODER.plan, steps=2, average=0.0)
    monkeypatch.setattr(autoencoder, "DECODER", replace(autoencoder.DECODER, plan=plan))
    before = copy.deepcopy(base.vae).half().float().state_dict()
    after = autoencoder.train_decoder(Work(tmp_path), base.vae).state_dict()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder", "post_quant_conv"}


def test_latents_are_of_as_many_images_as_there_are(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (1, 2):
        images = draw_images("rooms", count)
        monkeypatch.setattr(dataset, "load", lambda work, kind, split, images=images: images)
        found = [autoencoder.encode(Work(tmp_path), base.vae, "rooms") for _ in range(2)]
        assert len(found[0]) == count
        assert torch.equal(*found)


def test_both_models_get_the_distilled_decoder(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TINY", tmp_path / "tiny")
    monkeypatch.setattr(dataset, "load", lambda work, kind, split: draw_images(kind, 1))
    plan = replace(tiny_vae.STAGE.plan, steps=2, average=0.0)
    monkeypatch.setattr(tiny_vae, "STAGE", replace(tiny_vae.STAGE, plan=plan))
    trained = tiny_vae.train(Work(tmp_path), base.vae)
    torch.manual_seed(7)
    untrained = tiny_vae.build()
    assert not torch.equal(trained.decoder.layers[0].weight, untrained.decoder.layers[0].weight)
    for _ in range(2):  # the second time the link is there already
        export.export_tiny_vae(trained)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for name in ("sd2", "sdxl"):
        folder = tmp_path / "tiny" / name / "tiny_vae"
        assert '"block_out_channels"' not in (folder / "config.json").read_text()
        read = AutoencoderTiny.from_pretrained(folder)
        with torch.no_grad():
            assert torch.equal(decode(read, latents), decode(trained.float(), latents))


def draw_images(kind: str, count: int) -> dataset.Images:
    drawn = [dataset.draw_one(kind, "test", index) for index in range(count)]
    rgb, distance, attributes = zip(*drawn, strict=True)
    coarse = np.stack(distance)[:, :: dataset.COARSER, :: dataset.COARSER].astype(np.float16)
    return dataset.Images(np.stack(rgb), coarse, list(attributes))


def test_views_show_spheres_from_a_column_on_and_are_labelled() -> None:
    sets = [draw_images("outdoors", 1), draw_images("rooms", 2)]
    places = recognise.draw_places(sets, torch.Generator().manual_seed(0))
    spheres = [views.channels_first(images.rgb) for images in sets]
    shown = {
        recognise.WINDOW_VIEW: lambda image: image[scenes.STRIP, :256],
        recognise.SPHERE_VIEW: halve,
    }
    for view, show in shown.items():
        images = iter(view.show(spheres, places))
        for chosen, (index, left) in zip(sets, places, strict=True):
            for number, column in zip(index.tolist(), left.tolist(), strict=True):
                expected = show(np.roll(chosen.rgb[number], -column, 1))
                found = (next(images).permute(1, 2, 0).numpy() + 1) * 127.5
                assert np.abs(found - expected).max() <= 0.501
    answers = recognise.labels(sets[1].attributes, recognise.SPHERE_ATTRIBUTES)
    for name, values in recognise.SPHERE_ATTRIBUTES.items():
        for answer, facts in zip(answers[name], sets[1].attributes, strict=True):
            assert values[answer] == facts.get(name)


def test_half_the_size_is_the_mean_of_four_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 3)).astype(np.uint8)
    expected = F.avg_pool2d(torch.from_numpy(image).permute(0, 3, 1, 2).double(), 2)
    assert np.abs(halve(image) - expected.permute(0, 2, 3, 1).numpy()).max() <= 0.5


@pytest.mark.parametrize("up", [True, False])
def test_a_look_shows_what_lies_in_each_direction(up: bool) -> None:
    """On a sphere whose colours are its own coordinates."""
    height = 256
    rows, columns = np.mgrid[:height, : 2 * height]
    elevation = np.pi * (0.5 - (rows + 0.5) / height)
    azimuth = np.pi * (columns + 0.5) / height - np.pi
    vectors = np.stack([np.cos(elevation) * np.sin(azimuth), np.cos(elevation) * np.cos(azimuth),
                        np.sin(elevation)], -1)  # fmt: skip
    seen = look(((vectors + 1) * 127.5).round().astype(np.uint8), up=up) / 127.5 - 1
    places = np.tan(np.radians(50)) * (2 * (np.arange(256) + 0.5) / 256 - 1)  # 100 degrees wide
    x, y = np.broadcast_to(places[None], (256, 256)), np.broadcast_to(places[:, None], (256, 256))
    rays = np.stack([x, y if up else -y, np.full_like(x, 1 if up else -1)], -1)
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    assert np.abs(seen - rays).max() < 0.03


def read_pixels(image: torch.Tensor) -> np.ndarray:
    return image[0].permute(1, 2, 0).mul(255).round().byte().numpy()


def test_spheres_are_measured_as_requests_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_family(tmp_path, width=128, height=128, guidance_scale=3.0)
    models = load(str(tmp_path), device="cpu")
    settings = models.settings("sdxl-360")
    assert measure.lora_scales(settings) == (0.8, 0.0)
    monkeypatch.setattr(measure, "STEPS", 2)
    made = []
    for scale in measure.lora_scales(settings):
        made.append(read_pixels(measure.make_spheres(models, "sdxl-360", scale)("sea", 5)))
        request = Request(
            prompt="sea", mode="sdxl-360", seed=5, num_inference_steps=2, lora_scale=scale
        )
        assert np.array_equal(models.generate(request).image, made[-1])
    assert not np.array_equal(*made)


@pytest.mark.parametrize("mode", measure.SPHERE_INPUTS)
def test_spheres_follow_a_depth_image(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_family(tmp_path, modes=[mode], width=256, height=128, guidance_scale=3.0)
    monkeypatch.setattr(measure, "STEPS", 1)
    if measure.SPHERE_INPUTS[mode]:
        small = {**measure.SPHERE_INPUTS[mode], "width": 256, "height": 128}
        monkeypatch.setitem(measure.SPHERE_INPUTS, mode, small)
    make = measure.make_spheres(load(str(tmp_path), device="cpu"), mode, 0.8)
    depth = torch.rand(128, 256, generator=torch.Generator().manual_seed(0))
    without, followed, again = (make("sea", 5, depth=d) for d in (None, depth, depth))
    assert without.shape == followed.shape == (1, 3, 128, 256)
    assert torch.equal(followed, again)
    assert not torch.equal(without, followed)
