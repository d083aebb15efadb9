"""LoRAs as people have them: read whole or refused, applied at a scale, and taken off again."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from panorama.base_model import BaseModel, load_base_model, own_lora
from panorama.conditioning.lora import LoraError, load_tokens, lora_applied, read_lora
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.views import Spanning
from tests import loras
from tests.loras import ATTENTION, CONVOLUTIONS, RESNETS, TEXT, UNET, Layers, draw, networks
from tests.small_sdxl import HIDDEN, add_lora, build, cog_sdxl, pivotal, save
from tests.state import State

SDXL = Path(__file__).parents[1] / "data" / "sdxl"
PROMPT = "hdri view, bedroom in the color of blue"


def run(base: BaseModel, on_step: Any = None, **changes: Any) -> Tensor:
    """Return the latents of a small ring."""
    inputs: dict[str, Any] = {"prompt": PROMPT, "height": 64, "width": 128, "closed": "x"}
    inputs |= {"num_inference_steps": 2, "guidance_scale": 3.0, "layout": Spanning()}
    settings, pipe = Settings(**inputs | changes), Pipeline(base)
    noise = pipe.noise(settings, torch.Generator().manual_seed(1))
    return pipe.denoise(settings, pipe.encode(settings), noise, on_step)


# --- every format means what it says ---

Case = tuple[Callable[[BaseModel], Layers], loras.Spell, dict[str, Any] | None]

CASES: dict[str, Case] = {
    "cog-sdxl": (lambda base: draw(base, ATTENTION), loras.cog_sdxl, None),
    "diffusers": (lambda base: draw(base, CONVOLUTIONS, TEXT, (2, 3)), loras.diffusers, None),
    "PEFT": (lambda base: draw(base, RESNETS, TEXT), loras.peft, None),
    "PEFT, mixed ranks": (lambda base: draw(base, RESNETS, TEXT, (4, 2, 3)), loras.peft, None),
    "PEFT, alphas beside the weights": (
        lambda base: loras.with_alphas(draw(base, UNET, TEXT, (4, 2)), (1.0, 8.0, 3.0)),
        loras.peft,
        None,
    ),
    "PEFT, one alpha in the metadata": (
        lambda base: loras.with_alphas(draw(base, UNET, TEXT, (4, 2)), (16.0,)),
        loras.peft,
        {f"{name}.lora_alpha": 16 for name in ("unet", "text_encoder", "text_encoder_2")},
    ),
    "DoRA in PEFT form": (
        lambda base: loras.with_magnitudes(draw(base, CONVOLUTIONS, TEXT)),
        loras.peft,
        None,
    ),
    "DoRA in PEFT form, with an alpha": (
        lambda base: loras.with_magnitudes(loras.with_alphas(draw(base, UNET), (1.0,))),
        loras.peft,
        {"unet.lora_alpha": 1, "unet.use_dora": True, "unet.alpha_pattern": None},
    ),
    "kohya": (
        lambda base: loras.with_alphas(draw(base, UNET, TEXT, (4,)), (1.0,)),
        loras.kohya,
        None,
    ),
    "kohya without alphas": (lambda base: draw(base, UNET, TEXT), loras.kohya, None),
    "kohya, LoCon, mixed": (
        lambda base: loras.with_alphas(draw(base, RESNETS, TEXT, (2, 3, 4)), (1.0, 4.0, 8.0)),
        loras.kohya,
        None,
    ),
    "kohya with Stability's names, LoCon, mixed": (
        lambda base: loras.with_alphas(draw(base, RESNETS, TEXT, (3, 4)), (1.0, 4.0, 8.0)),
        loras.kohya_sgm,
        None,
    ),
}


def weights_of(base: BaseModel) -> dict[tuple[str, str], Tensor]:
    """Return a copy of every weight by network and layer."""
    return {
        (network, name.removesuffix(".weight")): parameter.detach().clone()
        for network, module in networks(base).items()
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize("name", CASES)
def test_every_weight_changes_as_the_file_means(tmp_path: Path, name: str) -> None:
    make, spell, metadata = CASES[name]
    base = build()
    layers, before = make(base), weights_of(base)
    path = loras.save(layers, tmp_path / "lora.safetensors", spell, metadata)
    lora = read_lora(path, networks(base))
    for scale in (1.0, 0.3, 2.0):
        with lora_applied(networks(base), lora, scale):
            found = weights_of(base)
        for key, weight in found.items():
            expected = layers[key].changed(scale) if key in layers else before[key]
            torch.testing.assert_close(weight, expected, msg=f"{key} at {scale}")
        assert all(torch.equal(weight, before[key]) for key, weight in weights_of(base).items())


@pytest.mark.parametrize("spell", [loras.kohya, partial(loras.kohya_sgm, layers=2), loras.peft])
def test_a_lora_of_every_layer_of_sdxl_itself_has_a_place(
    tmp_path: Path, spell: loras.Spell
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((SDXL / "unet.json").read_text()))
    base: Any = SimpleNamespace(unet=unet, text_networks={})
    layers = loras.with_alphas(draw(base, RESNETS, ranks=(1,)), (0.5, 0.25))
    path = loras.save(layers, tmp_path / "lora.safetensors", spell)
    changes = read_lora(path, {"unet": unet}).changes["unet"]
    assert len(changes) == len(layers) > 700
    for (_, name), layer in layers.items():
        assert torch.equal(changes[name].down, layer.down)
        assert changes[name].strength == layer.alpha


def test_the_metadata_may_give_a_layer_its_own_alpha(tmp_path: Path) -> None:
    base = build()
    layers = draw(base, UNET, ranks=(4,))
    for (_, name), layer in layers.items():
        layer.strength = 8 / 4 if name.endswith("attn2.to_k") else 1 / 4
    metadata = {"unet.lora_alpha": 1, "unet.alpha_pattern": {"attn2.to_k": 8}, "unet.r": 4}
    for rslora in (False, True):
        changed = metadata | {"unet.use_rslora": rslora}
        path = loras.save(layers, tmp_path / "lora.safetensors", loras.peft, changed)
        lora = read_lora(path, networks(base))
        factor = 2.0 if rslora else 1.0  # alpha / sqrt(4)
        for (_, name), layer in layers.items():
            assert lora.changes["unet"][name].strength == factor * layer.strength


def test_a_lora_in_half_precision_keeps_the_precision_of_the_model(tmp_path: Path) -> None:
    base = build()
    for layer in (layers := draw(base, UNET)).values():
        layer.down, layer.up = layer.down.half(), layer.up.half()
    path = loras.save(layers, tmp_path / "lora.safetensors", loras.peft)
    base.unet.half()
    with lora_applied({"unet": base.unet}, read_lora(path, networks(base)), 0.8):
        for (_, name), layer in layers.items():
            weight = base.unet.get_submodule(name).weight
            layer.down, layer.up = layer.down.float(), layer.up.float()
            torch.testing.assert_close(weight, layer.changed(0.8).half(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_convolutions_of_a_lora_wrap(tmp_path: Path, dora: bool) -> None:
    base = build()
    layers = draw(base, CONVOLUTIONS)
    layers = loras.with_magnitudes(layers) if dora else layers
    path = loras.save(layers, tmp_path / "lora.safetensors", loras.peft)
    base = replace(base, lora=own_lora(base, path))
    noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(1))

    def make(noise: Tensor) -> Tensor:
        settings = Settings(PROMPT, 64, 128, closed="x", num_inference_steps=2, layout=Spanning())
        return Pipeline(base).denoise(settings, Pipeline(base).encode(settings), noise)

    still = make(noise)
    assert (make(noise.roll(4, -1)) - still.roll(4, -1)).abs().max() < 1e-3 * still.abs().max()


def test_the_text_encoders_take_their_part_in_the_prompt_alone(tmp_path: Path) -> None:
    base = build()
    path = loras.save(draw(base, UNET, TEXT), tmp_path / "lora.safetensors", loras.kohya)
    lora = own_lora(base, path)
    settings = Settings(PROMPT, 64, 128)
    plain = Pipeline(base).encode(settings)
    tuned = Pipeline(base).encode(replace(settings, lora=lora))
    again = Pipeline(base).encode(settings)
    assert (tuned.states - plain.states).abs().max() > 0.01
    assert torch.equal(again.states, plain.states) and torch.equal(again.pooled, plain.pooled)


# --- applied, and taken off again ---


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """With a LoRA; for tests that leave it as it was."""
    return add_lora(build(), tmp_path_factory.mktemp("lora"))


@pytest.fixture
def fresh() -> BaseModel:
    """Without a LoRA, to change."""
    return build()


def test_a_lora_loads_with_and_without_the_prefix(fresh: BaseModel, tmp_path: Path) -> None:
    before, results = run(fresh), []
    for prefix in ("", "unet."):
        lora = own_lora(fresh, cog_sdxl(fresh, tmp_path / "lora.safetensors", prefix))
        base = replace(fresh, lora=lora)
        assert torch.equal(run(base, lora_scale=0), before)
        results.append(run(base, lora_scale=0.8))
        assert (results[-1] - before).abs().max() > 0.01
    assert torch.equal(*results)


def test_a_scale_leaves_nothing_to_the_next(tuned: BaseModel) -> None:
    first = run(tuned, lora_scale=0.7)
    for other in (0.3, 0):
        assert not torch.equal(run(tuned, lora_scale=other), first)
    assert torch.equal(run(tuned, lora_scale=0.7), first)


def test_loras_leave_nothing_to_one_another(fresh: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    first = own_lora(fresh, loras.save(draw(fresh, UNET, TEXT), path, loras.kohya))
    second = own_lora(fresh, loras.save(draw(fresh, CONVOLUTIONS, ranks=(3,)), path, loras.peft))
    plain, alone = run(fresh), run(fresh, lora=second)
    assert not torch.equal(run(fresh, lora=first), alone)
    assert torch.equal(run(fresh, lora=second), alone)
    assert torch.equal(run(fresh), plain)


def test_a_lora_takes_the_place_of_the_models_own(tuned: BaseModel, tmp_path: Path) -> None:
    path = loras.save(draw(tuned, UNET, TEXT), tmp_path / "lora.safetensors", loras.kohya)
    lora = own_lora(tuned, path)
    assert torch.equal(run(tuned, lora=lora), run(replace(tuned, lora=None), lora=lora))


@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_a_run_leaves_the_model_as_it_was_even_if_it_fails(tuned: BaseModel, scale: float) -> None:
    def stop(*_: Any) -> Tensor:
        raise InterruptedError

    run(tuned, lora_scale=0.3)
    before = State.of(tuned)
    with pytest.raises(InterruptedError):
        run(tuned, stop, lora_scale=scale)
    before.check(tuned)
    run(tuned, lora_scale=scale)
    before.check(tuned)


def test_a_model_without_a_lora_ignores_its_scale(fresh: BaseModel) -> None:
    assert torch.equal(run(fresh, lora_scale=0.8), run(fresh, lora_scale=0))


# --- what cannot be read ---

Spoil = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def renamed(old: str, new: str) -> Spoil:
    return lambda weights: {key.replace(old, new): weight for key, weight in weights.items()}


def narrow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a LoRA for text of 768 channels."""
    changes = {k: torch.ones(2, 768) for k in weights if k.endswith("attn2_to_k.lora_down.weight")}
    return weights | changes


SPOILED: dict[str, tuple[Spoil, str]] = {
    "LoHa": (renamed("lora_down", "hada_w1_a"), "a LoHa"),
    "LoKr": (renamed("lora_down", "lokr_w1"), "a LoKr"),
    "Tucker": (lambda w: w | {"lora_unet_conv_in.lora_mid.weight": torch.ones(1)}, "Tucker"),
    "DoRA of kohya": (lambda w: w | {"lora_unet_conv_in.dora_scale": torch.ones(1)}, "a DoRA in"),
    "PEFT's adapter": (renamed("lora_unet_", "base_model.model."), "a PEFT adapter"),
    "FLUX": (renamed("lora_unet_", "lora_unet_double_blocks_0_"), "FLUX"),
    "checkpoint": (renamed("lora_unet_", "model.diffusion_model."), "FLUX|whole checkpoint"),
    "no LoRA": (lambda w: {"emb_params": torch.ones(2, 4)}, "1 tensors without a LoRA"),
    "empty": (lambda w: {}, "0 tensors without a LoRA"),
    "another base": (narrow, "a LoRA for Stable Diffusion 1: .* layers have no place"),
    "unknown layer": (renamed("mid_block", "mid_block_9"), "no place in this model, such as 'mid"),
    "unknown network": (renamed("lora_te1_", "lora_te3_"), "a tensor of an unknown kind"),
    "half": (
        lambda w: {k: v for k, v in w.items() if "mid_block" not in k or "up.weight" not in k},
        "keys of an unknown kind",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_lora_that_does_not_fit_is_refused_in_one_line(
    fresh: BaseModel, tmp_path: Path, name: str
) -> None:
    spoil, kind = SPOILED[name]
    path = loras.save(draw(fresh, UNET, TEXT), tmp_path / "lora.safetensors", loras.kohya)
    save_file(spoil(load_file(path)), path)
    with pytest.raises(
        ValueError, match=rf"^lora\.safetensors: must be .*, not .*({kind})"
    ) as error:
        own_lora(fresh, path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def bad_peft(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    (key, weight), *_ = weights.items()
    return weights | {key.replace("lora_A", "lora_E"): weight.clone()}


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (bad_peft, "a tensor of an unknown kind"),
        (lambda w: dict(list(w.items())[1:]), "lacks a half of"),
        (renamed("text_encoder_2", "text_encoder_3"), "weights for 'text_encoder_3'"),
    ],
)
def test_nothing_in_a_lora_of_peft_is_left_out(
    fresh: BaseModel, tmp_path: Path, spoil: Spoil, kind: str
) -> None:
    path = loras.save(draw(fresh, UNET, TEXT), tmp_path / "lora.safetensors", loras.peft)
    save_file(spoil(load_file(path)), path)
    with pytest.raises(LoraError, match=kind):
        read_lora(path, networks(fresh))


def test_keys_of_two_kinds_are_refused(fresh: BaseModel, tmp_path: Path) -> None:
    layers = draw(fresh, UNET)
    path = tmp_path / "lora.safetensors"
    both = load_file(loras.save(layers, path, loras.kohya))
    save_file(both | load_file(loras.save(layers, path, loras.kohya_sgm)), path)
    with pytest.raises(LoraError, match="keys of two kinds"):
        read_lora(path, networks(fresh))


def test_an_alpha_is_not_empty(fresh: BaseModel, tmp_path: Path) -> None:
    layers = loras.with_alphas(draw(fresh, UNET), (4.0,))
    path = loras.save(layers, tmp_path / "lora.safetensors", loras.kohya)
    weights = load_file(path)
    key = next(key for key in weights if "alpha" in key)
    save_file(weights | {key: torch.ones(0)}, path)
    with pytest.raises(LoraError, match="a LoRA with keys"):
        read_lora(path, networks(fresh))


@pytest.mark.parametrize("tensor", [torch.ones(()), torch.ones(3), torch.ones(0, 8)])
@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_halves_are_matrices(fresh: BaseModel, tmp_path: Path, side: str, tensor: Tensor) -> None:
    path = loras.save(draw(fresh, UNET), tmp_path / "lora.safetensors", loras.peft)
    weights = load_file(path)
    key = next(key for key in weights if side in key)
    save_file(weights | {key: tensor}, path)
    with pytest.raises(LoraError, match="that are no matrices"):
        read_lora(path, networks(fresh))


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ("{", "metadata is damaged"),
        ("[" * 100_000, "metadata is damaged"),
        ('{"unet.alpha_pattern": []}', "metadata is damaged"),
        ('{"unet.alpha_pattern": {"(a+)+$": 1}}', "by a pattern"),
        ('{"unet.lora_alpha": "many"}', "alpha, 'many', is not a finite number"),
        ('{"unet.lora_alpha": [1]}', "not a finite number"),
        ('{"unet.lora_alpha": Infinity}', "not a finite number"),
        ('{"unet.lora_alpha": 1' + "0" * 400 + "}", "not a finite number"),
    ],
)
def test_metadata_that_cannot_be_read_is_refused(
    fresh: BaseModel, tmp_path: Path, metadata: str, kind: str
) -> None:
    path = loras.save(draw(fresh, UNET), tmp_path / "lora.safetensors", loras.peft)
    save_file(load_file(path), path, {"lora_adapter_metadata": metadata})
    with pytest.raises(LoraError, match=kind):
        read_lora(path, networks(fresh))


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "LFS pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "LFS",
    ),
    "page": (lambda _: b"\n<!DOCTYPE html><html><body>Log in</body></html>", "a web page"),
    "JSON": (lambda _: b'{"error": "Unauthorized"}', "JSON"),
    "pickle": (lambda _: b"PK\x03\x04archive/data.pkl", "a pickle"),
    "empty": (lambda _: b"", "an empty file"),
    "cut": (lambda whole: whole[:-1], "cut off"),
    "cut in its header": (lambda whole: whole[:100], "cut off"),
    "noise": (lambda _: bytes(range(1, 200)), "damaged"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_safetensors_is_named(
    fresh: BaseModel, tmp_path: Path, name: str
) -> None:
    spoil, kind = FILES[name]
    path = cog_sdxl(fresh, tmp_path / "lora.safetensors")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"^lora\.safetensors: must be .*, not .*{kind}") as error:
        own_lora(fresh, path)
    assert "\n" not in str(error.value)


# --- trigger tokens ---


@pytest.mark.parametrize("rows", [1, 2, 3, 12])
@pytest.mark.parametrize("names", [("text_encoders_0", "text_encoders_1"), ("clip_l", "clip_g")])
def test_both_encoders_learn_as_many_tokens_as_there_are(
    fresh: BaseModel, tmp_path: Path, rows: int, names: tuple[str, str]
) -> None:
    path, generator = tmp_path / "embeddings.safetensors", torch.Generator().manual_seed(6)
    shapes = zip(names, HIDDEN, strict=True)
    learned = {name: torch.randn(rows, hidden, generator=generator) for name, hidden in shapes}
    save_file(learned, path)
    before = run(fresh)
    tokens = load_tokens(fresh.text_encoders, path)
    assert tokens == tuple(f"<s{i}>" for i in range(rows))
    assert torch.equal(run(fresh), before)
    for encoder, name in zip(fresh.text_encoders, names, strict=True):
        for text in ("".join(tokens), "".join(tokens).upper()):
            _, *ids, last, _ = encoder.tokenizer(f"{text} bedroom").input_ids
            assert len(ids) == rows and last == encoder.tokenizer("bedroom").input_ids[1]
            table = encoder.model.get_input_embeddings().weight
            assert torch.equal(table[ids], learned[name])
    found = run(fresh, prompt="<s0> bedroom") - run(fresh, prompt="bedroom")
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("embeddings", "found"),
    [
        ({}, "text_encoders_0 has shape None"),
        ({"text_encoders_0": torch.ones(3, HIDDEN[1])}, r"text_encoders_0 has shape \(3, 24\)"),
        ({"text_encoders_0": torch.ones(2, HIDDEN[0])}, "text_encoders_1 has shape None"),
        ({"clip_l": torch.ones(2, HIDDEN[0])}, "clip_g has shape None"),
        (
            {"clip_l": torch.ones(2, HIDDEN[0]), "clip_g": torch.ones(3, HIDDEN[1])},
            r"clip_l has shape \(2, 16\); must be \(3, 16\)",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    fresh: BaseModel, tmp_path: Path, embeddings: dict[str, Tensor], found: str
) -> None:
    path = tmp_path / "embeddings.safetensors"
    save_file(embeddings, path)
    sizes = [len(encoder.tokenizer) for encoder in fresh.text_encoders]
    with pytest.raises(ValueError, match=rf"^embeddings\.safetensors: {found}"):
        load_tokens(fresh.text_encoders, path)
    assert [len(encoder.tokenizer) for encoder in fresh.text_encoders] == sizes


def test_a_base_model_loads_its_lora_and_its_tokens(tuned: BaseModel, tmp_path: Path) -> None:
    base = build()
    parts = save(base, tmp_path)
    bare = load_base_model(parts, torch.float32)
    assert bare.lora is None and bare.tokens == ()
    parts["lora.safetensors"] = cog_sdxl(base, tmp_path / "lora.safetensors")
    assert load_base_model(parts, torch.float32).tokens == ()
    parts["embeddings.safetensors"] = pivotal(tmp_path / "embeddings.safetensors")
    loaded = load_base_model(parts, torch.float32)
    assert loaded.tokens == ("<s0>", "<s1>")
    prompt = f"<s0><s1> {PROMPT}"
    assert torch.equal(run(loaded, prompt=prompt), run(tuned, prompt=prompt))
