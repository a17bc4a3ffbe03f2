"""Kullback-Leibler divergences: forward, reverse, and a weighted sum of both.

Letters: N positions, V vocabulary.
"""

import torch
from torch import Tensor

from distillkit.divergences.numerics import ValueAndGrad, clamp_log_zero_, dot, restore_infinity


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Forward KL divergence, Σ p (log p − log q).

    Args:
        logp: `[N, V]` teacher log-probabilities.
        logq: `[N, V]` student log-probabilities.

    Returns:
        `[N]` nats, at least 0, 0 where p = q. Hinton et al. 2015, arXiv 1503.02531.
    """
    p = logp.exp()
    # -inf − -inf and 0·(−inf) are NaN in floating point: both stand for 0·log 0.
    return (p * (logp - logq).masked_fill(p == 0, 0.0)).sum(-1)


def rkl(logp: Tensor, logq: Tensor) -> Tensor:
    """Reverse KL divergence, Σ q (log q − log p).

    Args:
        logp: `[N, V]` teacher log-probabilities.
        logq: `[N, V]` student log-probabilities.

    Returns:
        `[N]` nats, at least 0, 0 where p = q. Gu et al. 2023 (MiniLLM), arXiv 2306.08543.
    """
    return kl(logq, logp)


def jeffreys(logp: Tensor, logq: Tensor, weight: float = 0.5) -> Tensor:
    """Weighted symmetric KL, (1−λ)·kl + λ·rkl.

    Args:
        logp: `[N, V]` teacher log-probabilities.
        logq: `[N, V]` student log-probabilities.
        weight: λ in [0, 1]; 0 is `kl`, 1 is `rkl`, exactly.

    Returns:
        `[N]` nats.
    """
    if weight == 0.0:
        return kl(logp, logq)
    if weight == 1.0:
        return rkl(logp, logq)
    return (1.0 - weight) * kl(logp, logq) + weight * rkl(logp, logq)


def kl_and_grad(logp: Tensor, logq: Tensor) -> ValueAndGrad:
    """Forward KL: the gradient is q − p.

    Args:
        logp: `[n, V]` teacher log-probabilities; overwritten.
        logq: `[n, V]` student log-probabilities; overwritten.

    Returns:
        `[n]` nats and `[n, V]`.
    """
    clamp_log_zero_(logp, logq)
    ratio = logp - logq
    p = logp.exp_()
    return restore_infinity(dot(p, ratio)), logq.exp_().sub_(p)


def rkl_and_grad(logp: Tensor, logq: Tensor) -> ValueAndGrad:
    """Reverse KL f: the gradient is q·(log q − log p − f).

    Args:
        logp: `[n, V]` teacher log-probabilities; overwritten.
        logq: `[n, V]` student log-probabilities; overwritten.

    Returns:
        `[n]` nats and `[n, V]`.
    """
    clamp_log_zero_(logp, logq)
    ratio = torch.sub(logq, logp, out=logp)
    q = logq.exp_()
    terms = ratio * q
    values = terms.sum(-1)
    return restore_infinity(values), terms.sub_(q.mul_(values[:, None]))


def jeffreys_and_grad(logp: Tensor, logq: Tensor, weight: float = 0.5) -> ValueAndGrad:
    """Weighted symmetric KL, (1−λ)·kl + λ·rkl: the gradient is the same weighted sum of both gradients.

    Args:
        logp: `[n, V]` teacher log-probabilities; overwritten.
        logq: `[n, V]` student log-probabilities; overwritten.
        weight: λ in [0, 1].

    Returns:
        `[n]` nats and `[n, V]`.
    """
    clamp_log_zero_(logp, logq)
    ratio = logq - logp
    p, q = logp.exp_(), logq.exp_()
    forward = -(p * ratio).sum(-1)
    terms = ratio.mul_(q)
    reverse = terms.sum(-1)
    # λ·q·(log q − log p − rkl) + (1−λ)·(q − p)
    grad = terms.mul_(weight).add_(q.mul_((1.0 - weight - weight * reverse)[:, None])).sub_(p, alpha=1.0 - weight)
    return restore_infinity((1.0 - weight) * forward + weight * reverse), grad
