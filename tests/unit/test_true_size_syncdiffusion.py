"""Stable Diffusion 2 base with LPIPS on VGG16 at true size, with random weights: load and step.

Activations are the most bytes of tensors alive at once beside the weights, each storage counted
once: those that the gradient keeps, and those in work.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from panorama.sampling.perceptual import LPIPS
from weights.train.diffusion import build_tokenizer

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "data" / "sd2"
HEIGHT, WIDTH = 512, 640  # pixels: two windows, one of which is the anchor
PARAMETERS = {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}
VGG16_CONVOLUTIONS, HEADS = 14_714_688, 1_472
LIBRARIES = 500e6  # bytes; with the small models of `tiny` the peak is 450 MB


def published(name: str) -> dict[str, Any]:
    return json.loads((PUBLISHED / f"{name}.json").read_text())


def save_family(family: Path) -> None:
    """Write the base model in single precision, which a CPU runs, so nothing is converted."""
    folder = family / "sd2"
    mode = "[syncdiffusion]\nwidth = 2048\nheight = 512\nguidance_scale = 7.5\n"
    (family / "family.toml").write_text(mode)
    torch.manual_seed(0)
    networks = {
        "unet": UNet2DConditionModel.from_config(published("unet")),
        "vae": AutoencoderKL.from_config(published("vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**published("text_encoder"))),
    }
    for name, network in networks.items():
        assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
        network.save_pretrained(folder / name)
    perceptual = LPIPS()
    assert sum(p.numel() for p in perceptual.parameters()) == VGG16_CONVOLUTIONS + HEADS
    perceptual.save_pretrained(family / "perceptual")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    DDIMScheduler.from_config(published("scheduler")).save_pretrained(folder / "scheduler")
    publish_names(folder / "text_encoder" / "model.safetensors")


def halve(family: Path) -> None:
    """Turn the files into those of the manifest: half precision, but for LPIPS."""
    for path in (family / "sd2").rglob("*.safetensors"):
        weights = {name: weight.half() for name, weight in load_file(path).items()}
        part = path.with_suffix(".part")
        save_file(weights, part, metadata={"format": "pt"})
        part.replace(path)


def report(title: str, figures: dict[str, Any]) -> None:
    bytes_ = ("files", "weights", "load_peak", "activations", "step_peak")
    gigabytes = {name: round(figures[name] / 1e9, 2) for name in bytes_ if name in figures}
    print(f"\n{title}: plain read {figures['read_seconds']:.1f} s, ", end="")
    print(f"load {figures['load_seconds']:.1f} s, GB: {gigabytes}")


def publish_names(path: Path) -> None:
    """Give the text encoder's weights the names that they were published under."""
    weights = {f"text_model.{name}": weight for name, weight in load_file(path).items()}
    part = path.with_suffix(".part")  # the weights are still mapped from the file
    save_file(weights, part, metadata={"format": "pt"})
    part.replace(path)


def measure(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.measure", *arguments]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_loads_as_fast_as_the_disk_and_steps_in_little_more_memory() -> None:
    with TemporaryDirectory() as folder:  # pytest would keep the 5 GB of a tmp_path
        save_family(Path(folder))
        figures = measure("loading", folder) | measure("steps", folder, str(HEIGHT), str(WIDTH))
    report("single precision", figures)
    print(f"{WIDTH} x {HEIGHT}, a sync step and a plain one: {figures['step_seconds']:.0f} s")
    assert figures["shape"] == [1, 3, HEIGHT, WIDTH] and figures["finite"]
    assert figures["load_seconds"] <= 1.5 * figures["read_seconds"]
    assert figures["load_peak"] <= 1.2 * figures["weights"]
    assert figures["step_peak"] <= 1.2 * figures["weights"] + figures["activations"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_half_precision_as_published_is_converted_with_no_more_than_one_copy_of_each() -> None:
    """A CPU needs single precision: memory holds the mapped files, one copy, and nothing else."""
    with TemporaryDirectory() as folder:
        save_family(Path(folder))
        halve(Path(folder))
        figures = measure("loading", folder)
    report("half precision, converted", figures)
    assert figures["files"] < 0.55 * figures["weights"]
    assert figures["load_peak"] <= figures["files"] + figures["weights"] + LIBRARIES
