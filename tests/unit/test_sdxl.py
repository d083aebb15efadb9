"""SDXL around a full turn, on a random model of SDXL's shape."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from panorama.circular import circular, padded_convolutions
from panorama.decode import MAX_CELLS
from panorama.models import MODES, Models, load
from panorama.request import INPUTS, OWN_INPUTS, Request
from panorama.sdxl import LORA, SDXL360, TOKENS, load_lora, load_tokens, lora_applied
from tests.small_sdxl import build, cog_sdxl, pivotal, save_family

HEIGHT, WIDTH = 64, 256  # pixels; the least multiple is 32
PROMPT = "hdri view, bedroom in the color of blue"
FACTOR = 8
DEPTH = torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))
PICTURES = {
    "text": {},
    "depth": {"depth": DEPTH, "controlnet_conditioning_scale": 1.0},
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> SDXL360:
    """Without a LoRA; for tests that leave it as it was."""
    return build(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def fresh(tmp_path: Path) -> SDXL360:
    """One to change."""
    return build(tmp_path)


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory: pytest.TempPathFactory) -> SDXL360:
    """With a LoRA on convolutions, those of the UNet's first and last layer among them."""
    pipe = build(tmp_path_factory.mktemp("convolutional"))
    layers = ["conv_in", "conv_out", "conv1", "conv2", "to_q"]
    config = LoraConfig(r=4, target_modules=layers, init_lora_weights="gaussian")
    pipe.text.unet.add_adapter(config, adapter_name=LORA)
    for name, parameter in pipe.text.unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    pipe.text.unet.disable_lora()
    return pipe


def noise() -> Tensor:
    shape = (1, 4, HEIGHT // FACTOR, WIDTH // FACTOR)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


ARGUMENTS: dict[str, Any] = {
    "prompt": PROMPT,
    "height": HEIGHT,
    "width": WIDTH,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "latents": noise(),
    "output_type": "pt",
}


def run(pipe: SDXL360, **changes: Any) -> Tensor:
    """A small picture (3, H, W) in [0, 1]."""
    return pipe(**ARGUMENTS | changes)[0]


def stock(pipe: SDXL360, **changes: Any) -> Tensor:
    """The picture (3, H, W) in [0, 1] of the stock pipeline, nothing wrapping."""
    chosen = pipe.depth if "image" in changes else pipe.text
    with torch.no_grad():
        return chosen(**ARGUMENTS | changes).images[0]


def shifts(pipe: SDXL360) -> range:
    """Every roll that the UNet's downsampling allows, latent cells."""
    least = 2 ** (len(pipe.text.unet.config.block_out_channels) - 1)
    assert least == 4  # as SDXL's
    return range(least, WIDTH // FACTOR, least)


@pytest.mark.parametrize("lora", ["without", "with a convolutional"])
@pytest.mark.parametrize("kind", PICTURES)
def test_rolling_the_noise_and_the_depth_rolls_the_picture(
    pipe: SDXL360, convolutional: SDXL360, kind: str, lora: str
) -> None:
    tested = pipe if lora == "without" else convolutional
    options = PICTURES[kind] | {"lora_scale": 1.0}
    picture = run(tested, **options)
    for cells in shifts(tested):
        moved = {"depth": DEPTH.roll(cells * FACTOR, -1)} if kind == "depth" else {}
        rolled = run(tested, **options | moved | {"latents": noise().roll(cells, -1)})
        assert (rolled - picture.roll(cells * FACTOR, -1)).abs().max() < 1e-4


def test_without_the_patch_it_does_not(pipe: SDXL360) -> None:
    options: dict[str, dict[str, Any]] = {
        "text": {},
        "depth": {"image": DEPTH.expand(1, 3, -1, -1), "controlnet_conditioning_scale": 1.0},
    }
    for option in options.values():
        picture = stock(pipe, **option)
        if option:
            option["image"] = option["image"].roll(16 * FACTOR, -1)
        rolled = stock(pipe, **option, latents=noise().roll(16, -1))
        assert (rolled - picture.roll(16 * FACTOR, -1)).abs().max() > 0.03


def test_every_part_takes_part(pipe: SDXL360, convolutional: SDXL360) -> None:
    """Or the equivariance of the whole would say nothing about it."""
    text = run(pipe)
    assert (run(pipe, **PICTURES["depth"]) - text).abs().max() > 0.01
    assert (
        run(convolutional, lora_scale=1.0) - run(convolutional, lora_scale=0)
    ).abs().max() > 0.01


@dataclass
class State:
    """All of a pipeline's models that a run could change."""

    attributes: list[tuple[str, ...]]
    scalings: list[dict[str, float]]  # of LoRAs
    parameters: list[Tensor]
    learning: list[bool]

    @classmethod
    def of(cls, pipe: SDXL360) -> Self:
        models = [m for m in pipe.depth.components.values() if isinstance(m, nn.Module)]
        modules = [module for model in models for module in model.modules()]
        parameters = [parameter for model in models for parameter in model.parameters()]
        return cls(
            [tuple(sorted(vars(module))) for module in modules],
            [dict(module.scaling) for module in modules if isinstance(module, LoraLayer)],
            [parameter.detach().clone() for parameter in parameters],
            [parameter.requires_grad for parameter in parameters],
        )

    def check(self, pipe: SDXL360) -> None:
        now = State.of(pipe)
        assert (now.attributes, now.scalings, now.learning) == (
            self.attributes,
            self.scalings,
            self.learning,
        )
        assert all(map(torch.equal, now.parameters, self.parameters))


@pytest.mark.parametrize("kind", PICTURES)
def test_nothing_is_left_behind(convolutional: SDXL360, kind: str) -> None:
    def stop(*_: Any) -> dict[str, Tensor]:
        raise RuntimeError("stop")

    picture = stock(convolutional)
    before = State.of(convolutional)  # only now: text encoders note that they were used
    assert before.scalings
    run(convolutional, **PICTURES[kind])
    before.check(convolutional)
    assert torch.equal(stock(convolutional), picture)
    with pytest.raises(RuntimeError, match="stop"):
        run(convolutional, **PICTURES[kind], callback_on_step_end=stop)
    before.check(convolutional)
    assert torch.equal(stock(convolutional), picture)


def test_an_autoencoder_that_does_not_overflow_is_as_precise_as_the_rest(
    fresh: SDXL360, tmp_path: Path
) -> None:
    fresh.text.vae.register_to_config(force_upcast=False)
    fresh.text.save_pretrained(tmp_path)
    fresh.depth.controlnet.save_pretrained(tmp_path / "controlnet")
    half = SDXL360.from_pretrained(tmp_path, torch.bfloat16)
    assert half.text.vae.dtype == torch.bfloat16


def test_both_pipelines_share_their_models(pipe: SDXL360) -> None:
    for name, component in pipe.text.components.items():
        assert pipe.depth.components[name] is component


@pytest.mark.parametrize("kind", PICTURES)
def test_it_is_the_stock_pipeline_with_every_convolution_wrapping(pipe: SDXL360, kind: str) -> None:
    condition = dict(PICTURES[kind])
    if condition:
        condition["image"] = condition.pop("depth").expand(1, 3, -1, -1)
    with circular(pipe.text.unet, pipe.text.vae, pipe.depth.controlnet):
        expected = stock(pipe, **condition)
    torch.testing.assert_close(run(pipe, **PICTURES[kind]), expected, atol=1e-5, rtol=0)


def test_texts_of_any_length_are_read_to_their_end(pipe: SDXL360) -> None:
    long = "a bedroom in the color of blue, " * 8
    assert len(pipe.text.tokenizer(long).input_ids) > pipe.text.tokenizer.model_max_length
    assert not torch.equal(run(pipe, prompt=long), run(pipe, prompt=long + "with a red door"))
    assert not torch.equal(
        run(pipe, negative_prompt=long), run(pipe, negative_prompt=long + "no window")
    )


def test_a_conditioning_scale_of_0_gives_the_picture_of_the_text(pipe: SDXL360) -> None:
    picture = run(pipe, depth=DEPTH, controlnet_conditioning_scale=0.0)
    assert torch.equal(picture, run(pipe))


def test_half_precision_makes_the_same_picture_of_a_seed(pipe: SDXL360, tmp_path: Path) -> None:
    pipe.text.save_pretrained(tmp_path)
    pipe.depth.controlnet.save_pretrained(tmp_path / "controlnet")
    half = SDXL360.from_pretrained(tmp_path, torch.bfloat16)  # CPUs lack much in float16
    assert half.text.unet.dtype == half.depth.controlnet.dtype == torch.bfloat16
    # The VAE overflows in half precision, and so is not even rounded to it.
    weights = (p.text.vae.parameters() for p in (half, pipe))
    assert all(map(torch.equal, *weights))
    for kind in PICTURES.values():
        pictures = [
            run(p, **kind, latents=None, generator=torch.Generator().manual_seed(7))
            for p in (half, pipe)
        ]
        assert (pictures[0] - pictures[1]).abs().mean() < 0.05
        assert (pictures[0] - run(pipe, **kind)).abs().mean() > 0.1  # which has another seed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 264}, "width=264: width must be a multiple of 32; 256 would do"),
        ({"height": 0}, "height=0: height must be at least 32, .*; 32 would do"),
        ({"depth": DEPTH[:, 1:]}, r"depth has shape \(64, 255\): .*; \(64, 256\) would do"),
        ({"latents": noise()[..., 1:]}, r"latents has shape .*; \(1, 4, 8, 32\) would do"),
        ({"output_type": "np"}, "output_type='np': must be one of pil, pt"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5: .*must be at least 1.0, .*; 1.0 would do"),
        (
            {"guidance_scale": 1.0, "negative_prompt": "fog"},
            "negative_prompt='fog': .* must be empty with guidance_scale=1.0",
        ),
    ],
)
def test_bad_arguments_are_refused(pipe: SDXL360, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(pipe, **changes)


def test_a_lora_loads_with_and_without_the_prefix(tmp_path: Path) -> None:
    pictures = []
    for prefix in ("", "unet."):
        pipe = build(tmp_path)
        before = run(pipe)
        load_lora(pipe.text.unet, cog_sdxl(pipe, tmp_path / "lora.safetensors", prefix))
        assert torch.equal(run(pipe, lora_scale=0), before)
        pictures.append(run(pipe, lora_scale=0.8))
        assert (pictures[-1] - before).abs().max() > 0.01
    assert torch.equal(*pictures)


def test_a_lora_changes_attention_as_its_formula_says(fresh: SDXL360, tmp_path: Path) -> None:
    unet, path = fresh.text.unet, tmp_path / "lora.safetensors"
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(1, 5, layer.in_features)
    weights = load_file(cog_sdxl(fresh, path))
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    down, up = (weights[f"{key}.{side}.weight"] for side in ("down", "up"))
    expected = layer(x) + 0.8 * (x @ down.T @ up.T)
    load_lora(unet, path)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    with lora_applied(unet, 0.8):
        torch.testing.assert_close(layer(x), expected)


def test_a_scale_leaves_nothing_to_the_next(convolutional: SDXL360) -> None:
    first = run(convolutional, lora_scale=0.7)
    run(convolutional, lora_scale=0.3)
    run(convolutional, lora_scale=0)
    assert torch.equal(run(convolutional, lora_scale=0.7), first)


def test_a_lora_of_which_anything_is_left_over_is_refused(fresh: SDXL360, tmp_path: Path) -> None:
    path = cog_sdxl(fresh, tmp_path / "lora.safetensors")
    weights = load_file(path)
    count = len(weights)
    save_file(weights | {f"text_encoder.{key}": w.clone() for key, w in weights.items()}, path)
    with pytest.raises(ValueError, match=rf"lora\.safetensors: .* of {2 * count} .* {count} have"):
        load_lora(fresh.text.unet, path)


def test_a_lora_with_the_prefix_on_some_keys_only_is_refused(
    fresh: SDXL360, tmp_path: Path
) -> None:
    path = cog_sdxl(fresh, tmp_path / "lora.safetensors")
    (first, weight), *others = load_file(path).items()
    save_file(dict(others) | {f"unet.{first}": weight}, path)
    with pytest.raises(ValueError, match=r"keys must begin with unet\. or none, not 1;"):
        load_lora(fresh.text.unet, path)


def test_an_empty_lora_is_refused(pipe: SDXL360, tmp_path: Path) -> None:
    save_file({}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora\.safetensors: .* of 0 weights 0 have a place"):
        load_lora(pipe.text.unet, tmp_path / "lora.safetensors")


def test_both_encoders_learn_the_tokens(fresh: SDXL360, tmp_path: Path) -> None:
    embeddings = load_file(pivotal(tmp_path / "embeddings.safetensors"))
    before = run(fresh)
    load_tokens(fresh.text, tmp_path / "embeddings.safetensors")
    assert torch.equal(run(fresh), before)
    pairs = [(fresh.text.tokenizer, fresh.text.text_encoder)]
    pairs += [(fresh.text.tokenizer_2, fresh.text.text_encoder_2)]
    for (tokenizer, encoder), learned in zip(pairs, embeddings.values(), strict=True):
        _, first, second, *_ = tokenizer("<s0><s1> bedroom").input_ids
        assert [first, second] == tokenizer.convert_tokens_to_ids(list(TOKENS))
        table = encoder.get_input_embeddings().weight
        assert torch.equal(table[[first, second]], learned)
    assert (run(fresh, prompt="<s0><s1> bedroom") - run(fresh, prompt="bedroom")).abs().max() > 1e-3


def test_prompts_with_tokens_are_pooled_as_the_stock_pipeline_does(
    fresh: SDXL360, tmp_path: Path
) -> None:
    """With SDXL's own end token, 2, that is at the last of the tokens, as in cog-sdxl."""
    load_tokens(fresh.text, pivotal(tmp_path / "embeddings.safetensors"))
    encoder = fresh.text.text_encoder_2
    prompts = [f"<s0><s1> {subject}" for subject in ("bedroom", "kitchen")]
    for end, same in ((encoder.config.eos_token_id, False), (2, True)):
        encoder.text_model.eos_token_id = end
        with torch.no_grad():
            pooled = [fresh._embeds(prompt, "")["pooled_prompt_embeds"] for prompt in prompts]
            _, _, expected, _ = fresh.text.encode_prompt(prompts)
        torch.testing.assert_close(torch.cat(pooled), expected)
        assert torch.equal(*pooled) == same


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ({}, r"text_encoders_0 has shape None; \(2, 16\) would do"),
        ({"text_encoders_0": torch.ones(3, 16)}, r"has shape \(3, 16\); \(2, 16\) would do"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    pipe: SDXL360, tmp_path: Path, embeddings: dict[str, Tensor], message: str
) -> None:
    path = tmp_path / "embeddings.safetensors"
    save_file(embeddings, path)
    with pytest.raises(ValueError, match=message):
        load_tokens(pipe.text, path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A family of this mode alone, loaded from its files, with a LoRA."""
    folder = tmp_path_factory.mktemp("family")
    save_family(folder, width=WIDTH, height=128, guidance_scale=3.0)
    return load(str(folder), device="cpu")


def generate(models: Models, **inputs: Any) -> Image.Image:
    request = Request(
        **{
            "prompt": PROMPT,
            "mode": "sdxl-360",
            "num_inference_steps": 2,
            "seed": 1,
            **inputs,
        }
    )
    return models.generate(request.resolve(models.settings("sdxl-360")))


def test_a_family_makes_pictures_from_requests(models: Models) -> None:
    settings = models.settings("sdxl-360")
    assert (settings.multiple, settings.tokens) == (32, TOKENS)
    assert settings.least_guidance == 1
    assert settings.largest == MAX_CELLS * FACTOR**2
    picture = generate(models)
    assert picture.size == (WIDTH, 128)
    assert np.array_equal(picture, generate(models))
    assert np.array_equal(picture, generate(models, prompt=f"<s0><s1> {PROMPT}"))
    assert not np.array_equal(picture, generate(models, lora_scale=0))


def test_a_request_follows_its_depth_image(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "depth.png"
    Image.fromarray((DEPTH.numpy() * 255).astype(np.uint8)).save(path)
    picture = generate(models, depth_image=path)
    assert picture.size == (WIDTH, HEIGHT)
    assert not np.array_equal(picture, generate(models, height=HEIGHT))
    unconditioned = generate(models, depth_image=path, controlnet_conditioning_scale=0)
    assert np.array_equal(unconditioned, generate(models, height=HEIGHT))
    assert generate(models, depth_image=path, width=128).size == (128, HEIGHT)


def test_edges_that_do_not_meet_are_warned_of_where_they_are_followed(
    models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "depth.png"
    ramp = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    Image.fromarray(ramp).save(path)
    for scale, warnings in ((0, 0), (0.5, 1)):
        caplog.clear()
        generate(models, depth_image=path, controlnet_conditioning_scale=scale)
        assert len([r for r in caplog.records if "edges differ" in r.getMessage()]) == warnings


def test_steps_are_reported(models: Models) -> None:
    steps = []
    request = Request(prompt="sea", mode="sdxl-360", num_inference_steps=3, width=64, height=64)
    resolved = request.resolve(models.settings("sdxl-360"))
    models.generate(resolved, lambda step, count: steps.append((step, count)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_a_mode_that_a_family_lacks_is_refused_with_those_it_has(models: Models) -> None:
    message = "mode='syncdiffusion': mode must be one that the family .* offers, sdxl-360; "
    for refused in (models.settings, lambda mode: load(models.family, modes=[mode])):
        with pytest.raises(ValueError, match=f"{message}'sdxl-360' would do"):
            refused("syncdiffusion")


def test_there_is_a_function_for_every_mode() -> None:
    assert tuple(MODES) == tuple(OWN_INPUTS) == INPUTS["mode"].choices


PUBLISHED = Path(__file__).parents[1] / "data" / "sdxl"


@pytest.mark.parametrize(
    ("kind", "name", "millions"),
    [
        (UNet2DConditionModel, "unet", 2567.463684),
        (AutoencoderKL, "vae", 83.653863),
        (ControlNetModel, "controlnet", 272.586),
    ],
)
def test_the_published_models_have_no_padding_that_the_patch_does_not_reach(
    kind: Any, name: str, millions: float
) -> None:
    with torch.device("meta"):
        model = kind.from_config(json.loads((PUBLISHED / f"{name}.json").read_text()))
    assert sum(parameter.numel() for parameter in model.parameters()) == round(millions * 1e6)
    reached = {id(module) for module in padded_convolutions((model,))}
    # The VAE's encoder, which nothing here runs, pads its downsampling outside the convolutions.
    model.encoder = None
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
            assert id(module) in reached
        assert not isinstance(
            module, nn.ConvTranspose2d | nn.Upsample | nn.MaxPool2d | nn.AvgPool2d
        )
