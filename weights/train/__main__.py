"""Train the embedded family, or some stages of it: `python -m weights.train --help`."""

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
    tiny_vae,
)

WORK = Path(__file__).parent / "work"


def train_autoencoder(work: Path) -> None:
    """Train the autoencoder."""
    autoencoder.train(work).save_pretrained(work / "autoencoder")


def train_tiny_vae(work: Path) -> None:
    """Distil and write the small decoder that both models share, on the files of the first."""
    vae = AutoencoderKL.from_pretrained(export.TINY / export.SD2 / "vae")
    export.export_tiny_vae(tiny_vae.train(work, vae))


def train_judge(work: Path) -> None:
    """Train the judge that measures the first model."""
    export.export_judge(recognise.train_judge(work), "windows")


def train_sd2(work: Path) -> None:
    """Train the feature network, the text encoder and the UNet, and write the first model."""
    vae = AutoencoderKL.from_pretrained(work / "autoencoder")
    features = recognise.train_features(work)
    tokenizer: CLIPTokenizer = diffusion.build_tokenizer(work / "tokenizer")
    model = diffusion.train(work, vae, tokenizer)
    export.export_sd2(vae, model, tokenizer, features)


def train_sphere_judges(work: Path) -> None:
    """Train the networks that measure the second model."""
    export.export_judge(recognise.train_sphere_judge(work), "spheres")
    export.export_judge(depths.train(work), "depths")


def train_sdxl(work: Path) -> None:
    """Train and write the second model's base, which begins from the files of the first."""
    first = export.TINY / export.SD2
    vae = AutoencoderKL.from_pretrained(first / "vae")
    tokenizer: CLIPTokenizer = diffusion.build_tokenizer(work / "tokenizer")
    unet = UNet2DConditionModel.from_pretrained(first / "unet")
    export.export_base(sdxl.train(work, vae, tokenizer, unet), tokenizer)


def finish_sdxl(work: Path) -> None:
    """Train the second model's base further, from its files."""
    vae, _, base = export.load_base()
    tokenizer: CLIPTokenizer = diffusion.build_tokenizer(work / "tokenizer")
    export.export_base(sdxl.finish(work, vae, tokenizer, base), tokenizer)


def train_style(work: Path) -> None:
    """Train and write a style of the second model, on the files of its base."""
    export.export_style(style.train(work, *export.load_base()))


def train_controlnet(work: Path) -> None:
    """Train and write the second model's ControlNet, on the files of its base."""
    export.export_controlnet(controlnet.train(work, *export.load_base()))


STAGES: Mapping[str, Callable[[Path], None]] = {
    "render": dataset.render,
    "autoencoder": train_autoencoder,
    "judge": train_judge,
    "sd2": train_sd2,
    "tiny-vae": train_tiny_vae,
    "judges-360": train_sphere_judges,
    "sdxl": train_sdxl,
    "finish": finish_sdxl,
    "style": train_style,
    "controlnet": train_controlnet,
}


def main() -> None:
    """Run stages in order; each training resumes from its last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--work", type=Path, default=WORK, help="images and checkpoints")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if unknown := set(arguments.stages) - set(STAGES):
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}")
    for stage in arguments.stages or STAGES:
        STAGES[stage](arguments.work)


if __name__ == "__main__":
    main()
