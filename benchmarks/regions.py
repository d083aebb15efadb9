"""Prompts along a ring: the share of windows that show the time of day that their part names.

Rings of the tiny family are six windows wide and have three parts, two windows each, with other
times of day over one land.
"""

import argparse
from itertools import permutations
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from benchmarks.coherence import keep
from panorama.modes import load
from panorama.request import Request
from weights.train import scenes
from weights.train.export import load_judge
from weights.train.measure import make_image
from weights.train.recognise import Judge, read

PARTS, WINDOWS_PER_PART = 3, 2
ORDERS = tuple(permutations(scenes.SKIES, PARTS))


def draw_parts(seed: int) -> tuple[tuple[str, ...], str]:
    """Return the time of day of each part, and the prompt that names them."""
    times = ORDERS[seed * 17 % len(ORDERS)]
    words = list(scenes.LAND_WORDS.values())
    land = words[seed % len(words)][0]
    return times, " | ".join(f"{scenes.TIME_WORDS[time][0]} over {land}" for time in times)


def regions(judge: Judge, image: Tensor, window: int, times: tuple[str, ...]) -> list[bool]:
    """Return for each window if the time of day of its part is read in it.

    Args:
        judge: reads windows.
        image: (1, 3, H, W) in [0, 1], of as many parts as there are times.
        window: width, pixels; divides the width of a part.
        times: the time of day that each part names.
    """
    windows = torch.cat(image.split(window, -1)) * 2 - 1  # (n, 3, h, w)
    each = len(windows) // len(times)
    seen = read(judge, windows)
    return [found["time"] == times[k // each] for k, found in enumerate(seen)]


def main() -> None:
    """Make the rings and print the share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--speed", default="fast")
    parser.add_argument("--keep", type=Path, help="a folder for the images")
    options = parser.parse_args()
    models = load("tiny", modes=["syncdiffusion"], device="cpu")
    judge, base = load_judge(Judge(), "windows"), models.bases["syncdiffusion"]
    window = base.window * base.factor
    right: list[bool] = []
    for seed in range(options.seeds):
        times, prompt = draw_parts(seed)
        request = Request(
            prompt=prompt,
            width=PARTS * WINDOWS_PER_PART * window,
            height=window,
            loop_closure=True,
            speed=options.speed,
            seed=seed,
        )
        image = make_image(models, request)
        right += regions(judge, image, window, times)
        if options.keep:
            keep(image, options.keep / f"{seed:02d}.png")
    print(f"{len(right)} windows, {mean(right):.1%} as named")


if __name__ == "__main__":
    main()
