"""Total variation distance, and its complement, the overlap.

Letters: N positions, V vocabulary.
"""

import torch
from torch import Tensor

from distillkit.divergences.numerics import ValueAndGrad, logits_grad


def tvd(logp: Tensor, logq: Tensor) -> Tensor:
    """Total variation distance, ½ Σ |p − q|.

    Args:
        logp: `[N, V]` teacher log-probabilities.
        logq: `[N, V]` student log-probabilities.

    Returns:
        `[N]` in [0, 1]. Wen et al. 2023 (f-distill), arXiv 2307.15190.
    """
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


def overlap(logp: Tensor, logq: Tensor) -> Tensor:
    """Expected acceptance rate of a token that the student drafts and the teacher verifies, Σ min(p, q) = 1 − tvd.

    Args:
        logp: `[N, V]` teacher log-probabilities.
        logq: `[N, V]` student log-probabilities.

    Returns:
        `[N]` in [0, 1]. Leviathan et al. 2022, arXiv 2211.17192, corollary 3.6.
    """
    return torch.minimum(logp, logq).exp().sum(-1)


def tvd_and_grad(logp: Tensor, logq: Tensor) -> ValueAndGrad:
    """Total variation distance: with h = ½·sign(q − p)·q the gradient is h − q·Σh.

    Args:
        logp: `[n, V]` teacher log-probabilities; overwritten.
        logq: `[n, V]` student log-probabilities; overwritten.

    Returns:
        `[n]` in [0, 1] and `[n, V]`.
    """
    q = logq.exp_()
    difference = q - logp.exp_()
    values = 0.5 * difference.abs().sum(-1)
    return values, logits_grad(difference.sign_().mul_(0.5).mul_(q), q)
