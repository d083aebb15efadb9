"""No loader falls back to a pickle, which would run what is in it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from panorama.models import load
from tests.small_sdxl import save_family

TINY = Path(__file__).parents[2] / "weights" / "tiny"
PARTS = {
    "syncdiffusion": ("unet", "vae", "perceptual", "text_encoder"),
    "sdxl-360": ("unet", "vae", "controlnet", "text_encoder_2"),
}
PICKLES = {"model": "pytorch_model.bin", "diffusion_pytorch_model": "diffusion_pytorch_model.bin"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    save_family(folder, width=128, height=64, guidance_scale=3.0)
    shutil.copytree(TINY / "syncdiffusion", folder / "syncdiffusion")
    with (folder / "family.toml").open("a") as file:
        file.write("\n[syncdiffusion]\nwidth = 512\nheight = 256\nguidance_scale = 3.0\n")
    return folder


@pytest.mark.parametrize(
    ("mode", "part"), [(mode, part) for mode, parts in PARTS.items() for part in parts]
)
def test_weights_that_are_a_pickle_are_not_read(family: Path, mode: str, part: str) -> None:
    (weights,) = (family / mode / part).glob("*.safetensors")
    pickle, aside = weights.with_name(PICKLES[weights.stem]), weights.with_suffix(".aside")
    torch.save(load_file(weights), pickle)
    weights.rename(aside)
    try:
        with pytest.raises(OSError, match=r"safetensors"):
            load(str(family), modes=[mode], device="cpu")
    finally:
        aside.rename(weights)
        pickle.unlink()
