"""Modes of a model: evaluation without compiled kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches to evaluation mode without compiled kernels, and restores each submodule afterwards.

    Shapes differ from those of training, such as a key-value cache that grows by one token at a time: `torch.compile`
    would compile each of them, reach its limit, and then stop compiling for training too.
    """
    states = [(module, module.training, module._compiled_call_impl) for module in model.modules()]
    model.eval()
    for module, *_ in states:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, training, compiled in states:
            module.training, module._compiled_call_impl = training, compiled
