"""One sync step of an anchor and another window at Stable Diffusion 2 base's true size."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from panorama.decode import decode
from panorama.gradient import checkpointed, frozen
from panorama.perceptual import LPIPS
from panorama.sampler import sample
from panorama.synchronize import DirectSynchronizer, Synchronizer, SyncSchedule
from panorama.views import make_views
from script.operations import TOKENS, published
from tests.measure import Activations
from tests.plain_loop import plain_loop


class TrueSize:
    """Networks of the published sizes with random weights, and ways to take the step.

    Attributes:
        modules: all of them; their weights need no gradient, as published.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self.unet: Any = UNet2DConditionModel.from_config(published("unet")).eval()
            self.vae: Any = AutoencoderKL.from_config(published("vae")).eval()
        finally:
            torch.set_default_dtype(default)
        self.lpips = LPIPS().eval()
        self.modules = nn.ModuleList([self.unet, self.vae, self.lpips]).requires_grad_(False)
        self.embed, self.distance = self.lpips.embed, self.lpips.distance
        self.states = torch.randn(2, TOKENS, self.unet.config.cross_attention_dim).to(dtype)
        side = self.unet.config.sample_size
        self.noise = torch.randn(1, 4, side, 2 * side)
        self.views = (make_views(side, 2 * side, side, side),)

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        """Guidance in one batch, as the pipeline has it."""
        states = self.states.repeat_interleave(len(x), 0)
        noise = self.unet(x.to(self.unet.dtype).repeat(2, 1, 1, 1), t, states).sample.float()
        uncond, text = noise.chunk(2)
        prediction: Tensor = uncond + 7.5 * (text - uncond)
        return prediction

    def decode(self, x: Tensor) -> Tensor:
        """Latents to images."""
        return decode(self.vae, x)

    def ways(self) -> dict[str, Callable[[], object]]:
        """Each takes the first of 50 steps."""
        scheduler = DDIMScheduler.from_config(published("scheduler"))
        scheduler.set_timesteps(50)
        scheduler.timesteps = scheduler.timesteps[:1]
        schedule = SyncSchedule()
        parts = (self.predict_noise, self.decode, self, scheduler.alphas_cumprod)

        def ours(synchronizer: Synchronizer, checkpointing: bool = False) -> Tensor:
            models = (self.unet, self.vae)
            with frozen(*models, self.lpips), checkpointed(*models if checkpointing else ()):
                return sample(
                    self.noise,
                    self.views,
                    self.predict_noise,
                    copy.deepcopy(scheduler),
                    synchronizer=synchronizer,
                    schedule=schedule,
                )

        return {
            "published loop": lambda: plain_loop(self.noise, self.views, self, scheduler, schedule),
            "exact": lambda: ours(Synchronizer(*parts)),
            "exact, checkpointing": lambda: ours(Synchronizer(*parts), checkpointing=True),
            "fast": lambda: ours(DirectSynchronizer(*parts, pooling=2)),
        }


def activations(dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """The most bytes of tensors alive at once beside the weights, by the way the step is taken.

    The step runs on torch's fake tensors, which have a size and a device and no values. With true
    ones on a CPU the published loop was within 1 % of this.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        networks = TrueSize(dtype)
    weights = list(networks.modules.parameters())
    most = {}
    for name, run in networks.ways().items():
        with Activations(weights) as found:
            run()
        most[name] = found.most
    return most
