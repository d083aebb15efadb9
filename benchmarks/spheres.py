"""Enlarged spheres and redrawn poles of sdxl-360, beside held-out renders of the same captions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.metrics import (
    at_size_of,
    discontinuity_score,
    equatorial_energy,
    low_pass_psnr,
    polar_energy,
    repetition,
)
from panorama.images.vae import from_pil, resize
from panorama.jobs import stages_of
from panorama.modes import Models
from panorama.pipeline import Pipeline
from panorama.quality import edge_ratio, seam_ratio, sharpness
from panorama.request import Request
from weights.train import dataset, scenes
from weights.train.depths import DepthReader, cells, depth_image, shape_correlation
from weights.train.sdxl import PREFIX

VERSIONS: Mapping[str, Mapping[str, Any]] = {
    "base": {},
    "upscale 2": {"upscale": 2},
    "upscale 4": {"upscale": 4},
    "poles": {"fix_poles": True},
    "upscale 4, poles": {"upscale": 4, "fix_poles": True},
}
"""The inputs that are measured, by the name of their column."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A held-out landscape: its caption, and images (1, 3, H, W) in [0, 1]."""

    prompt: str
    render: Tensor  # twice as high and as wide as the base
    depth: Tensor  # (H, W) in [0, 1], as high and as wide as the base
    images: dict[str, Tensor] = field(default_factory=dict)  # by version

    @property
    def base(self) -> Tensor:
        """The image without changes."""
        return self.images["base"]


def held_out(images: dataset.Images, count: int) -> list[Scene]:
    """Return the first scenes of a held-out set, without their images."""
    rng, found = np.random.default_rng(0), []
    for index in range(count):
        facts = scenes.Scene(**images.attributes[index])
        render = from_pil(Image.fromarray(images.rgb[index]))
        depth = torch.from_numpy(depth_image(images.distance[index]))
        found.append(Scene(PREFIX + facts.caption(rng, keep=1.0), render, depth))
    return found


@dataclass(frozen=True)
class Maker:
    """Makes images of scenes."""

    models: Models
    steps: int | None  # None for the mode's own
    keep: Callable[[Tensor, str], None]  # keeps an image (1, 3, H, W) in [0, 1] under a name

    def __call__(self, scene: Scene, seed: int, name: str, **changes: Any) -> Tensor:
        """Make the image (1, 3, H, W) in [0, 1] of a scene."""
        request = self.request(scene.prompt, seed, **changes)
        image = from_pil(self.models.generate(request).image)
        self.keep(image, f"{name}-{seed:02d}")
        return image

    def request(self, prompt: str, seed: int, **changes: Any) -> Request:
        """Return the request for an image."""
        return Request(
            prompt=prompt, mode="sdxl-360", seed=seed, num_inference_steps=self.steps, **changes
        )


def over_renders(measure: Callable[[Tensor], float], found: list[Scene], version: str) -> float:
    """Return a measure's mean divided by that of renders at the same size; nan above their size."""
    images = [scene.images[version] for scene in found]
    if images[0].shape[-1] > found[0].render.shape[-1]:
        return float("nan")
    renders = [at_size_of(scene.render, image) for scene, image in zip(found, images, strict=True)]
    return mean(map(measure, images)) / mean(map(measure, renders))


def summed(measure: Callable[[Tensor], float], found: list[Scene], version: str) -> float:
    """Return a measure's sum over all images, at the base's size, divided by the renders' sum."""
    ours = sum(measure(at_size_of(s.images[version], s.base)) for s in found)
    return ours / sum(measure(at_size_of(s.render, s.base)) for s in found)


def bicubic(found: list[Scene], version: str) -> float:
    """Return the sharpness of the base, enlarged by bicubic resampling, relative to renders."""
    size = found[0].images[version].shape[-2:]
    enlarged = [replace(s, images={"": resize(s.base, size, "x")}) for s in found]
    return over_renders(sharpness, enlarged, "")


def repeated(found: list[Scene], version: str, window: int) -> float:
    """Return the mean repetition divided by that of the enlarged base."""
    images = [scene.images[version] for scene in found]
    bases = [resize(scene.base, images[0].shape[-2:], "x") for scene in found]
    measure = partial(repetition, window=window, ring=True)
    return mean(map(measure, images)) / mean(map(measure, bases))


def print_spheres(make: Maker, found: list[Scene]) -> None:
    """Make every version of every scene, and print the table."""
    for seed, scene in enumerate(found):
        for name, changes in VERSIONS.items():
            scene.images[name] = make(scene, seed, name, **changes)
    base = make.models.bases["sdxl-360"]
    pipeline, window = Pipeline(base), base.window * base.factor

    def edges(version: str) -> float:
        job = make.models.prepare(make.request(found[0].prompt, 0, **VERSIONS[version]))
        stage = stages_of(job, pipeline)[-1]
        if stage.settings.layout.wraps:
            return float("nan")  # one view, without edges
        images = (scene.images[version] for scene in found)
        return mean(edge_ratio(i, pipeline, stage.settings, stage.steps) for i in images)

    def each(measure: Callable[[Tensor], float]) -> Callable[[str], float]:
        return lambda version: mean(measure(scene.images[version]) for scene in found)

    figures: Mapping[str, Callable[[str], float]] = {
        "seam ratio": each(seam_ratio),
        "Discontinuity Score": each(discontinuity_score),
        "low-pass PSNR to the base, dB": lambda version: mean(
            low_pass_psnr(scene.images[version], scene.base) for scene in found
        ),
        "sharpness over renders": partial(over_renders, sharpness, found),
        "sharpness of bicubic over renders": partial(bicubic, found),
        "repetition over the base": partial(repeated, found, window=window),
        "window edges": edges,
        "energy at the poles over renders": partial(summed, polar_energy, found),
        "energy at the equator over renders": partial(summed, equatorial_energy, found),
    }
    print(f"{'':34}" + "".join(f"{name:>18}" for name in VERSIONS))
    for name, figure in figures.items():
        print(f"{name:34}" + "".join(f"{figure(version):18.3f}" for version in VERSIONS))


def print_depths(make: Maker, found: list[Scene], reader: DepthReader) -> None:
    """Print how closely the base and the enlarged image follow a depth image."""
    for factor in (1, 2):
        values = []
        for seed, scene in enumerate(found):
            with TemporaryDirectory() as folder:
                path = Path(folder) / "depth.png"
                Image.fromarray((scene.depth * 65535).round().numpy().astype(np.uint16)).save(path)
                name = f"depth, upscale {factor}"
                image = make(scene, seed, name, upscale=factor, depth_image=path)
            with torch.no_grad():
                seen = reader(at_size_of(image, scene.base) * 2 - 1)
            values.append(float(shape_correlation(seen, cells(scene.depth[None]))))
        print(f"upscale {factor}: depth followed, less each row's mean: {mean(values):.3f}")
