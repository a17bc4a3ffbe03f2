"""Skew KL divergences: of one distribution from a mixture of both.

Letters: N positions, V vocabulary.
"""

import torch
from torch import Tensor

from distillkit.divergences.kullback_leibler import kl, kl_and_grad, rkl, rkl_and_grad
from distillkit.divergences.numerics import (
    ValueAndGrad,
    as_column,
    clamp_log_zero_,
    dot,
    is_zero,
    log_mixture,
    logits_grad,
    mixture,
    restore_infinity,
)


def skl(logp: Tensor, logq: Tensor, alpha: float | Tensor = 0.1) -> Tensor:
    """Skew KL divergence, KL(p ‖ α·p + (1−α)·q).

    Args:
        logp: `[N, V]` teacher log-probabilities.
        logq: `[N, V]` student log-probabilities.
        alpha: α in [0, 1], a float or `[N]`: the teacher's share of the mixture. 0 is `kl`, exactly.

    Returns:
        `[N]` nats, at most −log α. Ko et al. 2024 (DistiLLM), arXiv 2402.03898, equation 5.
    """
    if isinstance(alpha, float | int) and alpha == 0:
        return kl(logp, logq)
    return kl(logp, log_mixture(logp, logq, alpha))


def srkl(logp: Tensor, logq: Tensor, alpha: float | Tensor = 0.1, detach_mixture: bool = False) -> Tensor:
    """Skew reverse KL divergence, KL(q ‖ (1−α)·p + α·q).

    Args:
        logp: `[N, V]` teacher log-probabilities.
        logq: `[N, V]` student log-probabilities.
        alpha: α in [0, 1], a float or `[N]`: the student's share of the mixture. 0 is `rkl`, exactly.
        detach_mixture: Whether the gradient stops at the student's half of the mixture, as in the code released with
            DistiLLM-2. The value is the same.

    Returns:
        `[N]` nats, at most −log α. Ko et al. 2024 (DistiLLM), arXiv 2402.03898, equation 6.
    """
    if isinstance(alpha, float | int) and alpha == 0:
        return rkl(logp, logq)
    return kl(logq, log_mixture(logq.detach() if detach_mixture else logq, logp, alpha))


def skl_and_grad(logp: Tensor, logq: Tensor, alpha: float | Tensor = 0.1) -> ValueAndGrad:
    """Skew KL: with m = α·p + (1−α)·q and r = p·(1−α)·q/m the gradient is q·Σr − r.

    Args:
        logp: `[n, V]` teacher log-probabilities; overwritten.
        logq: `[n, V]` student log-probabilities; overwritten.
        alpha: α in [0, 1), a float or `[n]`: the teacher's share of the mixture.

    Returns:
        `[n]` nats and `[n, V]`.
    """
    if is_zero(alpha):
        return kl_and_grad(logp, logq)
    clamp_log_zero_(logp, logq)
    p, q = logp.exp(), logq.exp()
    share = as_column(alpha, q)
    mixed = mixture(p, q, share)
    logq_grad = torch.div(q, mixed)
    log_m = mixed.log_()
    if isinstance(share, Tensor):  # at α = 0 the mixture is q, also where q underflows
        logq_grad.masked_fill_(share == 0, 1.0)
        torch.where(share == 0, logq, log_m, out=log_m)
    logq_grad.mul_(p).mul_(share - 1.0)  # −r
    return restore_infinity(dot(p, logp.sub_(log_m))), logits_grad(logq_grad, q)


def srkl_and_grad(
    logp: Tensor, logq: Tensor, alpha: float | Tensor = 0.1, detach_mixture: bool = False
) -> ValueAndGrad:
    """Skew reverse KL: with m = (1−α)·p + α·q and h = q·(log(q/m) − α·q/m) the gradient is h − q·Σh.

    Args:
        logp: `[n, V]` teacher log-probabilities; overwritten.
        logq: `[n, V]` student log-probabilities; overwritten.
        alpha: α in [0, 1), a float or `[n]`: the student's share of the mixture.
        detach_mixture: Whether the gradient stops at the student's half of the mixture; then h = q·log(q/m).

    Returns:
        `[n]` nats and `[n, V]`.
    """
    if is_zero(alpha):
        return rkl_and_grad(logp, logq)
    clamp_log_zero_(logp, logq)
    p, q = logp.exp(), logq.exp()
    share = as_column(alpha, q)
    mixed = mixture(q, p, share)
    mixture_term = None if detach_mixture else torch.mul(q, q, out=p).div_(mixed).mul_(share)
    log_m = mixed.log_()
    if isinstance(share, Tensor):  # at α = 0 the mixture is p, also where p underflows
        torch.where(share == 0, logp, log_m, out=log_m)
    terms = logq.sub_(log_m).mul_(q)
    values = terms.sum(-1)
    logq_grad = terms if mixture_term is None else terms.sub_(mixture_term)
    return restore_infinity(values), logits_grad(logq_grad, q)
