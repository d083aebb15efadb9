"""Random models of Stable Diffusion's shape, small enough to run in no time."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel


def small_vae() -> AutoencoderKL:
    """Factor 4, with attention in the middle as Stable Diffusion's has."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=4,
    )


def small_unet() -> UNet2DConditionModel:
    """Windows of 16 x 16 latents, one downsampling, text of 128 channels."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=4,
    )
