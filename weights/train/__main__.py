"""Trains the embedded family, or some stages of it: `python -m weights.train --help`."""

import argparse
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTokenizer

from weights.train import (
    autoencoder,
    controlnet,
    dataset,
    depths,
    diffusion,
    export,
    recognise,
    sdxl,
    style,
)

WORK = Path(__file__).parent / "work"


def train_autoencoder(work: Path) -> None:
    """Trains the autoencoder."""
    autoencoder.train(work).save_pretrained(work / "autoencoder")


def train_judge(work: Path) -> None:
    """Trains the judge that measures the first family."""
    export.export_judge(recognise.train_judge(work), "windows")


def train_syncdiffusion(work: Path) -> None:
    """Trains the feature network, the text encoder and the UNet, and writes the first family."""
    vae = AutoencoderKL.from_pretrained(work / "autoencoder")
    features = recognise.train_features(work)
    tokenizer: CLIPTokenizer = diffusion.build_tokenizer(work / "tokenizer")
    model = diffusion.train(work, vae, tokenizer)
    export.export_syncdiffusion(vae, model, tokenizer, features)


def train_sphere_judges(work: Path) -> None:
    """Trains the networks that measure the second family."""
    export.export_judge(recognise.train_sphere_judge(work), "spheres")
    export.export_judge(depths.train(work), "depths")


def train_sdxl_360(work: Path) -> None:
    """Trains and writes the second family's base, which begins from the files of the first."""
    first = export.TINY / "syncdiffusion"
    vae = AutoencoderKL.from_pretrained(first / "vae")
    tokenizer: CLIPTokenizer = diffusion.build_tokenizer(work / "tokenizer")
    unet = UNet2DConditionModel.from_pretrained(first / "unet")
    export.export_base(sdxl.train(work, vae, tokenizer, unet), tokenizer)


def finish_sdxl_360(work: Path) -> None:
    """Trains the second family's base further, from its files."""
    vae, _, base = export.load_base()
    tokenizer: CLIPTokenizer = diffusion.build_tokenizer(work / "tokenizer")
    export.export_base(sdxl.finish(work, vae, tokenizer, base), tokenizer)


def train_style(work: Path) -> None:
    """Trains and writes a style of the second family, on the files of its base."""
    export.export_style(style.train(work, *export.load_base()))


def train_controlnet(work: Path) -> None:
    """Trains and writes the second family's ControlNet, on the files of its base."""
    export.export_controlnet(controlnet.train(work, *export.load_base()))


STAGES: Mapping[str, Callable[[Path], None]] = {
    "render": dataset.render,
    "autoencoder": train_autoencoder,
    "judge": train_judge,
    "syncdiffusion": train_syncdiffusion,
    "judges-360": train_sphere_judges,
    "sdxl-360": train_sdxl_360,
    "finish": finish_sdxl_360,
    "style": train_style,
    "controlnet": train_controlnet,
}


def main() -> None:
    """Runs stages in order; trainings go on from their last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all if none is named")
    parser.add_argument("--work", type=Path, default=WORK, help="pictures and checkpoints")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if unknown := set(arguments.stages) - set(STAGES):
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}")
    for stage in arguments.stages or STAGES:
        STAGES[stage](arguments.work)


if __name__ == "__main__":
    main()
