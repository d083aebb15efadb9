"""The cost of a request is what its evaluations turn out to be, and bounded before any work."""

import re
import shlex
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from math import ceil, inf
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn

from benchmarks.lab import published
from benchmarks.operations import Networks
from panorama import weights
from panorama.__main__ import parse_inputs
from panorama.base_model import BaseModel
from panorama.cost import LEAST_BOUND, MAX_COST
from panorama.jobs import MODES, stages_of
from panorama.modes import Models, load
from panorama.pipeline import Pipeline
from panorama.request import Request
from panorama.sampling.operations import Prices, Work, count_operations, count_prices
from panorama.sampling.views import Sliding
from tests import small_sd2

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 64, 256  # pixels: one by four windows of the small SD 2
DEFAULTS = {"width": WIDTH, "height": 2 * HEIGHT, "guidance_scale": 3.0}  # legal for SDXL too
WORST = {
    **{"prompt": "sea", "width": 16384, "height": 16384},
    **{"stride": 8, "num_inference_steps": 200, "sync_threshold": 200},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    family = small_sd2.save_family(tmp_path_factory.mktemp("family"), **DEFAULTS)
    return load(family, device="cpu")


@contextmanager
def counted(base: BaseModel) -> Iterator[Counter[Any]]:
    """Count the windows that pass through UNet and decoder, by network and gradient."""
    calls: Counter[Any] = Counter()
    hooks = []
    for name, network in (("unet", base.unet), ("decoder", base.vae.decoder)):

        def note(_: nn.Module, args: Any, name: str = name) -> None:
            calls[name, args[0].requires_grad] += len(args[0])

        hooks.append(network.register_forward_pre_hook(note))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


INPUTS: dict[str, dict[str, Any]] = {
    "exact": {"sync_threshold": 2},
    "fast": {"speed": "fast"},
    "no synchronising": {"sync_weight": 0.0},
    "every second step": {"sync_freq": 2, "sync_threshold": 4},
    "ring": {"loop_closure": True, "sync_threshold": 1, "stride": 8},
    "two rows": {"height": 2 * HEIGHT, "sync_threshold": 1},
    "parts": {"prompt": "sea | hills | desert", "sync_threshold": 2},
    "one window": {"width": HEIGHT},
    "without guidance": {"guidance_scale": 1.0, "sync_threshold": 1},
    "euler": {"scheduler": "euler", "sync_weight": 0.0},
    "sdxl": {"mode": "syncdiffusion-xl", "width": 512, "height": 128},
    "sdxl, exact": {"mode": "syncdiffusion-xl", "speed": "exact", "width": 512, "height": 128},
    "sdxl-360": {"mode": "sdxl-360"},
    "sdxl-360, wide": {"mode": "sdxl-360", "width": 512, "height": 256},
}


@pytest.mark.parametrize("name", INPUTS)
def test_the_cost_is_that_of_the_evaluations_of_a_run(models: Models, name: str) -> None:
    small = {"height": HEIGHT, "num_inference_steps": 4, "seed": 1}
    inputs = {"prompt": "sea", **small, **INPUTS[name]}
    job = models.prepare(Request(**inputs))
    base, request = models.bases[job.request.mode], job.request
    with counted(base) as calls:
        models.run(job)
    guided = request.guidance_scale != 1
    halves = 2 if guided else 1
    work = Work(
        windows=calls["unet", False] // halves,
        gradients=calls["unet", True] // halves,
        anchors=calls["decoder", False] - 1,  # the image itself
    )
    assert work.gradients == calls["decoder", True]
    spans = request.mode == "sdxl-360"
    area = request.width * request.height / (base.window * base.factor) ** 2 if spans else 1
    assert job.cost == base.prices.cost(work, area, guided=guided) > 0
    assert bool(work.gradients) == ("sync_threshold" in inputs or name == "sdxl, exact")


@pytest.mark.parametrize(
    "inputs",
    [
        {"upscale": 2},
        {"upscale": 4, "strength": 0.5},
        {"fix_poles": True},
        {"upscale": 2, "fix_poles": True},
        {"mode": "syncdiffusion-xl", "sync_weight": 0.0, "upscale": 2},
    ],
)
def test_the_cost_of_all_stages_is_that_of_the_evaluations_of_a_run(
    models: Models, inputs: dict[str, Any]
) -> None:
    request = Request(
        **{"prompt": "sea", "mode": "sdxl-360", "width": 256, "height": 128} | inputs,
        num_inference_steps=4,
        seed=1,
    )
    job, base = models.prepare(request), models.bases[request.mode]
    views: list[int] = []  # areas in cells of all windows that pass, guided

    def note(_: nn.Module, args: Any) -> None:
        views.extend([args[0].shape[-2] * args[0].shape[-1]] * (len(args[0]) // 2))

    hook = base.unet.register_forward_pre_hook(note)
    try:
        models.run(job)
    finally:
        hook.remove()
    areas = [area / base.window**2 for area in views]
    assert job.cost == pytest.approx(sum(base.prices.cost(Work(1, 0, 0), area) for area in areas))


def test_4096_x_2048_costs_at_most_14_images_of_sdxl() -> None:
    """In evaluations of the UNet for 1024 x 1024, 30 steps, at the sizes of `full`."""
    with torch.device("meta"):
        networks = [
            kind.from_config(published(f"sdxl/{name}"))
            for kind, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
        ]
    base = BaseModel(*networks, (), EulerDiscreteScheduler())
    models = Models("full", torch.device("cpu"), {"sdxl-360": base}, weights.describe("full"))
    request = Request(prompt="sea", mode="sdxl-360", num_inference_steps=30, upscale=4)
    plain = models.prepare(request)
    last = stages_of(plain, Pipeline(base))[-1].settings
    assert (last.width, last.height) == (4096, 2048)
    assert 250 < plain.cost < models.prepare(replace(request, fix_poles=True)).cost <= 14 * 30


def test_prices_are_the_operations_of_stable_diffusion_2() -> None:
    networks = Networks()
    found = count_prices(networks.unet, networks.vae, networks.lpips)

    def price(*names: str, gradient: bool) -> float:
        """By the count that is held against docs/speed.md."""
        sides = {"VGG16": 512}
        calls = [(name, sides.get(name, 64), gradient) for name in names]
        return sum(map(networks.cost, calls)) / networks.cost(("guided UNet", 64, False))

    assert found.preview == pytest.approx(price("decoder", "VGG16", gradient=False))
    moved = price("guided UNet", "decoder", "VGG16", gradient=True)
    assert found.cost(Work(0, 1, 0)) == pytest.approx(moved, rel=0.05)
    assert found.cost(Work(0, 0, 1)) == found.preview


def test_a_larger_view_costs_its_area_and_its_attention() -> None:
    networks = Networks()
    prices = count_prices(networks.unet, networks.vae)
    with torch.device("meta"):
        one, six = (
            count_operations(networks.unet, networks.guided, torch.empty(1, 4, *size))
            for size in ((64, 64), (128, 192))
        )
    assert prices.attention > 0.05
    assert prices.cost(Work(1, 0, 0), 6) == pytest.approx(six / one, rel=0.01)
    assert Prices(0, 0.1).cost(Work(10, 0, 0), 2) == pytest.approx(22)
    assert Prices(0, 0.1).cost(Work(10, 0, 0), 2, guided=False) == pytest.approx(11)


def test_windows_are_counted_without_being_made(models: Models) -> None:
    models.bases["syncdiffusion"].prices  # noqa: B018  counted once
    started = time.process_time()
    with pytest.raises(ValueError, match="must cost at most"):
        replace(models, max_cost=MAX_COST["cuda"]).prepare(Request(**WORST))
    assert time.process_time() - started < 1


@pytest.mark.parametrize("bound", [LEAST_BOUND, *MAX_COST.values()])
@pytest.mark.parametrize(
    "inputs",
    [
        WORST,
        WORST | {"sync_weight": 0.0},
        WORST | {"loop_closure": True, "width": 8192},
        WORST | {"height": 64, "stride": 12, "loop_closure": True},
        WORST | {"mode": "syncdiffusion-xl", "speed": "exact", "prompt": " | ".join(["sea"] * 128)},
        {"prompt": "sea", "height": 16384, "num_inference_steps": 200},
        {"prompt": "sea", "width": 16384, "height": 16384, "speed": "fast"},
        {"prompt": "s", "mode": "sdxl-360", "width": 4096, "height": 1024},
        *(
            {**{"prompt": "s", "mode": "sdxl-360", "num_inference_steps": 200}, "upscale": factor}
            for factor in (2, 8)
        ),
    ],
)
def test_the_change_that_an_error_suggests_fits(
    models: Models, inputs: dict[str, Any], bound: int
) -> None:
    bounded, unbounded = (replace(models, max_cost=limit) for limit in (bound, inf))
    request = Request(**inputs)
    job = unbounded.prepare(request)
    cost = job.cost
    if cost <= bound:
        assert bounded.prepare(request).cost == cost
        return
    with pytest.raises(ValueError) as error:
        bounded.prepare(request)
    message = str(error.value)
    found = re.fullmatch(
        rf"(.*): must cost at most {bound} guided evaluations of the UNet, not (\d+); try (.*)",
        message,
    )
    assert found and int(found[2]) == ceil(cost)
    advice = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", found[3])}
    assert found[1] == ", ".join(f"{name}={getattr(job.request, name)}" for name in advice)
    assert bounded.prepare(replace(request, **advice)).cost <= bound


def test_a_family_has_the_bound_of_its_device_or_the_one_that_is_given(models: Models) -> None:
    assert models.max_cost == MAX_COST["cpu"]
    assert load(models.family, modes=["sdxl-360"], max_cost=5000).max_cost == 5000
    with pytest.raises(ValueError, match=r"^max_cost=999: must be at least 1000; try 1000$"):
        load(models.family, modes=["sdxl-360"], max_cost=LEAST_BOUND - 1)


def documented_commands() -> list[list[str]]:
    pages = [ROOT / "README.md", ROOT / "docs" / "inputs.md", ROOT / "docs" / "command-line.md"]
    text = "\n".join(page.read_text() for page in pages)
    lines = re.findall(r"^script/predict (\".*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_the_examples_of_the_documentation_are_within_the_bound_of_a_cpu() -> None:
    models = load("tiny", device="cpu")
    assert len(documented_commands()) > 12
    for prompt, *words in documented_commands():
        inputs = [word for flag, word in pairwise(words) if flag == "-i"]
        given = parse_inputs(inputs, [prompt])
        given |= {name: ROOT / value for name, value in given.items() if isinstance(value, Path)}
        assert 0 < models.prepare(Request(**given)).cost < 3000
    for mode in MODES:
        assert models.prepare(Request(prompt="sea", mode=mode, width=2048)).cost < 20_000


def test_views_are_made_when_they_are_asked_for() -> None:
    from panorama.sampling.canvas import Canvas

    *_, last = Sliding(8)(Canvas(16, 40), 16, 3)
    views = list(last)
    assert len(last) == len(views) > 2
    assert (last[-1], last[1:3]) == (views[-1], tuple(views[1:3]))
    with pytest.raises(IndexError):
        last[len(views)]
