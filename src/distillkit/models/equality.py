"""Comparison of two models by their logits, and a model rebuilt from its config.

Letters: B rows, T tokens, V vocabulary.
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distillkit.models.checkpoint import quiet
from distillkit.models.modes import evaluating
from distillkit.models.structure import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAME_ARITHMETIC = 1e-4
"""Largest gap of two models with equal weights in equal types: they compute the same, up to the order of sums."""

_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_ROUNDING = 0.05


def rounding_tolerance(dtype: torch.dtype) -> float:
    """Largest gap of two ways to compute the same in `dtype`, such as an adapter and the merged weights."""
    return _ROUNDING.get(dtype, _HALF_ROUNDING)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Logits `[B, T, V]` in float32 of a few arbitrary rows, on the CPU.

    Args:
        model: A transformers causal language model, with adapters or without.
    """
    base = base_model(model)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(32) * 7919 % vocabulary).reshape(2, 16).to(base.device)
    with evaluating(model):
        return torch.as_tensor(model(input_ids=ids, use_cache=False).logits).float().cpu()


def gap(first: Tensor, second: Tensor) -> float:
    """Norm of the difference of two models' logits, relative to the norm of the second; not finite for NaN."""
    return float((first - second).norm() / second.norm().clamp_min(torch.finfo(torch.float32).tiny))


def rebuilt(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model as transformers makes it from its config, with the same weights in the same memory.

    Args:
        model: A transformers causal language model without adapters.
    """
    with quiet():
        fresh: PreTrainedModel = type(model).from_pretrained(
            None, config=copy.deepcopy(model.config), state_dict=model.state_dict(), dtype=model.dtype
        )
    return fresh.eval()


def differs(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """True if two models' logits differ by more than the tolerance, or one of them is not finite."""
    return not gap(first, second) <= tolerance
