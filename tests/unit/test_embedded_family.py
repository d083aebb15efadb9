"""The family in `weights/tiny/` is small, complete, and takes any text."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from panorama.images.vae import decode
from panorama.jobs import MODES
from panorama.modes import Models, load
from panorama.pipeline import Pipeline, Settings
from panorama.request import INPUTS, Request
from panorama.sampling.canvas import View
from panorama.sampling.denoiser import UNetDenoiser
from panorama.sampling.gradient import frozen
from panorama.sampling.operations import count_operations
from panorama.sampling.solver import Solver
from panorama.sampling.synchronize import PerceptualGradient
from panorama.sampling.views import Spanning
from weights.train.dataset import draw_one
from weights.train.diffusion import build_tokenizer
from weights.train.views import to_tensor

TINY = Path(__file__).parents[2] / "weights" / "tiny"
MEGABYTES = 45  # 20 for the first mode, 25 for the second


@pytest.fixture(scope="module")
def models() -> Models:
    return load("tiny")


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TINY / "sd2" / "tokenizer")


def test_it_is_small() -> None:
    size = sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file())
    assert size <= MEGABYTES * 1e6


def test_its_weights_are_half_precision_safetensors() -> None:
    binaries = [path for path in TINY.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    assert not binaries
    for path in TINY.rglob("*.safetensors"):
        header = path.read_bytes()[: 1 << 20]
        assert b'"F16"' in header and b'"F32"' not in header, path


def test_it_does_not_tell_where_it_was_trained() -> None:
    configs = [json.loads(path.read_text()) for path in TINY.rglob("config.json")]
    assert configs and not any(config.get("_name_or_path") for config in configs)


def test_its_modes_are_those_of_requests(models: Models) -> None:
    assert set(models.bases) == set(MODES) == set(INPUTS["mode"].choices)
    for mode in models.bases:
        models.prepare(Request(prompt="night", mode=mode))


@pytest.mark.parametrize("lora_scale", [0.0, 0.8])
@pytest.mark.parametrize("follows", [False, True], ids=["text", "depth"])
def test_rolling_the_noise_and_the_depth_rolls_a_360_image(
    models: Models, follows: bool, lora_scale: float
) -> None:
    pipe, cells = Pipeline(models.bases["sdxl-360"]), 4
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, 16, 32, generator=generator)
    depth = torch.rand(128, 256, generator=generator)

    def make(turn: int) -> torch.Tensor:
        settings = Settings(
            "<s0><s1> hdri view, bedroom in the color of blue",
            *depth.shape,
            closed="x",
            num_inference_steps=2,
            guidance_scale=4.0,
            layout=Spanning(),
            depth=depth.roll(turn * 8, -1) if follows else None,
            lora_scale=lora_scale,
        )
        latents = pipe.denoise(settings, pipe.encode(settings), noise.roll(turn, -1))
        return pipe.decode(settings, latents)

    assert (make(cells) - make(0).roll(cells * 8, -1)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["outdoors", "rooms"])
def test_its_tiny_vae_shows_what_its_vae_does(models: Models, kind: str) -> None:
    base = models.bases["sdxl-360"]
    image, _, _ = draw_one(kind, "test", 0)
    with torch.no_grad():
        latents = base.vae.encode(to_tensor(image[None])).latent_dist.mean
        latents = latents * base.vae.config.scaling_factor
        full, tiny = (decode(vae, latents).clamp(-1, 1) for vae in (base.vae, base.tiny_vae))
    assert full.shape == tiny.shape == (1, 3, *image.shape[:2])
    assert 10 * torch.log10(4 / (full - tiny).square().mean()) > 22  # dB


def test_its_tiny_vae_takes_a_tenth_of_the_operations(models: Models) -> None:
    base = models.bases["syncdiffusion"]

    def operations(vae: Any) -> int:
        return count_operations(
            vae, lambda x: decode(vae, x), torch.zeros(1, 4, 32, 32), gradient=True
        )

    assert 10 * operations(base.tiny_vae) < operations(base.vae)


def test_its_tiny_vae_gives_about_the_gradient_of_its_vae(models: Models) -> None:
    """Compare the median over seeds: where windows are alike already, the gradient is noise."""
    base = models.bases["syncdiffusion"]
    pipe, plan = Pipeline(base), Settings("sunset over the sea", 256, 512, guidance_scale=3.0)
    canvas, solver = pipe.canvas(plan), Solver(base.scheduler, 50)
    denoise = UNetDenoiser(base.unet, pipe.encode(plan), canvas, solver, base.factor)
    t, anchor, view = solver.timesteps[0], View(0, 0, 32, 32), View(0, 32, 32, 32)

    def move(vae: Any, noise: torch.Tensor) -> torch.Tensor:
        gradient = PerceptualGradient(denoise, lambda z: decode(vae, z), base.perceptual, solver)
        x_anchor, x = noise.chunk(2, -1)
        with torch.no_grad():
            features = gradient.embed(t, x_anchor, denoise(x_anchor, t, [anchor]))
            return (gradient.move(t, features, torch.ones(1, 1), x, [view]) - x).flatten()

    found = []
    for seed in range(5):
        noise = pipe.noise(plan, torch.Generator().manual_seed(seed))
        with frozen(*base.networks()):
            pair = [move(vae, noise) for vae in (base.vae, base.tiny_vae)]
        found.append(float(torch.cosine_similarity(*pair, 0)))
    assert median(found) > 0.9


def test_a_strip_of_sdxl_windows_is_made_in_every_shape(models: Models) -> None:
    inputs = {"mode": "syncdiffusion-xl", "num_inference_steps": 1, "seed": 1}
    side = models.settings("syncdiffusion-xl").smallest
    for width, height in ((2 * side, side), (side, 2 * side)):
        request = Request(prompt="bedroom", width=width, height=height, loop_closure=True, **inputs)
        panorama = models.generate(request)
        assert panorama.image.size == (width, height)
        assert panorama.closed == ("x" if width > height else "y")


def test_an_unknown_family_or_mode_is_refused_by_name() -> None:
    with pytest.raises(FileNotFoundError, match=r"'huge'.*full, tiny"):
        load("huge")
    with pytest.raises(ValueError, match=r"^mode='flat': .*tiny.*; try"):
        load("tiny", modes=["flat"])


def test_the_recipe_builds_this_vocabulary(tokenizer: CLIPTokenizer) -> None:
    """Or a training that goes on in another process would read other words."""
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


@given(text=st.text(max_size=40))
@settings(deadline=None)
def test_any_text_tokenizes(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text, verbose=False).input_ids
    start, *middle, end = ids
    assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert all(0 <= token < len(tokenizer) for token in middle)
    if text.strip() and text.isprintable():
        assert middle
