"""Coherence and seams on the embedded family, over many seeds, as a table.

For every sync_weight, rings of five windows' width are made from a prompt that leaves the palette
open. Coherence is the mean perceptual distance of all pairs of non-overlapping windows, by a
network that has no part in making pictures. The seam ratio is the mean step between the last and
the first column over the mean step between neighbouring columns: 1 means no seam.
"""

import argparse
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from panorama.models import load
from weights.train.export import load_judge
from weights.train.recognise import Judge

WINDOWS = 5


def coherence(judge: Judge, picture: Tensor, window: int) -> float:
    """Mean pairwise distance of the non-overlapping windows of (1, 3, H, W) in [0, 1]."""
    windows = torch.cat(picture.split(window, dim=-1)) * 2 - 1
    first, second = zip(*combinations(range(len(windows)), 2), strict=True)
    with torch.no_grad():
        return float(judge.distance(windows[list(first)], windows[list(second)]).mean())


def seam_ratio(picture: Tensor) -> float:
    """The step across the seam over the mean step between columns, for (1, 3, H, W)."""
    steps = picture.diff(dim=-1).abs().mean()
    seam = (picture[..., 0] - picture[..., -1]).abs().mean()
    return float(seam / steps)


def main() -> None:
    """Makes the pictures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default="autumn hills with trees")
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 20.0])
    parser.add_argument("--distance-scale", type=float, help="tries another scale of the distance")
    parser.add_argument("--keep", type=Path, help="a folder for the pictures")
    arguments = parser.parse_args()

    models = load("tiny")
    pipe = models.pipelines["syncdiffusion"]
    if arguments.distance_scale is not None:
        pipe.perceptual.register_to_config(distance_scale=arguments.distance_scale)
    window = pipe.window * pipe.vae_scale_factor
    judge = load_judge(Judge(), "windows")
    print(f"{arguments.prompt!r}, {WINDOWS * window} x {window}, {arguments.seeds} seeds")
    print("sync_weight  distance (sd)      change  seam ratio (sd)", flush=True)
    reference = None
    for weight in arguments.weights:
        distances, seams = [], []
        for seed in range(arguments.seeds):
            picture = pipe(
                arguments.prompt,
                window,
                WINDOWS * window,
                num_inference_steps=arguments.steps,
                guidance_scale=models.settings("syncdiffusion").guidance_scale,
                sync_weight=weight,
                loop_closure=True,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
            ).images
            distances.append(coherence(judge, picture, window))
            seams.append(seam_ratio(picture))
            if arguments.keep:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                image = pipe.image_processor.pt_to_numpy(picture)
                name = f"{weight:g}-{seed:02d}.png"
                pipe.image_processor.numpy_to_pil(image)[0].save(arguments.keep / name)
        reference = reference or mean(distances)
        change = mean(distances) / reference - 1
        print(
            f"{weight:11g}  {mean(distances):.4f} ({stdev(distances):.4f})  {change:+6.1%}"
            f"  {mean(seams):.3f} ({stdev(seams):.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
