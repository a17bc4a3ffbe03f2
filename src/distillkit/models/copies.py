"""Copies of a model, which do not change while the model is trained."""

import copy
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn


def deep_copy(model: nn.Module, moved: dict[int, object] | None = None) -> nn.Module:
    """A deep copy of a model, also of one whose layers keep a state of their last training pass, as RecurrentGemma's.

    Args:
        model: The model.
        moved: What stands in the copy for some objects of the model, by their id; None has none.

    Returns:
        The copy. Its states are separate from the pass that made them.
    """
    states = {id(state): state.detach().clone() for state in _states(model) if not state.is_leaf}
    return copy.deepcopy(model, {**states, **(moved or {})})


def _states(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that the modules hold in attributes and in lists and dictionaries of these, besides parameters."""
    values: list[object] = [value for module in model.modules() for value in vars(module).values()]
    seen: set[int] = set()
    while values:
        value = values.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value


@torch.no_grad()
def frozen_copy(model: nn.Module, device: torch.device, reuse: nn.Module | None = None) -> nn.Module:
    """A copy in evaluation mode, without gradients.

    Args:
        model: The model, on any device; weights that are tied in it are tied in the copy.
        device: The copy's device.
        reuse: An earlier copy of `model` whose memory is overwritten and returned; None allocates a new copy.

    Returns:
        The copy. Its weights are written asynchronously, after the work that is already queued on `device`.
    """
    if reuse is None:
        # Quantised parameters are of other types and copy themselves.
        plain = (parameter for parameter in model.parameters() if type(parameter) is nn.Parameter)
        moved: dict[int, object] = {id(old): nn.Parameter(old.to(device, copy=True), False) for old in plain}
        # With `moved`, copying never takes the memory of a second copy on the model's device.
        return deep_copy(model, moved).to(device).eval().requires_grad_(False)
    targets, sources = (chain(module.parameters(), module.buffers()) for module in (reuse, model))
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
    return reuse
