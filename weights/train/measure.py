"""Measures the embedded family on held-out data: `python -m weights.train.measure`.

Prints what the model card says: the autoencoder's PSNR, the judge's own accuracy, and how often
pictures show what their prompt asked for.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from panorama.models import load
from panorama.syncdiffusion import SyncDiffusionPipeline
from weights.train import autoencoder, dataset, recognise, scenes
from weights.train.__main__ import WORK
from weights.train.export import load_judge

SEEDS = 4  # windows for every pair of time and land
WINDOWS = SEEDS * len(scenes.SKIES) * len(scenes.LANDS)


def agreement(
    pipe: SyncDiffusionPipeline, guidance_scale: float, sheet: Path | None
) -> dict[str, float]:
    """Share of windows in which the judge reads the time, the land and both as prompted."""
    judge = load_judge(recognise.Judge(), "windows")
    hits: dict[str, list[bool]] = {"time": [], "land": [], "both": []}
    tiles = []
    size = pipe.window * pipe.vae_scale_factor
    for time, land in product(scenes.SKIES, scenes.LANDS):
        prompt = f"{scenes.TIME_WORDS[time][0]} over {scenes.LAND_WORDS[land][0]}"
        for seed in range(SEEDS):
            generator = torch.Generator().manual_seed(seed)
            picture = pipe(
                prompt,
                size,
                size,
                guidance_scale=guidance_scale,
                num_inference_steps=30,
                sync_weight=0.0,
                generator=generator,
                output_type="pt",
            ).images
            with torch.no_grad():
                scores = judge(picture * 2 - 1)
            read = {name: recognise.ATTRIBUTES[name][int(scores[name].argmax())] for name in scores}
            hits["time"].append(read["time"] == time)
            hits["land"].append(read["land"] == land)
            hits["both"].append(hits["time"][-1] and hits["land"][-1])
            tiles.append(np.asarray(pipe.image_processor.pt_to_numpy(picture)[0] * 255, np.uint8))
    if sheet:
        rows = [np.concatenate(tiles[i : i + 24], 1) for i in range(0, len(tiles), 24)]
        Image.fromarray(np.concatenate(rows, 0)).save(sheet)
    return {name: float(np.mean(values)) for name, values in hits.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--sheet", type=Path, help="a PNG of every window that was judged")
    arguments = parser.parse_args()
    for kind in dataset.KINDS:
        dataset.render_set(arguments.work, kind, "test", workers=2)
    models = load("tiny")
    pipe = models.pipelines["syncdiffusion"]
    for kind in dataset.KINDS:
        held_out = dataset.load(arguments.work, kind, "test")
        print(f"autoencoder PSNR, {kind}: {autoencoder.psnr(pipe.vae, held_out.rgb):.2f} dB")
    judge = load_judge(recognise.Judge(), "windows")
    held_out = dataset.load(arguments.work, "strips", "test")
    for name, share in recognise.accuracy(judge, held_out).items():
        print(f"judge on held-out renders, {name}: {share:.1%}")
    scale = models.settings("syncdiffusion").guidance_scale
    for name, share in agreement(pipe, scale, arguments.sheet).items():
        print(f"prompt agreement over {WINDOWS} windows, {name}: {share:.1%}")


if __name__ == "__main__":
    main()
