"""Ending a run in the middle of a step."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

DEPTH = 3


@contextmanager
def interruptible(poll: Callable[[], None], *networks: nn.Module) -> Iterator[None]:
    """Call `poll` before every block of the networks runs, while the context is active.

    A block is a network, or a module at most DEPTH levels below it, such as one of the UNet's down
    blocks. Hooks on every layer would delay the launch of a GPU's kernels.

    An exception that `poll` raises ends the run. On exit, also by an exception, the modules are as
    they were.
    """
    with ExitStack() as stack:
        for module in dict.fromkeys(m for network in networks for m in blocks(network)):
            stack.callback(module.register_forward_pre_hook(lambda *_: poll()).remove)
        yield


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield a network and its modules down to DEPTH."""
    for name, module in network.named_modules():
        if not name or name.count(".") < DEPTH:
            yield module
