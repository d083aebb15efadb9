"""Train the tiny family, or some stages of it: `python -m weights.train --help`."""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel

from panorama.weights.lock import write_lock
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
from weights.train.fit import OutOfTime, Work

WORK = Path(__file__).parent / "work"


def train_decoder(work: Work) -> None:
    """Train the decoder of the autoencoder that the work folder has, and write it there again."""
    folder = work.folder / "autoencoder"
    autoencoder.train_decoder(work, AutoencoderKL.from_pretrained(folder)).save_pretrained(folder)


def train_sd2(work: Work) -> None:
    """Train the feature network, the text encoder and the UNet, and write the first model."""
    vae = AutoencoderKL.from_pretrained(work.folder / "autoencoder")
    features = recognise.train_features(work)
    tokenizer = diffusion.build_tokenizer()
    model = diffusion.train(work, vae, tokenizer)
    export.export_sd2(vae, model, tokenizer, features)


def train_sphere_judges(work: Work) -> None:
    """Train the networks that measure the second model."""
    export.export_judge(recognise.train_sphere_judge(work), "spheres")
    export.export_judge(depths.train(work), "depths")


def train_sdxl(work: Work) -> None:
    """Train and write the second model's base, which begins from the files of the first."""
    unet = UNet2DConditionModel.from_pretrained(export.TINY / export.SD2 / "unet")
    tokenizer = diffusion.build_tokenizer()
    export.export_base(sdxl.train(work, load_vae(), tokenizer, unet), tokenizer)


def load_vae() -> AutoencoderKL:
    """Read the autoencoder from the files of the first model."""
    return AutoencoderKL.from_pretrained(export.TINY / export.SD2 / "vae")


STAGES: Mapping[str, Callable[[Work], None]] = {
    "render": lambda work: dataset.render(work.folder),
    "autoencoder": lambda work: autoencoder.train(work).save_pretrained(
        work.folder / "autoencoder"
    ),
    "decoder": train_decoder,
    "judge": lambda work: export.export_judge(recognise.train_judge(work), "windows"),
    "sd2": train_sd2,
    "tiny-vae": lambda work: export.export_tiny_vae(tiny_vae.train(work, load_vae())),
    "judges-360": train_sphere_judges,
    "sdxl": train_sdxl,
    "style": lambda work: export.export_style(style.train(work, *export.load_base())),
    "controlnet": lambda work: export.save_components(
        export.TINY / export.SDXL, controlnet=controlnet.train(work, *export.load_base())
    ),
}
"""The stages, in order. Those of the second model begin from the files of the first."""


def main() -> None:
    """Run stages in order; each training resumes from its last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "stages", nargs="*", help=f"of {', '.join(STAGES)}; default: all that are not done"
    )
    parser.add_argument("--work", type=Path, default=WORK, help="images and checkpoints")
    parser.add_argument("--minutes", type=float, default=inf, help="stop after so long, to resume")
    arguments = parser.parse_args()
    work = Work(arguments.work, time.monotonic() + 60 * arguments.minutes)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if unknown := set(arguments.stages) - set(STAGES):
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}")
    try:
        for stage in arguments.stages or STAGES:
            if (done := work.folder / "done" / stage).exists():
                logging.info("%s is done; remove %s to run it again", stage, done)
                continue
            STAGES[stage](work)
            write_lock(export.TINY)
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()
    except OutOfTime as error:
        sys.exit(f"{error}; the same command resumes")


if __name__ == "__main__":
    main()
