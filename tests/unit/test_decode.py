"""The picture of a canvas: exact where it is decoded whole, without joints where it is not."""

import pytest
import torch
from diffusers import AutoencoderKL

from panorama.decode import decode_canvas


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
    )


@pytest.mark.parametrize(("ring", "dim", "shape"), [("x", -1, (8, 40)), ("y", -2, (40, 8))])
def test_a_ring_decodes_the_same_wherever_it_is_cut(
    vae: AutoencoderKL, ring: str, dim: int, shape: tuple[int, int]
) -> None:
    latents = torch.randn(1, 4, *shape)
    picture = decode_canvas(vae, latents, ring=ring)
    for cells in (1, 5, 17):
        rolled = decode_canvas(vae, latents.roll(cells, dim), ring=ring)
        torch.testing.assert_close(rolled, picture.roll(2 * cells, dim), atol=1e-5, rtol=0)


@pytest.mark.parametrize("ring", ["", "x"])
@pytest.mark.parametrize("tall", [False, True])
def test_slices_leave_no_joint(vae: AutoencoderKL, ring: str, tall: bool) -> None:
    """A canvas of slowly changing latents stays smooth where slices meet."""
    angle = torch.linspace(0, 2 * torch.pi, 161)[:-1]
    waves = torch.stack([angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()])
    latents = waves.view(1, 4, 1, 160).expand(1, 4, 16, 160)
    dim = -1
    if tall:
        latents, dim, ring = latents.transpose(-1, -2), -2, ring.replace("x", "y")
    whole = decode_canvas(vae, latents, ring=ring)
    sliced = decode_canvas(vae, latents, ring=ring, max_cells=16 * 48)
    assert sliced.shape == whole.shape
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    steps, reference = sliced[inner].diff(dim=dim).abs(), whole[inner].diff(dim=dim).abs()
    assert steps.max() < 1.5 * reference.max()


def test_what_fits_one_slice_is_decoded_whole(vae: AutoencoderKL) -> None:
    latents = torch.randn(1, 4, 8, 40)
    torch.testing.assert_close(
        decode_canvas(vae, latents, max_cells=320),
        vae.decode(latents / 0.18215).sample.clamp(-1, 1),
    )
