"""Coherence and seams on the embedded family, over many seeds, as a table for each mode.

syncdiffusion, syncdiffusion-xl: for every sync_weight, rings of five windows' width are made from a
prompt that leaves the palette open. Coherence is the mean perceptual distance of all pairs of
non-overlapping windows, by a network that has no part in making images. The seam ratio is the mean
step between the last and the first column over the mean step between neighbouring columns: 1 means
no seam.

sdxl-360: the seam ratio and the Discontinuity Score with circular padding and, from the same noise,
without it; where there is a LoRA, at the strength that requests have by default, and at 0.
"""

import argparse
from collections.abc import Callable, Mapping
from itertools import combinations, product
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from panorama.modes import DEFAULT_FAMILY, load
from panorama.request import Request
from panorama.sampling.canvas import Axis
from weights.train.export import load_judge
from weights.train.measure import lora_scales, make_image
from weights.train.recognise import Judge

WINDOWS = 5
PROMPTS = {
    "syncdiffusion": "autumn hills with trees",
    "syncdiffusion-xl": "autumn hills with trees",
    "sdxl-360": "hdri view, sunset over green hills",
}
PADDINGS: Mapping[str, Axis] = {"circular": "x", "zeros": ""}
GREY = (0.299, 0.587, 0.114)
SCHARR = ((-3.0, 0.0, 3.0), (-10.0, 0.0, 10.0), (-3.0, 0.0, 3.0))


def coherence(judge: Judge, image: Tensor, window: int) -> float:
    """Return the mean distance of pairs of non-overlapping windows of an image.

    Args:
        judge: measures distances.
        image: (1, 3, H, W) in [0, 1].
        window: width, pixels.
    """
    windows = torch.cat(image.split(window, dim=-1)) * 2 - 1
    first, second = zip(*combinations(range(len(windows)), 2), strict=True)
    with torch.no_grad():
        return float(judge.distance(windows[list(first)], windows[list(second)]).mean())


def seam_ratio(image: Tensor) -> float:
    """Return the step across the seam of (1, 3, H, W) over the mean step between columns."""
    steps = image.diff(dim=-1).abs().mean()
    seam = (image[..., 0] - image[..., -1]).abs().mean()
    return float(seam / steps)


def discontinuity_score(image: Tensor, floor: float = 0.1) -> float:
    """Return the Discontinuity Score of (1, 3, H, W) in [0, 1], which is 0 for one colour.

    Three columns on either side of the seam are put together and convolved across it. Of the four
    columns that result, the middle two see the seam and the outer two do not: the score is the mean
    ratio of the former to the latter, about 1 for a busy image without a seam.

    Args:
        image: converted to grey first.
        floor: added to the denominators.

    Source:
        Geometry Fidelity for Spherical Images, arXiv 2407.18207, of which no code is published;
        kernel and floor are those of the evaluation in the repository
        littlewhitesea/Text-Driven-Pano-Gen.
    """
    grey = torch.einsum("nchw,c->nhw", image, torch.tensor(GREY))[:, None]
    seam = torch.cat([grey[..., -3:], grey[..., :3]], -1)  # (1, 1, H, 6)
    edges = F.conv2d(seam, torch.tensor(SCHARR)[None, None], padding=(1, 0)).abs()  # (1, 1, H, 4)
    outer_left, left, right, outer_right = edges.unbind(-1)
    ratios = left / (outer_left + floor) + right / (outer_right + floor)
    return float(ratios.mean() / 2)


def table_windows(arguments: argparse.Namespace) -> None:
    """Print coherence and seam of a mode with windows, for every sync_weight."""
    models = load(arguments.family, modes=[arguments.mode])
    base = models.bases[arguments.mode]
    if arguments.distance_scale is not None:
        base.perceptual.register_to_config(distance_scale=arguments.distance_scale)
    window = base.window * base.factor
    judge = load_judge(Judge(), "windows")
    print(f"{arguments.prompt!r}, {WINDOWS * window} x {window}, {arguments.seeds} seeds")
    print("sync_weight  distance (sd)      change  seam ratio (sd)", flush=True)
    reference = None
    for weight in arguments.weights:
        distances, seams = [], []
        for seed in range(arguments.seeds):
            request = Request(
                prompt=arguments.prompt,
                mode=arguments.mode,
                width=WINDOWS * window,
                height=window,
                num_inference_steps=arguments.steps,
                speed=arguments.speed,
                sync_weight=weight,
                loop_closure=True,
                seed=seed,
            )
            image = make_image(models, request)
            distances.append(coherence(judge, image, window))
            seams.append(seam_ratio(image))
            if arguments.keep:
                keep(image, arguments.keep / f"{weight:g}-{seed:02d}.png")
        reference = reference or mean(distances)
        change = mean(distances) / reference - 1
        print(
            f"{weight:11g}  {mean(distances):.4f} ({stdev(distances):.4f})  {change:+6.1%}"
            f"  {mean(seams):.3f} ({stdev(seams):.3f})",
            flush=True,
        )


def table_sdxl_360(arguments: argparse.Namespace) -> None:
    """Print the seam with and without circular padding, with the LoRA as in use and without it."""
    models = load(arguments.family, modes=["sdxl-360"])
    settings = models.settings("sdxl-360")
    print(f"{arguments.prompt!r}, {settings.width} x {settings.height}, {arguments.seeds} seeds")
    print("lora_scale  padding   seam ratio (sd)  discontinuity score (sd)", flush=True)
    for scale, (name, closed) in product(lora_scales(settings), PADDINGS.items()):
        seams, scores = [], []
        for seed in range(arguments.seeds):
            request = Request(
                prompt=arguments.prompt,
                mode="sdxl-360",
                lora_scale=scale,
                num_inference_steps=arguments.steps,
                seed=seed,
            )
            image = make_image(models, request, closed=closed)
            seams.append(seam_ratio(image))
            scores.append(discontinuity_score(image))
            if arguments.keep:
                keep(image, arguments.keep / f"{name}-{scale:g}-{seed:02d}.png")
        print(
            f"{scale:10g}  {name:8}  {mean(seams):6.3f} ({stdev(seams):.3f})"
            f"   {mean(scores):.3f} ({stdev(scores):.3f})",
            flush=True,
        )


def keep(image: Tensor, path: Path) -> None:
    """Write an image (1, 3, H, W) in [0, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = image[0].permute(1, 2, 0).mul(255).round().byte().numpy()
    Image.fromarray(pixels).save(path)


TABLES: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "syncdiffusion": table_windows,
    "syncdiffusion-xl": table_windows,
    "sdxl-360": table_sdxl_360,
}


def main() -> None:
    """Make the images and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=TABLES, default="syncdiffusion")
    parser.add_argument("--family", default=DEFAULT_FAMILY)
    parser.add_argument("--prompt", help="defaults to the mode's own")
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--steps", type=int, help="defaults to the mode's own")
    parser.add_argument("--keep", type=Path, help="a folder for the images")
    windows = parser.add_argument_group("modes with windows")
    windows.add_argument("--weights", type=float, nargs="+", default=[0.0, 20.0])
    windows.add_argument("--speed", help="exact or fast; defaults to the mode's own")
    windows.add_argument("--distance-scale", type=float, help="another scale of the distance")
    arguments = parser.parse_args()
    arguments.prompt = arguments.prompt or PROMPTS[arguments.mode]
    TABLES[arguments.mode](arguments)


if __name__ == "__main__":
    main()
