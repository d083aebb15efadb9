"""Measures of an image follow their definitions and leave the image alone."""

import re
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.activations import Activations
from panorama.images.files import SUFFIXES, read_metadata
from panorama.jobs import stages_of
from panorama.modes import Models, load
from panorama.pipeline import Pipeline, Settings
from panorama.quality import (
    BAND,
    badness,
    can_compare,
    disjoint_windows,
    edge_ratio,
    intra_lpips,
    measure,
    seam_contrast,
    seam_ratio,
    seam_shows,
    sharpness,
    unusual,
)
from panorama.request import Request
from panorama.sampling.perceptual import LPIPS
from panorama.sampling.views import Fixed, Sliding
from tests import small_sd2
from tests.small_sdxl import small_perceptual

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 128, 256  # pixels: two windows of the small SDXL
DEFAULTS = {"width": WIDTH, "height": HEIGHT, "guidance_scale": 3.0}


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    """Return an image (1, 3, height, width) in 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)


# --- pixels ---


@pytest.mark.parametrize("height", [5, BAND, 2 * BAND + 3])
def test_the_seam_ratio_is_that_of_its_definition(height: int) -> None:
    image = noise(height, 32)
    floats = image.double()
    step = (floats[..., 0] - floats[..., -1]).abs().mean()
    expected = float(step / floats.diff(dim=-1).abs().mean())
    assert seam_ratio(image) == pytest.approx(expected)
    assert seam_ratio(image.mT, "y") == pytest.approx(expected)
    assert seam_ratio(floats / 255) == pytest.approx(expected)


def test_the_seam_contrast_is_that_of_its_definition() -> None:
    image = noise(BAND, 32)
    before, seam, after = (image.double()[..., [-2, -1, 0, 1]]).diff(dim=-1).abs().mean((0, 1, 2))
    expected = float(2 * seam / (before + after))
    assert seam_contrast(image) == pytest.approx(expected)
    assert seam_contrast(image.mT, "y") == pytest.approx(expected)


def test_sharpness_is_that_of_its_definition_and_less_where_it_is_blurred() -> None:
    image = noise(2 * BAND + 3, 32)
    floats = image.double()
    expected = sum(float(floats.diff(dim=dim).abs().mean()) for dim in (-1, -2)) / 2
    assert sharpness(image) == pytest.approx(expected)
    blurred = torch.nn.functional.avg_pool2d(floats, 3, 1)
    assert sharpness(blurred) < sharpness(image) / 2


@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
def test_panels_at_fixed_windows_have_edges_and_smooth_images_none(turned: bool) -> None:
    base = small_sd2.build()
    side, pipeline = base.window * base.factor, Pipeline(base)
    size = {"height": 4 * side, "width": side} if turned else {"height": side, "width": 4 * side}
    settings = Settings(prompt="sea", **size, layout=Fixed(base.window))
    panels = torch.tensor([0.2, 0.5, 0.3, 0.9]).repeat_interleave(side).expand(1, 3, side, -1)
    even = torch.linspace(0, 1, 4 * side).expand(1, 3, side, -1)
    grid = (even * 4 * base.window).floor()  # steps between all cells, as decoders make them

    def ratio(image: Tensor, settings: Settings = settings, steps: int = 8) -> float:
        return edge_ratio(image.mT if turned else image, pipeline, settings, steps)

    # All steps are at 3 edges, of 4 * window - 1 places between cells.
    assert ratio(panels) == pytest.approx((4 * base.window - 1) / 3, rel=1e-4)
    for smooth in (even, grid):
        assert ratio(smooth) == pytest.approx(1, rel=1e-3)
    sliding = replace(settings, closed="y" if turned else "x", layout=Sliding(None))
    assert ratio(panels, sliding, 50) < 4


def test_edges_are_looked_for_in_the_upper_third_of_a_wide_image() -> None:
    base = small_sd2.build()
    side, pipeline = base.window * base.factor, Pipeline(base)
    settings = Settings(prompt="sea", height=side, width=2 * side, layout=Fixed(base.window))
    image = torch.linspace(0, 1, 2 * side).repeat(1, 3, side, 1)
    before = edge_ratio(image, pipeline, settings, 1)
    image[..., side // 3 :, side:] += 1
    assert edge_ratio(image, pipeline, settings, 1) == before
    image[..., side // 3 - 1, side:] += 1
    assert edge_ratio(image, pipeline, settings, 1) > 2 * before


def test_only_a_few_rows_at_a_time_become_floats() -> None:
    """All of them would take 1.6 GB in an image of 16384 x 8192 pixels."""
    image = torch.zeros(16 * BAND, 16 * BAND, 3, dtype=torch.uint8).permute(2, 0, 1)[None]
    for find in (seam_ratio, sharpness):
        with Activations([image]) as activations:
            find(image)
        floats = 4 * image.nbytes
        assert 0 < activations.most < floats / 4


# --- windows ---


@pytest.mark.parametrize(("ring", "lefts"), [(False, [0, 35, 70]), (True, [0, 33, 66])])
def test_windows_reach_from_end_to_end_or_around_a_ring(ring: bool, lefts: list[int]) -> None:
    columns = torch.arange(100).expand(1, 1, 40, -1)
    rows = torch.arange(40)[:, None].expand(1, 1, -1, 100)
    for turn in (lambda x: x, lambda x: x.mT):
        windows = [*disjoint_windows(turn(columns), 30, ring=ring)]
        assert [int(window.min()) for window in windows] == lefts
        assert {window.shape for window in windows} == {(1, 1, 30, 30)}
        middle = [*disjoint_windows(turn(rows), 30, ring=ring)]
        assert [int(window.min()) for window in middle] == [5, 5, 5]


def test_a_tall_image_is_not_turned_on_its_side() -> None:
    image = noise(96, 32)
    tops = torch.cat([*disjoint_windows(image, 32)])
    assert tops.equal(torch.cat(image.split(32, -2)))


@pytest.fixture(scope="module")
def perceptual() -> LPIPS:
    """Return the network that guides the tiny family."""
    network: LPIPS = LPIPS.from_pretrained(ROOT / "weights" / "tiny" / "perceptual")
    return network.eval()


@pytest.mark.parametrize("network", [small_perceptual().eval(), None], ids=["small", "tiny"])
def test_intra_lpips_is_the_mean_of_the_distances_of_all_pairs(
    network: LPIPS | None, perceptual: LPIPS
) -> None:
    network = network or perceptual
    image = noise(64, 5 * 64)
    windows = [window / 127.5 - 1 for window in image.float().split(64, -1)]
    with torch.no_grad():
        pairs = [float(network(a, b)) for a, b in combinations(windows, 2)]
    found = intra_lpips(network, disjoint_windows(image, 64))
    assert found == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)


def test_intra_lpips_of_an_enlarged_image_is_that_before(perceptual: LPIPS) -> None:
    image = noise(64, 3 * 64)
    large = image.repeat_interleave(4, -1).repeat_interleave(4, -2)
    before = intra_lpips(perceptual, disjoint_windows(image, 64))
    after = intra_lpips(perceptual, disjoint_windows(large, 4 * 64), 4)
    assert after == pytest.approx(before, rel=1e-4)


def pixels(path: Path) -> Tensor:
    """Return an image file as (1, 3, H, W), in 8 bits."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]


def test_windows_of_different_palettes_score_worse_than_those_of_one(perceptual: LPIPS) -> None:
    """The sunset of the README; its middle as bright as day, then as dark as night."""
    sunset = pixels(ROOT / "docs" / "sunset.png")
    side, own = sunset.shape[-2], intra_lpips(perceptual, disjoint_windows(sunset, 256))
    for factor in (0.4, 1.5):
        other = sunset.float()
        other[..., side : 2 * side] = (factor * other[..., side : 2 * side]).clamp(0, 255)
        other = other.byte()
        assert intra_lpips(perceptual, disjoint_windows(other, 256)) > 1.5 * own
    same = torch.cat([sunset[..., :side]] * 3, -1)
    assert intra_lpips(perceptual, disjoint_windows(same, 256)) == pytest.approx(0, abs=1e-5)


# --- images of a family ---


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Return a small random family of every mode."""
    family = small_sd2.save_family(tmp_path_factory.mktemp("family"), **DEFAULTS)
    return load(family, device="cpu")


def request(mode: str, **inputs: Any) -> Request:
    defaults = {"prompt": "night over the sea", "mode": mode, "num_inference_steps": 2, "seed": 1}
    speed = {} if mode == "sdxl-360" else {"speed": "fast"}
    return Request(**defaults | speed | inputs)


SEAM = {"seam_ratio", "seam_contrast"}
EVERY = {"intra_lpips", "edge_ratio", "sharpness"}
HAS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "strip": ("syncdiffusion", {}, EVERY),
    "ring": ("syncdiffusion", {"loop_closure": True}, EVERY | SEAM),
    "xl": ("syncdiffusion-xl", {"upscale": 2}, EVERY),
    "one window": ("syncdiffusion-xl", {"width": HEIGHT}, {"sharpness"}),
    "360": ("sdxl-360", {}, {*SEAM, "sharpness"}),
    "enlarged 360": ("sdxl-360", {"upscale": 2}, {*SEAM, "edge_ratio", "sharpness"}),
}


@pytest.mark.parametrize("case", HAS)
def test_a_file_of_any_format_has_the_measures_of_its_mode(
    models: Models, case: str, tmp_path: Path
) -> None:
    mode, inputs, names = HAS[case]
    panorama = models.generate(request(mode, **inputs))
    assert set(panorama.quality) == names
    for suffix in SUFFIXES:
        panorama.save(path := tmp_path / f"out{suffix}")
        assert read_metadata(path)["quality"] == panorama.quality


def test_what_a_png_says_is_what_its_pixels_measure(models: Models, tmp_path: Path) -> None:
    models.generate(request("syncdiffusion", loop_closure=True)).save(tmp_path / "out.png")
    said, seen = read_metadata(tmp_path / "out.png")["quality"], pixels(tmp_path / "out.png")
    windows = disjoint_windows(seen, 64, ring=True)  # 16 cells of 4 pixels
    assert said["seam_ratio"] == pytest.approx(seam_ratio(seen), rel=1e-3)
    assert said["sharpness"] == pytest.approx(sharpness(seen), rel=1e-3)
    perceptual = models.bases["syncdiffusion"].perceptual
    assert said["intra_lpips"] == pytest.approx(intra_lpips(perceptual, windows), rel=1e-3)


def test_windows_of_an_enlarged_image_are_reduced_to_their_own_size(
    models: Models, tmp_path: Path
) -> None:
    wanted = request("syncdiffusion-xl", upscale=2)
    models.generate(wanted).save(tmp_path / "out.png")
    said, seen = read_metadata(tmp_path / "out.png")["quality"], pixels(tmp_path / "out.png")
    base = models.bases["syncdiffusion-xl"]
    windows = disjoint_windows(seen, 2 * base.window * base.factor)
    expected = intra_lpips(base.perceptual, windows, 2)
    assert said["intra_lpips"] == pytest.approx(expected, rel=1e-3)


def test_an_image_of_one_color_has_no_ratios(models: Models) -> None:
    job = models.prepare(request("syncdiffusion", loop_closure=True))
    pipeline = Pipeline(models.bases["syncdiffusion"])
    stage = stages_of(job, pipeline)[-1]
    size = job.request.width, job.request.height
    assert measure(job, pipeline, stage, Image.new("RGB", size)) == {
        "intra_lpips": 0.0,
        "sharpness": 0.0,
    }


def test_a_measure_that_fails_is_left_out_and_the_image_is_the_same(
    models: Models, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = request("syncdiffusion-xl")
    whole = models.generate(wanted)

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(LPIPS, "embed", refuse)
    panorama = models.generate(wanted)
    assert np.array_equal(panorama.image, whole.image)
    assert set(whole.quality) - set(panorama.quality) == {"intra_lpips"}
    (record,) = caplog.records
    assert record.getMessage() == "intra_lpips was not measured: OutOfMemoryError: no memory"


# --- warnings ---


@pytest.fixture(scope="module")
def tiny() -> Models:
    """Return the tiny family."""
    return load("tiny", modes=["syncdiffusion"], device="cpu")


def test_a_seam_shows_where_a_ring_is_cut_and_nowhere_else() -> None:
    """The README's sunset, which closes. Its slopes would often pass for a seam by their ratio."""
    sunset = pixels(ROOT / "docs" / "sunset.png")
    turned = [sunset.roll(-8 * turn, -1) for turn in range(128)]

    def shows(image: Tensor) -> bool:
        found = {"seam_ratio": seam_ratio(image), "seam_contrast": seam_contrast(image)}
        return seam_shows(found)

    assert sum(seam_ratio(image) > 1.5 for image in turned) > 5
    assert not any(map(shows, turned))
    assert all(shows(image[..., :768]) for image in turned)


@pytest.mark.parametrize("wraps", [True, False])
def test_a_ring_that_is_decoded_as_if_it_were_flat_is_told(
    wraps: bool,
    tiny: Models,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same sunset, coded by the networks of the tiny family without a step."""
    if not wraps:
        monkeypatch.setattr("panorama.images.vae.circular", lambda *_, **__: nullcontext())
    inputs = {"image": ROOT / "docs" / "sunset.png", "strength": 0.0, "loop_closure": True}
    panorama = tiny.generate(request("syncdiffusion", prompt="sunset", width=1024, **inputs))
    told = [record.getMessage() for record in caplog.records if record.name == "panorama.modes"]
    assert len(told) == (not wraps)
    for sentence in told:
        assert sentence.startswith(f"seam_ratio={panorama.quality['seam_ratio']:.3g}, above 1.5: ")
        assert sentence.endswith("try an image whose edges meet")


RING = {"loop_closure": True, "width": 512, "height": 256}
UNUSUAL: dict[str, tuple[dict[str, Any], dict[str, float], str]] = {
    "good": (RING, {"seam_ratio": 1.5, "intra_lpips": 0.3}, ""),
    "an edge of the scene": (RING, {"seam_ratio": 3.0, "seam_contrast": 1.5}, ""),
    "a seam": (
        RING,
        {"seam_ratio": 1.51, "seam_contrast": 1.51},
        r"seam_ratio=1.51, above 1.5: .* try another seed$",
    ),
    "incoherent": (
        {},
        {"intra_lpips": 0.31},
        r"intra_lpips=0.31, in this family usually 0.1 to 0.2: .*; try another seed$",
    ),
    "incoherent, not synchronised": (
        {"sync_weight": 3.0},
        {"intra_lpips": 0.31},
        r"another seed, or sync_weight=20$",
    ),
    "parts that differ": ({"prompt": "day | night", "width": 512}, {"intra_lpips": 0.9}, ""),
    "not measured": (RING, {}, ""),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_is_unusual_is_told_with_what_helps(tiny: Models, case: str) -> None:
    inputs, quality, told = UNUSUAL[case]
    resolved = tiny.prepare(request("syncdiffusion", **inputs)).request
    found = unusual(quality, resolved, (0.1, 0.2))
    assert len(found) == bool(told)
    assert all(re.search(told, sentence) for sentence in found)
    assert not [s for s in unusual(quality, resolved, None) if "intra_lpips" in s]


def test_the_usual_range_is_that_of_the_family(
    models: Models, tiny: Models, caplog: pytest.LogCaptureFixture
) -> None:
    low, high = tiny.usual["syncdiffusion"]
    assert 0 < low < high
    assert models.usual == {}
    wanted = request("syncdiffusion")
    distance = models.generate(wanted).quality["intra_lpips"]
    assert caplog.records == []
    ranges = {"syncdiffusion": (0.0, distance / 4), "syncdiffusion-xl": (0.0, 0.0)}
    replace(models, usual=ranges).generate(wanted)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"intra_lpips={distance:.3g}, in this family usually 0 to"
    )


# --- the best of several ---


@pytest.mark.parametrize(
    "ordered",
    [
        [
            {"seam_ratio": 1.5, "seam_contrast": 3.0, "intra_lpips": 0.1},
            {"seam_ratio": 3.0, "seam_contrast": 1.5, "intra_lpips": 0.15},
            {"seam_ratio": 1.4, "seam_contrast": 1.0, "intra_lpips": 0.2},
            {"seam_ratio": 1.5, "seam_contrast": 0.9, "intra_lpips": 0.2},
            {"seam_ratio": 1.0, "seam_contrast": 1.0},
            {"seam_ratio": 1.6, "seam_contrast": 1.6, "intra_lpips": 0.05},
        ],
        [{"intra_lpips": 0.1}, {"intra_lpips": 0.2}, {"sharpness": 3.0}],
    ],
    ids=["rings", "strips"],
)
def test_the_better_image_is_less_bad(ordered: list[dict[str, float]]) -> None:
    for better, worse in pairwise(ordered):
        assert badness(better) < badness(worse)


@pytest.mark.parametrize(
    ("mode", "inputs", "expected"),
    [
        ("syncdiffusion", {"width": 64, "height": 64}, False),
        ("syncdiffusion", {"width": 124, "height": 64}, False),
        ("syncdiffusion", {"width": 64, "height": 128}, True),
        ("syncdiffusion", {"width": 64, "height": 64, "loop_closure": True}, True),
        ("sdxl-360", {"width": 64, "height": 64}, True),
    ],
)
def test_images_can_be_compared_if_they_have_a_seam_or_windows(
    models: Models, mode: str, inputs: dict[str, Any], expected: bool
) -> None:
    wanted = request(mode, **inputs)
    resolved = models.prepare(wanted).request
    assert can_compare(resolved, models.settings(mode)) == expected
    quality = models.generate(wanted).quality
    assert bool({"seam_ratio", "intra_lpips"} & set(quality)) == expected
