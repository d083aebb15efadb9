"""The safety checker withholds an image that it flags, wherever the matter lies in it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from panorama import weights
from panorama.images.safety import ImageWithheldError, SafetyChecker, squares
from panorama.modes import Models, load
from panorama.request import Request
from panorama.sampling.canvas import Axis
from tests.small_safety import ALL, NONE, SIDE, save_checker
from tests.small_sdxl import save_family

QUICK = {"prompt": "bedroom", "mode": "sdxl-360", "num_inference_steps": 1, "seed": 1}
WITHHELD = r"StableDiffusionSafetyChecker.*another seed or prompt"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a family of one mode, which each test gives the checker it wants."""
    folder = tmp_path_factory.mktemp("family")
    save_family(folder, width=128, height=64, guidance_scale=3.0)
    return folder


def load_with(family: Path, tmp_path: Path, threshold: float | None) -> Models:
    for part in family.iterdir():
        (tmp_path / part.name).symlink_to(part)
    if threshold is not None:
        save_checker(tmp_path / "safety_checker", threshold)
    return load(str(tmp_path), device="cpu")


def make(models: Models, **inputs: object) -> Image.Image:
    return models.generate(Request(**QUICK | inputs)).image


def test_a_family_without_a_checker_checks_nothing(family: Path, tmp_path: Path) -> None:
    models = load_with(family, tmp_path, None)
    assert models.checker is None
    assert make(models).tobytes() == make(models, disable_safety_checker=True).tobytes()


def test_an_image_that_passes_is_the_one_made_without_a_checker(
    family: Path, tmp_path: Path
) -> None:
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    passed = make(load_with(family, tmp_path / "with", NONE))
    assert passed.tobytes() == make(load_with(family, tmp_path / "without", None)).tobytes()


def test_a_flagged_image_is_withheld_and_leaves_nothing_to_the_next(
    family: Path, tmp_path: Path
) -> None:
    models = load_with(family, tmp_path, ALL)
    unchecked = make(models, disable_safety_checker=True)
    with pytest.raises(ImageWithheldError, match=WITHHELD):
        make(models)
    shown: list[Image.Image] = []
    with pytest.raises(ImageWithheldError, match=WITHHELD):
        models.generate(Request(**QUICK), lambda step, steps, preview: shown.append(preview()))
    assert shown == []
    assert np.array(unchecked).any()  # the checker paints what it flags black
    assert make(models, disable_safety_checker=True).tobytes() == unchecked.tobytes()
    with pytest.raises(ImageWithheldError):
        make(models)


def test_a_checker_in_this_repository_is_found_wherever_the_weights_are(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it is baked into an image, and the weights lie on a volume."""
    bundled, volume = tmp_path / "bundled", tmp_path / "volume"
    for folder in (bundled, volume):
        (folder / "some").mkdir(parents=True)
    for part in family.iterdir():
        (volume / "some" / part.name).symlink_to(part)
    save_checker(bundled / "some" / "safety_checker", ALL)
    monkeypatch.setattr(weights, "BUNDLED", bundled)
    monkeypatch.setenv("PANORAMA_WEIGHTS", str(volume))
    (bundled / "manifest.toml").touch()
    models = load("some", device="cpu")
    assert models.checker and models.checker.name == "StableDiffusionSafetyChecker"
    with pytest.raises(ImageWithheldError):
        make(models)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_checker_that_is_not_whole_is_no_checker_to_go_without(
    family: Path, tmp_path: Path, name: str
) -> None:
    load_with(family, tmp_path, ALL)
    (tmp_path / "safety_checker" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"safety_checker.*{re.escape(name)}"):
        load(str(tmp_path), device="cpu")


def test_a_weight_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    save_checker(tmp_path, ALL)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    del state["concept_embeds"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors.*concept_embeds"):
        SafetyChecker.from_pretrained(tmp_path, torch.float32)


def test_weights_with_their_published_names_are_read(tmp_path: Path) -> None:
    """CLIPVisionModel once held a vision_model, and the published names are from then."""
    save_checker(tmp_path, ALL)
    mine = SafetyChecker.from_pretrained(tmp_path, torch.float32).model.state_dict()
    path = tmp_path / "model.safetensors"
    published = {
        name.replace("vision_model.", "vision_model.vision_model."): weight.clone()
        for name, weight in load_file(path).items()
    }
    assert len(published.keys() - mine.keys()) > 20
    save_file(published, path, metadata={"format": "pt"})
    read = SafetyChecker.from_pretrained(tmp_path, torch.float32).model.state_dict()
    assert all(torch.equal(read[name], mine[name]) for name in mine)


def test_sizes_as_they_were_published_are_read(tmp_path: Path) -> None:
    """A number of pixels, where a table stands today."""
    save_checker(tmp_path, NONE)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": SIDE, "crop_size": SIDE}))
    checker = SafetyChecker.from_pretrained(tmp_path, torch.float32)
    pixels = checker.processor(torch.zeros(3, 64, 64), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, SIDE, SIDE)


def striped(width: int, height: int, left: int) -> Image.Image:
    """Grey, with black and white stripes for 64 columns from `left` on, around the edge too."""
    values = np.full((height, width, 3), 127, np.uint8)
    columns = np.arange(left, left + 64) % width
    values[:, columns] = np.where(np.arange(64) // 8 % 2, 255, 0)[None, :, None]
    return Image.fromarray(values)


@pytest.fixture
def checker(tmp_path: Path) -> SafetyChecker:
    """One that knows stripes from grey."""
    save_checker(tmp_path, NONE)
    checker = SafetyChecker.from_pretrained(tmp_path, torch.float32)
    whole = [torch.from_numpy(np.array(striped(64, 64, 0))).permute(2, 0, 1)]
    plain = torch.full_like(whole[0], 127)
    halves = [torch.roll(whole[0], 32, 2).clone() for _ in range(2)]
    halves[0][:, :, :32], halves[1][:, :, 32:] = 127, 127  # of stripes that the edge cuts in two
    concept, *others = (embed(checker, square) for square in [*whole, plain, *halves])
    nearest = max(float(torch.cosine_similarity(concept, other, dim=0)) for other in others)
    assert nearest < 0.99  # or the threshold would tell nothing apart
    checker.model.concept_embeds.data[:] = concept
    checker.model.concept_embeds_weights.data.fill_((1 + nearest) / 2)
    return checker


def embed(checker: SafetyChecker, square: torch.Tensor) -> torch.Tensor:
    pixels = checker.processor(square, return_tensors="pt").pixel_values
    with torch.no_grad():
        return checker.model.visual_projection(checker.model.vision_model(pixels)[1])[0]


@pytest.mark.parametrize("left", [0, 64, 192])
def test_all_of_a_wide_image_is_checked(checker: SafetyChecker, left: int) -> None:
    with pytest.raises(ImageWithheldError):
        checker.check(striped(256, 64, left), "")


def test_all_of_a_tall_image_is_checked(checker: SafetyChecker) -> None:
    image = Image.new("RGB", (64, 256), (127, 127, 127))
    checker.check(image, "y")
    image.paste(striped(64, 64, 0), (0, 192))
    with pytest.raises(ImageWithheldError):
        checker.check(image, "")


def test_stripes_on_the_edge_are_seen_where_the_image_closes(checker: SafetyChecker) -> None:
    image = striped(256, 64, 224)
    checker.check(image, "")
    with pytest.raises(ImageWithheldError):
        checker.check(image, "x")


@pytest.mark.parametrize(
    ("width", "height", "closed", "count"),
    [(264, 64, "x", 9), (64, 264, "y", 9), (264, 64, "", 8), (264, 64, "y", 16), (65, 65, "x", 3)],
)
def test_squares_overlap_by_half_and_are_as_few_as_can(
    width: int, height: int, closed: Axis, count: int
) -> None:
    assert len(list(squares(Image.new("RGB", (width, height)), closed))) == count


@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 64), (64, 136), (1024, 512)])
@pytest.mark.parametrize("closed", ["", "x", "y"])
def test_every_pixel_is_in_a_square(width: int, height: int, closed: Axis) -> None:
    numbers = np.arange(width * height)
    image = Image.fromarray(
        np.stack([numbers >> shift & 255 for shift in (16, 8, 0)], -1)
        .astype(np.uint8)
        .reshape(height, width, 3)
    )
    seen: set[int] = set()
    for square in squares(image, closed):
        assert square.shape == (3, min(width, height), min(width, height))
        red, green, blue = square.int()
        seen |= set((red << 16 | green << 8 | blue).flatten().tolist())
    assert seen == set(range(width * height))


def test_a_checker_runs_in_half_precision(tmp_path: Path) -> None:
    save_checker(tmp_path, ALL)
    checker = SafetyChecker.from_pretrained(tmp_path, torch.bfloat16)
    assert checker.model.dtype == torch.bfloat16
    with pytest.raises(ImageWithheldError):
        checker.check(striped(128, 64, 0), "x")
