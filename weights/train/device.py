"""The device that trains: its batches, random numbers and precision."""

import torch


def device() -> torch.device:
    """Return the device that trains: a CUDA GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batch_size(count: int) -> int:
    """Return a batch's size on the device: eight times as many on a GPU."""
    return 8 * count if device().type == "cuda" else count


def on_device(generator: torch.Generator) -> torch.Generator:
    """Return a generator of the device, seeded by one of the CPU."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device()).manual_seed(seed)


def has_bfloat16() -> bool:
    """Return True if the CPU multiplies in bfloat16; others are many times slower at it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def mixed_precision() -> torch.autocast:
    """Compute in bfloat16 where it is faster than single precision."""
    kind = device().type
    cuda = kind == "cuda"
    # No cache of cast weights: a replayed CUDA graph has to cast the updated weights anew.
    return torch.autocast(kind, torch.bfloat16, cuda or has_bfloat16(), cache_enabled=not cuda)
