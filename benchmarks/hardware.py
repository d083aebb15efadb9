"""Calculate the memory that each mode of `full` takes on a GPU, as the rows of README's table.

Weights are those of the networks in half precision, LPIPS in single. What a step and the decoding
take besides is counted on torch's fake tensors, which have a size and no values: the most bytes of
tensors alive at once. What CUDA and its libraries take for themselves is not counted.

`script/python -m benchmarks.hardware` prints the table; with `--plot docs/memory.svg` it draws the
memory besides the weights against the width instead.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.figures import STYLE, save
from benchmarks.lab import FakeLab
from panorama.pipeline import Settings
from panorama.sampling.presets import EXACT, FAST, WHOLE, Preset

STRIDE = 16  # latent cells
WIDTHS = (1024, 2048, 4096, 8192)  # pixels, of the plot
WEIGHTS = {"sd2": 2.6, "sdxl": 7.5}  # GB, with text encoders and small decoders


@dataclass(frozen=True)
class Row:
    """A mode at one size."""

    mode: str
    base: str
    preset: Preset
    width: int
    height: int
    checkpointing: bool = False  # what is tried where memory runs out


ROWS = (
    Row("syncdiffusion, `speed=fast`", "sd2", FAST, 2048, 512),
    Row("syncdiffusion, checkpointing", "sd2", EXACT, 2048, 512, checkpointing=True),
    Row("syncdiffusion", "sd2", EXACT, 2048, 512),
    Row("sdxl-360", "sdxl", WHOLE, 1024, 512),
    Row("sdxl-360", "sdxl", WHOLE, 2048, 1024),
    Row("syncdiffusion-xl", "sdxl", FAST, 2048, 1024),
)


def working_memory(row: Row) -> int:
    """Return the most bytes that a step or the decoding takes besides the weights."""
    settings = Settings(
        prompt="",
        height=row.height,
        width=row.width,
        closed="x",
        num_inference_steps=2,
        layout=row.preset.layout(STRIDE),
        sync=row.preset.sync(1),
    )
    lab = FakeLab(torch.device("cpu"), dry=False)
    base = lab.sd2 if row.base == "sd2" else lab.sdxl
    run = lab.run(base, settings, checkpointing=row.checkpointing)
    decoding = lab.most(base, lambda: run.pipeline.decode(settings, run.noise))
    return max(lab.most(base, run.denoise), decoding)


def table() -> Iterator[str]:
    """Yield the rows in Markdown."""
    for row in ROWS:
        weights, working = WEIGHTS[row.base], working_memory(row) / 1e9
        yield (
            f"| {row.mode} | {row.width} x {row.height} | {weights} GB | {working:.1f} GB "
            f"| {weights + working:.0f} GB |"
        )


def resized(row: Row, width: int) -> Row:
    """Return a row at another width: a strip of the same height, or a 360 image of 2:1."""
    return replace(row, width=width, height=width // 2 if row.preset is WHOLE else row.height)


def plot(path: Path) -> None:
    """Draw the memory besides the weights against the width."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for row in {row.mode: row for row in ROWS if row.mode != "syncdiffusion-xl"}.values():
            memory = [working_memory(resized(row, width)) / 1e9 for width in WIDTHS]
            shape = "2:1" if row.preset is WHOLE else f"{row.height} pixels high"
            axes.plot(WIDTHS, memory, marker="o", label=f"{row.mode}, {shape}".replace("`", ""))
        axes.set(xscale="log", xlabel="width, pixels", ylabel="GB besides the weights", ylim=0)
        axes.set_xticks(WIDTHS, map(str, WIDTHS))
        axes.minorticks_off()
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        save(figure, path)


def main() -> None:
    """Print the table, or draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, help="an image of memory against width")
    path = parser.parse_args().plot
    if path:
        plot(path)
        return
    for line in table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
