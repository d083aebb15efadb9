"""Coherence and seams on the embedded family, over many seeds, as a table for each mode.

syncdiffusion: for every sync_weight, rings of five windows' width are made from a prompt that
leaves the palette open. Coherence is the mean perceptual distance of all pairs of non-overlapping
windows, by a network that has no part in making pictures. The seam ratio is the mean step between
the last and the first column over the mean step between neighbouring columns: 1 means no seam.

sdxl-360: the seam ratio and the Discontinuity Score with circular padding and, from the same
noise, without it; where there is a LoRA, at the strength that requests have by default, and at 0.
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

from panorama.models import DEFAULT_FAMILY, load
from panorama.request import Request
from panorama.sdxl import SDXL360, lora_applied
from weights.train.export import load_judge
from weights.train.measure import lora_scales
from weights.train.recognise import Judge

WINDOWS = 5
PROMPTS = {
    "syncdiffusion": "autumn hills with trees",
    "sdxl-360": "hdri view, sunset over green hills",
}
GREY = (0.299, 0.587, 0.114)
SCHARR = ((-3.0, 0.0, 3.0), (-10.0, 0.0, 10.0), (-3.0, 0.0, 3.0))


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


def discontinuity_score(picture: Tensor, floor: float = 0.1) -> float:
    """The Discontinuity Score of (1, 3, H, W) in [0, 1]: smaller is better, 0 for one colour.

    Three columns on either side of the seam are put together and convolved across it. Of the four
    columns that come out, the middle two see the seam and the outer two don't: the score is the
    mean ratio of the former to the latter, and about 1 for a busy picture without a seam.

    Args:
        picture: grey is made of it.
        floor: added to what is divided by.

    Source:
        Geometry Fidelity for Spherical Images, arXiv 2407.18207, of which no code is published;
        kernel and floor are those of the evaluation in the repository
        littlewhitesea/Text-Driven-Pano-Gen.
    """
    grey = torch.einsum("nchw,c->nhw", picture, torch.tensor(GREY))[:, None]
    seam = torch.cat([grey[..., -3:], grey[..., :3]], -1)  # (1, 1, H, 6)
    edges = F.conv2d(seam, torch.tensor(SCHARR)[None, None], padding=(1, 0)).abs()  # (1, 1, H, 4)
    outer_left, left, right, outer_right = edges.unbind(-1)
    ratios = left / (outer_left + floor) + right / (outer_right + floor)
    return float(ratios.mean() / 2)


def table_syncdiffusion(arguments: argparse.Namespace) -> None:
    """Prints coherence and seam for every sync_weight."""
    models = load(arguments.family, modes=["syncdiffusion"])
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
                keep(picture, arguments.keep / f"{weight:g}-{seed:02d}.png")
        reference = reference or mean(distances)
        change = mean(distances) / reference - 1
        print(
            f"{weight:11g}  {mean(distances):.4f} ({stdev(distances):.4f})  {change:+6.1%}"
            f"  {mean(seams):.3f} ({stdev(seams):.3f})",
            flush=True,
        )


def patched(pipe: SDXL360, prompt: str, lora_scale: float, **options: object) -> Tensor:
    """The picture (1, 3, H, W) of the mode, its convolutions wrapping."""
    picture: Tensor = pipe(prompt, lora_scale=lora_scale, output_type="pt", **options)
    return picture


@torch.no_grad()
def unpatched(pipe: SDXL360, prompt: str, lora_scale: float, **options: object) -> Tensor:
    """The picture (1, 3, H, W) of the stock pipeline that the mode runs, nothing wrapping."""
    with lora_applied(pipe.text.unet, lora_scale):
        picture: Tensor = pipe.text(prompt, output_type="pt", **options).images
    return picture


PADDINGS = {"circular": patched, "zeros": unpatched}


def table_sdxl_360(arguments: argparse.Namespace) -> None:
    """Prints the seam with and without circular padding, with the LoRA as in use and without it."""
    models = load(arguments.family, modes=["sdxl-360"], device="cpu")  # where the latents are
    pipe, settings = models.pipelines["sdxl-360"], models.settings("sdxl-360")
    factor = pipe.text.vae_scale_factor
    channels = pipe.text.unet.config.in_channels
    shape = (1, channels, settings.height // factor, settings.width // factor)
    print(f"{arguments.prompt!r}, {settings.width} x {settings.height}, {arguments.seeds} seeds")
    print("lora_scale  padding   seam ratio (sd)  discontinuity score (sd)", flush=True)
    for scale, (name, make) in product(lora_scales(settings), PADDINGS.items()):
        request = Request(prompt=arguments.prompt, mode="sdxl-360", lora_scale=scale)
        prompt = request.resolve(settings).full_prompt
        seams, scores = [], []
        for seed in range(arguments.seeds):
            picture = make(
                pipe,
                prompt,
                scale,
                height=settings.height,
                width=settings.width,
                num_inference_steps=arguments.steps,
                guidance_scale=settings.guidance_scale,
                latents=torch.randn(shape, generator=torch.Generator().manual_seed(seed)),
            )
            seams.append(seam_ratio(picture))
            scores.append(discontinuity_score(picture))
            if arguments.keep:
                keep(picture, arguments.keep / f"{name}-{scale:g}-{seed:02d}.png")
        print(
            f"{scale:10g}  {name:8}  {mean(seams):6.3f} ({stdev(seams):.3f})"
            f"   {mean(scores):.3f} ({stdev(scores):.3f})",
            flush=True,
        )


def keep(picture: Tensor, path: Path) -> None:
    """Writes a picture (1, 3, H, W) in [0, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = picture[0].permute(1, 2, 0).mul(255).round().byte().numpy()
    Image.fromarray(pixels).save(path)


TABLES: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "syncdiffusion": table_syncdiffusion,
    "sdxl-360": table_sdxl_360,
}


def main() -> None:
    """Makes the pictures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=TABLES, default="syncdiffusion")
    parser.add_argument("--family", default=DEFAULT_FAMILY)
    parser.add_argument("--prompt", help="if left out, the mode's own")
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--keep", type=Path, help="a folder for the pictures")
    only = parser.add_argument_group("syncdiffusion only")
    only.add_argument("--weights", type=float, nargs="+", default=[0.0, 20.0])
    only.add_argument("--distance-scale", type=float, help="tries another scale of the distance")
    arguments = parser.parse_args()
    arguments.prompt = arguments.prompt or PROMPTS[arguments.mode]
    TABLES[arguments.mode](arguments)


if __name__ == "__main__":
    main()
