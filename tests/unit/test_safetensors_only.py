"""No loader falls back to a pickle, which would run what is in it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from panorama.modes import load

TINY = Path(__file__).parents[2] / "weights" / "tiny"
PARTS = {
    "syncdiffusion": ("sd2/unet", "sd2/vae", "sd2/text_encoder", "perceptual"),
    "sdxl-360": ("sdxl/unet", "sdxl/vae", "sdxl/controlnet", "sdxl/text_encoder_2"),
}
PICKLES = {"model": "pytorch_model.bin", "diffusion_pytorch_model": "diffusion_pytorch_model.bin"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("family") / "family"))
    (family / "SHA256SUMS").unlink()  # it would refuse other files first
    return family


@pytest.mark.parametrize(
    ("mode", "part"), [(mode, part) for mode, parts in PARTS.items() for part in parts]
)
def test_weights_that_are_a_pickle_are_not_read(family: Path, mode: str, part: str) -> None:
    (weights,) = (family / part).glob("*.safetensors")
    pickle, aside = weights.with_name(PICKLES[weights.stem]), weights.with_suffix(".aside")
    torch.save(load_file(weights), pickle)
    weights.rename(aside)
    try:
        with pytest.raises(OSError, match=r"safetensors"):
            load(str(family), modes=[mode], device="cpu")
    finally:
        aside.rename(weights)
        pickle.unlink()
