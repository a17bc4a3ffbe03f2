"""Copies of a model that stay as they are while the model is trained."""

import copy
from itertools import chain

import torch
from torch import nn


@torch.no_grad()
def frozen_copy(model: nn.Module, device: torch.device, held: nn.Module | None = None) -> nn.Module:
    """A copy in evaluation mode, without gradients.

    Args:
        model: On any device; its tied weights are tied in the copy.
        device: Where the copy lies.
        held: An earlier copy of `model`, whose memory is used again; None makes a new one.

    Returns:
        The copy; its weights are in place when work that `device` was given before is done.
    """
    if held is None:
        plain = (own for own in model.parameters() if type(own) is nn.Parameter)  # others, quantised, know how
        moved: dict[int, object] = {id(own): nn.Parameter(own.to(device, copy=True), False) for own in plain}
        return copy.deepcopy(model, moved).to(device).eval().requires_grad_(False)  # never twice where the model is
    ours, theirs = (chain(one.parameters(), one.buffers()) for one in (held, model))
    for own, new in zip(ours, theirs, strict=True):
        own.copy_(new, non_blocking=True)
    return held
