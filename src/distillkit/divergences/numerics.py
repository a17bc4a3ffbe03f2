"""Numerics shared by the divergences: mixtures, and finite substitutes for log 0.

Letters: N positions, V vocabulary.
"""

import math

import torch
from torch import Tensor

ValueAndGrad = tuple[Tensor, Tensor]
"""Values `[n]`, and their gradient `[n, V]` with respect to the student's logits."""

_MIXTURE_LOG_ZERO = -1e30
"""Replaces log 0 inside a mixture: -inf on both sides would make logaddexp's gradient NaN."""

_LOG_ZERO = -1e38
"""Replaces log 0: -inf would turn 0·log 0 into NaN."""


def log_mixture(first: Tensor, second: Tensor, share: float | Tensor) -> Tensor:
    """Returns the log of share·exp(first) + (1−share)·exp(second), computed in log space.

    Args:
        first: `[N, V]` log-probabilities.
        second: `[N, V]` log-probabilities.
        share: Weight of `first` in [0, 1], a float or `[N]`; it carries no gradient.

    Returns:
        `[N, V]` log-probabilities; -inf where neither distribution has mass.
    """
    log_share: float | Tensor
    log_rest: float | Tensor
    if isinstance(share, Tensor):
        share = share.detach().to(first.dtype).unsqueeze(-1)  # [N, 1]
        log_share, log_rest = share.log(), torch.log1p(-share)
    else:
        log_share = math.log(share) if share > 0 else -math.inf
        log_rest = math.log1p(-share) if share < 1 else -math.inf
    mixed = torch.logaddexp(
        (first + log_share).clamp_min(_MIXTURE_LOG_ZERO), (second + log_rest).clamp_min(_MIXTURE_LOG_ZERO)
    )
    return mixed.masked_fill_(mixed <= _MIXTURE_LOG_ZERO / 2, -math.inf)


def clamp_log_zero_(*log_probs: Tensor) -> None:
    """Replaces -inf by a finite lower bound, in place; NaN stays NaN."""
    for tensor in log_probs:
        tensor.clamp_min_(_LOG_ZERO)


def restore_infinity(values: Tensor) -> Tensor:
    """Returns the values with infinity where mass lies on a token that the other distribution excludes."""
    return values.masked_fill(values > 1e20, math.inf)


def dot(weights: Tensor, values: Tensor) -> Tensor:
    """Returns Σ weights·values over the vocabulary, `[n]`; overwrites `values`."""
    return values.mul_(weights).sum(-1)


def logits_grad(logq_grad: Tensor, q: Tensor) -> Tensor:
    """Returns the gradient by the logits, h − q·Σh, for the gradient h by the log-probabilities; overwrites both."""
    return logq_grad.sub_(q.mul_(logq_grad.sum(-1, keepdim=True)))


def as_column(alpha: float | Tensor, like: Tensor) -> float | Tensor:
    """Returns a share per position as `[N, 1]` in the dtype of `like`; a float unchanged."""
    return alpha.detach().to(like.dtype).unsqueeze(-1) if isinstance(alpha, Tensor) else alpha


def is_zero(alpha: float | Tensor) -> bool:
    """Returns True if `alpha` is the number 0, not a tensor."""
    return not isinstance(alpha, Tensor) and alpha == 0


def mixture(first: Tensor, second: Tensor, share: float | Tensor) -> Tensor:
    """Returns share·first + (1−share)·second `[n, V]`, clamped to the smallest normal number where both underflow."""
    mixed = torch.lerp(second, first, share)
    return mixed.clamp_min_(torch.finfo(first.dtype).tiny)
