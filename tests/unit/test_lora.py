"""LoRAs of cog-sdxl: loaded whole or refused, applied at a scale, and switched off again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from panorama.base_model import BaseModel, load_base_model
from panorama.conditioning.lora import LORA, TOKENS, load_lora, load_tokens, lora_applied
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.views import Spanning
from tests import small_sd2
from tests.small_sdxl import HIDDEN, add_lora, build, cog_sdxl, pivotal, save
from tests.state import State

PROMPT = "hdri view, bedroom in the color of blue"
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"


def run(base: BaseModel, on_step: Any = None, **changes: Any) -> Tensor:
    """The latents of a small ring."""
    inputs: dict[str, Any] = {"prompt": PROMPT, "height": 64, "width": 128, "closed": "x"}
    inputs |= {"num_inference_steps": 2, "guidance_scale": 3.0, "layout": Spanning()}
    settings, pipe = Settings(**inputs | changes), Pipeline(base)
    noise = pipe.noise(settings, torch.Generator().manual_seed(1))
    return pipe.denoise(settings, pipe.encode(settings), noise, on_step)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """With a LoRA; for tests that leave it as it was."""
    return add_lora(build(), tmp_path_factory.mktemp("lora"))


@pytest.fixture
def fresh() -> BaseModel:
    """Without a LoRA, to change."""
    return build()


def test_a_lora_loads_with_and_without_the_prefix(tmp_path: Path) -> None:
    results = []
    for prefix in ("", "unet."):
        base = build()
        before = run(base)
        load_lora(base.unet, cog_sdxl(base, tmp_path / "lora.safetensors", prefix))
        assert torch.equal(run(base, lora_scale=0), before)
        results.append(run(base, lora_scale=0.8))
        assert (results[-1] - before).abs().max() > 0.01
    assert torch.equal(*results)


def test_a_lora_changes_attention_as_its_formula_says(fresh: BaseModel, tmp_path: Path) -> None:
    unet, path = fresh.unet, tmp_path / "lora.safetensors"
    layer = unet.get_submodule(f"{ATTENTION}.to_q")
    x = torch.randn(1, 5, layer.in_features)
    weights = load_file(cog_sdxl(fresh, path))
    down, up = (
        weights[f"{ATTENTION}.processor.to_q_lora.{side}.weight"] for side in ("down", "up")
    )
    plain = layer(x)
    load_lora(unet, path)
    layer = unet.get_submodule(f"{ATTENTION}.to_q")
    for scale in (0.8, 0.3, 2.0):
        with lora_applied(unet, scale):
            torch.testing.assert_close(layer(x), plain + scale * (x @ down.T @ up.T))
        torch.testing.assert_close(layer(x), plain)


def test_a_scale_leaves_nothing_to_the_next(tuned: BaseModel) -> None:
    first = run(tuned, lora_scale=0.7)
    for other in (0.3, 0):
        assert not torch.equal(run(tuned, lora_scale=other), first)
    assert torch.equal(run(tuned, lora_scale=0.7), first)


@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_a_run_leaves_the_lora_as_it_was_even_if_it_fails(tuned: BaseModel, scale: float) -> None:
    def stop(*_: Any) -> Tensor:
        raise InterruptedError

    run(tuned, lora_scale=0.3)
    before = State.of(tuned)
    assert before.scalings
    with pytest.raises(InterruptedError):
        run(tuned, stop, lora_scale=scale)
    before.check(tuned)
    run(tuned, lora_scale=scale)
    before.check(tuned)


def test_a_model_without_a_lora_ignores_its_scale(fresh: BaseModel) -> None:
    assert torch.equal(run(fresh, lora_scale=0.8), run(fresh, lora_scale=0))
    with lora_applied(small_sd2.build().unet, 0.8):
        pass


def test_a_lora_may_be_on_convolutions(fresh: BaseModel) -> None:
    unet = fresh.unet
    layers = ["conv_in", "conv_out", "conv1", "conv2", "to_q"]
    config = LoraConfig(r=4, target_modules=layers, init_lora_weights="gaussian")
    unet.add_adapter(config, adapter_name=LORA)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    unet.disable_lora()
    off, on = run(fresh, lora_scale=0), run(fresh, lora_scale=1.0)
    assert (on - off).abs().max() > 0.01


def leftovers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {f"text_encoder.{key}": weight.clone() for key, weight in weights.items()}


def one_prefixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    (first, weight), *others = weights.items()
    return dict(others) | {f"unet.{first}": weight}


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("mid_block", "middle"): weight for key, weight in weights.items()}


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (leftovers, "nothing else"),
        (one_prefixed, r"begin with unet\. or none, not 1"),
        (renamed, "nothing else"),
        (lambda weights: {}, "0 weights have a place"),
    ],
    ids=["leftovers", "one prefixed", "renamed", "empty"],
)
def test_a_lora_that_does_not_fit_is_refused(
    fresh: BaseModel,
    tmp_path: Path,
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    rule: str,
) -> None:
    path = cog_sdxl(fresh, tmp_path / "lora.safetensors")
    save_file(spoil(load_file(path)), path)
    with pytest.raises(ValueError, match=rf"^lora\.safetensors: .*{rule}.*try a lora\."):
        load_lora(fresh.unet, path)


def test_both_encoders_learn_the_tokens(fresh: BaseModel, tmp_path: Path) -> None:
    embeddings = load_file(pivotal(tmp_path / "embeddings.safetensors"))
    before = run(fresh)
    load_tokens(fresh.text_encoders, tmp_path / "embeddings.safetensors")
    assert torch.equal(run(fresh), before)
    for encoder, learned in zip(fresh.text_encoders, embeddings.values(), strict=True):
        _, first, second, *_ = encoder.tokenizer("<s0><s1> bedroom").input_ids
        assert [first, second] == encoder.tokenizer.convert_tokens_to_ids(list(TOKENS))
        table = encoder.model.get_input_embeddings().weight
        assert torch.equal(table[[first, second]], learned)
    found = run(fresh, prompt="<s0><s1> bedroom") - run(fresh, prompt="bedroom")
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("embeddings", "found"),
    [
        ({}, "None"),
        ({"text_encoders_0": torch.ones(3, HIDDEN[0])}, r"\(3, 16\)"),
        ({"text_encoders_0": torch.ones(2, HIDDEN[0])}, "None"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    fresh: BaseModel, tmp_path: Path, embeddings: dict[str, Tensor], found: str
) -> None:
    path = tmp_path / "embeddings.safetensors"
    save_file(embeddings, path)
    index = len(embeddings) if found == "None" else 0
    legal = rf"\(2, {HIDDEN[index]}\)"
    with pytest.raises(
        ValueError, match=rf"^embeddings\.safetensors: text_encoders_{index} .*{found}.*{legal}"
    ):
        load_tokens(fresh.text_encoders, path)


def test_a_base_model_loads_its_lora_and_its_tokens(tuned: BaseModel, tmp_path: Path) -> None:
    base = build()
    parts = save(base, tmp_path)
    assert load_base_model(parts, torch.float32).tokens == ()
    parts["lora.safetensors"] = cog_sdxl(base, tmp_path / "lora.safetensors")
    parts["embeddings.safetensors"] = pivotal(tmp_path / "embeddings.safetensors")
    loaded = load_base_model(parts, torch.float32)
    assert loaded.tokens == TOKENS
    prompt = f"<s0><s1> {PROMPT}"
    assert torch.equal(run(loaded, prompt=prompt), run(tuned, prompt=prompt))


def test_a_lora_needs_no_trigger_tokens(fresh: BaseModel, tmp_path: Path) -> None:
    paths = save(fresh, tmp_path)
    paths["lora.safetensors"] = cog_sdxl(fresh, tmp_path / "lora.safetensors")
    base = load_base_model(paths, torch.float32)
    assert base.has_lora and base.tokens == ()
    assert not torch.equal(run(base, lora_scale=1.0), run(base, lora_scale=0))
    assert not load_base_model(save(fresh, tmp_path), torch.float32).has_lora
