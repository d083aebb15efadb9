"""Prompts become what diffusers' stock pipelines make of them, at any length up to a bound."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from panorama.base_model import BaseModel, load_base_model
from panorama.conditioning.prompts import (
    MAX_CONTEXTS,
    add_special_tokens,
    check_lengths,
    encode_prompts,
    room,
    tokenize,
)
from panorama.errors import NotFiniteError
from panorama.sampling.denoiser import Conditioning
from tests import small_sd2, small_sdxl

TINY = Path(__file__).parents[2] / "weights" / "tiny"
TEXT, NEGATIVE = "night over the sea", "low quality, people"
LONG = "sunset over snowy mountains with trees under clouds, " * 9


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    tuned = small_sdxl.add_lora(small_sdxl.build(), tmp_path_factory.mktemp("lora"))
    return {"sd2": small_sd2.build(), "sdxl": tuned}


def encode(
    base: BaseModel, prompt: str | tuple[str, ...], negative: str = "", scale: float = 3.0
) -> Conditioning:
    return encode_prompts(base.text_encoders, base.embed_type, prompt, negative, scale)


def stock(base: BaseModel, prompt: str, negative: str) -> tuple[Tensor, Tensor | None]:
    """States and pooled embeddings of the negative prompt and the prompt, by diffusers."""
    parts: dict[str, Any] = small_sdxl.components(base)
    parts.pop("controlnet", None)
    if base.embed_type is None:
        none = {"safety_checker": None, "feature_extractor": None}
        pipe = StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)
        with torch.no_grad():
            positive, negatives = pipe.encode_prompt(prompt, "cpu", 1, True, negative)
        return torch.cat([negatives, positive]), None
    pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    with torch.no_grad():
        # Without a negative prompt, diffusers takes zeros, as SDXL was trained.
        positive, negatives, pooled, no_pooled = pipe.encode_prompt(
            prompt, negative_prompt=negative or None
        )
    return torch.cat([negatives, positive]), torch.cat([no_pooled, pooled])


def check_stock(base: BaseModel, prompt: str, negative: str) -> None:
    found = encode(base, prompt, negative)
    states, pooled = stock(base, prompt, negative)
    torch.testing.assert_close(found.states[:, 0], states)
    assert found.parts == 1
    if pooled is None:
        assert found.pooled is None
    else:
        assert found.pooled is not None
        torch.testing.assert_close(found.pooled[:, 0], pooled)


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
@pytest.mark.parametrize("negative", ["", NEGATIVE])
@pytest.mark.parametrize("prompt", [TEXT, f"<s0><s1> {TEXT}", "a \N{SNOWMAN} naïve"])
def test_a_prompt_is_embedded_as_the_stock_pipeline_does(
    bases: dict[str, BaseModel], name: str, prompt: str, negative: str
) -> None:
    check_stock(bases[name], prompt, negative)


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_the_embedded_family_embeds_prompts_as_the_stock_pipeline_does(name: str) -> None:
    parts = {path.name: path for path in (TINY / name).iterdir()}
    base = load_base_model(parts, torch.float32)
    for negative in ("", NEGATIVE):
        check_stock(base, "<s0><s1> bedroom in the color of blue", negative)


def test_an_empty_negative_prompt_is_zeros_for_sdxl(bases: dict[str, BaseModel]) -> None:
    found = encode(bases["sdxl"], TEXT)
    assert found.pooled is not None
    assert not found.states[0].any() and not found.pooled[0].any()
    assert found.states[1].any() and found.pooled[1].any()


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_without_guidance_there_is_only_the_prompt(bases: dict[str, BaseModel], name: str) -> None:
    both, alone = (encode(bases[name], TEXT, scale=scale) for scale in (0.5, 1.0))
    assert torch.equal(alone.states, both.states[1:])
    assert len(both.states) == 2
    assert (both.guidance_scale, alone.guidance_scale) == (0.5, 1.0)
    if both.pooled is not None:
        assert alone.pooled is not None and torch.equal(alone.pooled, both.pooled[1:])


def test_prompts_with_tokens_are_pooled_as_the_stock_pipeline_does(tmp_path: Path) -> None:
    """With SDXL's own end token, 2, that is at the last of the tokens, as in cog-sdxl."""
    base = small_sdxl.add_lora(small_sdxl.build(), tmp_path)
    encoder = base.text_encoders[1].model
    prompts = [f"<s0><s1> {subject}" for subject in ("bedroom", "kitchen")]
    for end, same in ((encoder.config.eos_token_id, False), (2, True)):
        encoder.text_model.eos_token_id = end
        pooled = [encode(base, prompt, scale=1.0).pooled for prompt in prompts]
        expected = [stock(base, prompt, "")[1][1:, None] for prompt in prompts]
        torch.testing.assert_close(pooled, expected)
        assert torch.equal(*pooled) == same


@pytest.mark.parametrize(("text", "contexts"), [("", 1), (TEXT, 1), ("sea " * 31, 2), (LONG, 3)])
def test_the_first_context_is_what_the_tokenizer_makes_of_a_text(
    bases: dict[str, BaseModel], text: str, contexts: int
) -> None:
    (encoder,) = bases["sd2"].text_encoders
    length = encoder.tokenizer.model_max_length
    padded = encoder.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        first = encoder.model(padded.input_ids).last_hidden_state
    states = encode(bases["sd2"], text).states
    torch.testing.assert_close(states[1, :, :length], first)
    assert states.shape[2] == contexts * length


def by_hand(base: BaseModel, text: str, contexts: int) -> tuple[Tensor, Tensor | None]:
    """States and pooled embedding of a text, one context of tokens after the other."""
    outputs = []
    for encoder in base.text_encoders:
        length = room(encoder.tokenizer)
        ids = tokenize(encoder.tokenizer, text)
        rows = [ids[k * length : (k + 1) * length] for k in range(contexts)]
        rows = [add_special_tokens(encoder.tokenizer, row) for row in rows]
        with torch.no_grad():
            each = [encoder.model(torch.tensor([r]), output_hidden_states=True) for r in rows]
        outputs.append(each)
    if base.embed_type is None:
        return torch.cat([out.last_hidden_state for out in outputs[0]], 1), None
    states = [torch.cat([out.hidden_states[-2] for out in each], 1) for each in outputs]
    return torch.cat(states, -1), outputs[1][0].text_embeds


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_a_long_prompt_is_read_context_by_context(bases: dict[str, BaseModel], name: str) -> None:
    base = bases[name]
    length = base.text_encoders[0].tokenizer.model_max_length
    count = len(tokenize(base.text_encoders[0].tokenizer, LONG))
    contexts = -(-count // (length - 2))
    assert contexts > 2
    for pair in ((LONG, NEGATIVE), (NEGATIVE, LONG)):  # the shorter one gets empty contexts
        found = encode(base, *pair)
        assert found.states.shape[:3] == (2, 1, contexts * length)
        for k, text in enumerate(reversed(pair)):
            states, pooled = by_hand(base, text, contexts)
            torch.testing.assert_close(found.states[k], states)
            if pooled is not None:
                assert found.pooled is not None
                torch.testing.assert_close(found.pooled[k], pooled)


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_every_part_is_embedded_as_a_prompt_of_its_own(
    bases: dict[str, BaseModel], name: str, scale: float
) -> None:
    base, parts = bases[name], (TEXT, "dawn | noon", LONG)
    found = encode(base, parts, NEGATIVE if scale != 1 else "", scale)
    assert found.parts == 3
    contexts = found.states.shape[2] // base.text_encoders[0].tokenizer.model_max_length
    assert contexts > 2  # as many as the longest part needs
    groups = [parts] if scale == 1 else [(NEGATIVE,) * 3, parts]  # the negative prompt comes first
    assert len(found.states) == len(groups)
    for k, texts in enumerate(groups):
        for p, text in enumerate(texts):
            states, pooled = by_hand(base, text, contexts)
            torch.testing.assert_close(found.states[k, p, None], states)
            assert (found.pooled is None) == (pooled is None)
            if found.pooled is not None:
                torch.testing.assert_close(found.pooled[k, p, None], pooled)


def words(base: BaseModel, count: int) -> str:
    """Return a text of so many tokens."""
    text = " ".join(["sea"] * count)
    assert len(tokenize(base.text_encoders[0].tokenizer, text)) == count
    return text


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_a_text_of_too_many_tokens_is_refused(
    bases: dict[str, BaseModel], name: str, field: str
) -> None:
    base = bases[name]
    most = MAX_CONTEXTS * (base.text_encoders[0].tokenizer.model_max_length - 2)
    texts = {"prompt": TEXT, "negative_prompt": ""}
    longest = encode(base, *(texts | {field: words(base, most)}).values())
    length = base.text_encoders[0].tokenizer.model_max_length
    assert longest.states.shape[2] == MAX_CONTEXTS * length
    with pytest.raises(ValueError) as error:
        encode(base, *(texts | {field: words(base, most + 1)}).values())
    message = str(error.value)
    assert message.startswith(f"{field}='sea sea") and len(message) < 250
    assert re.search(rf"at most {most} tokens", message) and str(most + 1) in message


def test_a_part_of_too_many_tokens_is_refused_by_its_number(bases: dict[str, BaseModel]) -> None:
    base = bases["sd2"]
    most = base.text_encoders[0].max_tokens
    assert encode(base, (TEXT, words(base, most), TEXT)).parts == 3  # each has room of its own
    with pytest.raises(ValueError) as error:
        encode(base, (TEXT, words(base, most + 1), TEXT))
    message = str(error.value)
    assert message.startswith("prompt='sea sea") and len(message) < 250
    assert "(part 2 of 3): must have" in message and str(most + 1) in message


def test_a_megabyte_is_refused_before_it_is_encoded(bases: dict[str, BaseModel]) -> None:
    base = bases["sd2"]
    seen: list[int] = []
    hook = base.text_encoders[0].model.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        with pytest.raises(ValueError, match=r"^prompt='sea.* 10000 characters") as error:
            encode(base, "sea " * 250_000)
    finally:
        hook.remove()
    assert len(str(error.value)) < 250 and not seen


def test_every_encoder_has_its_own_bound(bases: dict[str, BaseModel]) -> None:
    base = bases["sdxl"]
    first, second = base.text_encoders
    text = words(base, first.max_tokens)
    check_lengths([first, second], {"prompt": (text,)})
    second.tokenizer.model_max_length -= 1
    try:
        with pytest.raises(ValueError, match=f"at most {second.max_tokens} tokens"):
            check_lengths([first, second], {"prompt": (text,)})
    finally:
        second.tokenizer.model_max_length += 1


@pytest.mark.parametrize("weight", ["final_layer_norm", "text_projection"])
def test_an_embedding_that_is_not_finite_is_refused(weight: str) -> None:
    base = small_sdxl.build()
    encoder = base.text_encoders[1].model
    found = [p for name, p in encoder.named_parameters() if weight in name]
    with torch.no_grad():
        found[0].view(-1)[0] = torch.nan
    with pytest.raises(NotFiniteError, match="embeddings of the prompts"):
        encode(base, TEXT)
