"""The memory of enlarging a 360 image at the sizes of SDXL base 1.0, on torch's fake tensors."""

import pytest
import torch

from benchmarks.lab import FakeLab
from panorama.pipeline import Settings
from panorama.sampling.views import Feathered


def most_bytes(factor: int) -> dict[str, int]:
    """Return the most bytes alive at once beside the weights and the image, by part of the work."""
    size = {"height": 512 * factor, "width": 1024 * factor}
    settings = Settings("", **size, closed="x", num_inference_steps=1, layout=Feathered())
    lab = FakeLab(torch.device("cpu"), dry=False)
    run = lab.run(lab.sdxl, settings)
    pipe, noise = run.pipeline, run.noise
    with lab.mode:
        smaller = torch.empty(1, 3, settings.height // 2, settings.width // 2)
    parts = {
        "encode": lambda: pipe.encode_image(settings, smaller),
        "denoise": lambda: pipe.denoise(settings, run.conditioning, noise, x0=noise),
        "decode": lambda: pipe.decode(settings, noise),
    }
    image = 3 * 4 * settings.height * settings.width
    return {name: lab.most(lab.sdxl, call) - image for name, call in parts.items()}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_canvas_beyond_the_image() -> None:
    two, four, eight = map(most_bytes, (2, 4, 8))
    for name, found in {"2": two, "4": four, "8": eight}.items():
        gigabytes = {part: round(most / 1e9, 2) for part, most in found.items()}
        print(f"\nupscale {name} from 1024 x 512, GB beside weights and image: {gigabytes}")
    assert max(two.values()) < max(four.values()) < 9.5e9
    assert max(eight.values()) <= 1.05 * max(four.values())
    assert eight["denoise"] <= 1.05 * four["denoise"]
