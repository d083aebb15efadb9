"""Prompts along the canvas, from the request to the latents, on small random models."""

from typing import Any

import pytest
import torch
from torch import Tensor

from panorama.base_model import BaseModel
from panorama.modes import Models, load
from panorama.pipeline import Pipeline, Settings
from panorama.request import Request
from panorama.sampling.views import Fixed, Sliding, Spanning
from tests import small_sd2, small_sdxl

NIGHT, NOON = "night over the sea", "noon over green hills"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return small_sd2.build()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """SDXL in windows of 128 pixels, with a LoRA."""
    folder = tmp_path_factory.mktemp("family")
    defaults = {"width": 256, "height": 128, "guidance_scale": 3.0}
    small_sdxl.save_family(folder, modes=("syncdiffusion-xl", "sdxl-360"), **defaults)
    return load(str(folder), device="cpu")


def settings(prompt: str | tuple[str, ...], **changes: Any) -> Settings:
    """Return a panorama of two windows of 64 pixels that do not overlap."""
    inputs: dict[str, Any] = {"height": 64, "width": 128, "layout": Fixed(16)}
    return Settings(prompt=prompt, num_inference_steps=2, **inputs | changes)


def denoise(base: BaseModel, prompt: str | tuple[str, ...], **changes: Any) -> Tensor:
    pipe, chosen = Pipeline(base), settings(prompt, **changes)
    noise = pipe.noise(chosen, torch.Generator().manual_seed(0))
    return pipe.denoise(chosen, pipe.encode(chosen), noise)


@pytest.mark.parametrize(
    ("size", "dim"), [({}, -1), ({"height": 128, "width": 64}, -2)], ids=["wide", "tall"]
)
def test_parts_follow_one_another_along_the_longer_side(
    base: BaseModel, size: dict[str, int], dim: int
) -> None:
    first, second = denoise(base, (NIGHT, NOON), **size).chunk(2, dim)
    night, noon = denoise(base, NIGHT, **size), denoise(base, NOON, **size)
    torch.testing.assert_close(first, night.chunk(2, dim)[0])
    torch.testing.assert_close(second, noon.chunk(2, dim)[1])
    assert not torch.allclose(night, noon)


def test_one_part_is_a_prompt_and_a_prompt_is_one_part(base: BaseModel) -> None:
    assert torch.equal(denoise(base, (NIGHT,)), denoise(base, NIGHT))
    assert Pipeline(base).encode(settings("night | noon")).parts == 1


@pytest.mark.parametrize("closed", ["", "x"])
def test_parts_with_one_text_are_one_part(base: BaseModel, closed: str) -> None:
    options: dict[str, Any] = {"width": 192, "layout": Sliding(8), "closed": closed}
    parts = denoise(base, (NIGHT,) * 3, **options)
    torch.testing.assert_close(parts, denoise(base, NIGHT, **options), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(parts, denoise(base, (NIGHT, NIGHT, NOON), **options), atol=1e-2)


@pytest.mark.parametrize(
    ("prompt", "changes", "words"),
    [
        ((), {}, ["prompt=()", "at least one part"]),
        (
            ("a", "b", "c"),
            {},
            ["3 parts with width=128, which has room for 2:", "64 pixels", "try width=192"],
        ),
        (
            ("a", "b"),
            {"width": 124},
            ["2 parts with width=124, which has room for 1:", "try width=128"],
        ),
        (
            ("a",) * 4,
            {"height": 192},
            ["4 parts with height=192, which has room for 3:", "try height=256"],
        ),
        (
            ("a", "b"),
            {"layout": Spanning()},
            ["2 parts where one view spans the canvas", "try layout="],
        ),
    ],
)
def test_parts_without_room_are_refused(
    base: BaseModel, prompt: tuple[str, ...], changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        denoise(base, prompt, **changes)
    message = str(error.value)
    assert message.startswith(f"prompt={prompt!r}: must ")
    assert all(word in message for word in words), message


def test_embeddings_of_too_many_parts_are_refused(base: BaseModel) -> None:
    pipe, chosen = Pipeline(base), settings(NIGHT)
    conditioning = pipe.encode(settings(("a", "b", "c")))
    with pytest.raises(
        ValueError, match=r"^prompt='night.*not have 3 parts.*room for 2.*; try width=192"
    ):
        pipe.denoise(chosen, conditioning, pipe.noise(chosen))


def request(prompt: str, **inputs: Any) -> Request:
    defaults = {"mode": "syncdiffusion-xl", "num_inference_steps": 2, "seed": 1}
    return Request(prompt=prompt, **defaults | inputs)


def test_a_request_passes_its_parts_with_the_tokens_of_the_lora(models: Models) -> None:
    prompt = rf"{NIGHT}  |<s1> {NOON} \| noon"
    panorama = models.generate(request(prompt))
    chosen = models.prepare(request(prompt)).settings()
    assert chosen.prompt == (f"<s0><s1> {NIGHT}", f"<s1> {NOON} | noon")
    assert panorama.metadata["inputs"]["prompt"] == prompt
    assert panorama.metadata["tokens"] == "<s0><s1>"
    assert models.generate(request(prompt)).image == panorama.image
    assert models.generate(request(NIGHT)).image != panorama.image


def test_a_request_without_room_for_its_parts_is_refused_before_any_work(models: Models) -> None:
    for sides in ({"width": 384}, {"height": 384}):
        assert len(models.prepare(request("a | b | c", **sides)).request.parts) == 3
    with pytest.raises(
        ValueError, match=r"^prompt='a \| b \| c': .*3 parts.*room for 2.*; try width=384$"
    ):
        models.prepare(request("a | b | c"))


def test_a_part_of_too_many_tokens_is_refused_before_any_work(models: Models) -> None:
    with pytest.raises(ValueError, match=r"^prompt='<s0><s1> sea .*\(part 2 of 2\): .*tokens"):
        models.prepare(request("night | " + "sea " * 500))
