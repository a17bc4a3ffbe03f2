"""Divergences between two next-token distributions: pure functions `[N, V], [N, V] -> [N]`.

Each takes log-probabilities of the teacher (`logp`) and of the student (`logq`) and returns nats. None produces NaN
where a token has probability 0 on both sides (log-probability -inf, or a finite one whose exponential underflows):
0·log 0 = 0. Where the definition is infinite (mass on a token that the other side excludes with -inf) so is the result.

Letters: N positions, V vocabulary.
"""

import math

import torch
from torch import Tensor

# Stands for log 0 inside a mixture. A true -inf on both sides would make logaddexp's gradient NaN.
_LOG_ZERO = -1e30


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Forward KL divergence, Σ p (log p − log q).

    Args:
        logp: `[N, V]` teacher log-probabilities.
        logq: `[N, V]` student log-probabilities.

    Returns:
        `[N]` nats, at least 0, 0 where p = q. Hinton et al. 2015, arXiv 1503.02531.
    """
    p = logp.exp()
    # -inf − -inf is NaN, and 0·(−inf) as well: both stand for 0·log 0.
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


def jsd(logp: Tensor, logq: Tensor, beta: float = 0.5) -> Tensor:
    """Generalized Jensen-Shannon divergence, b·KL(p‖m) + (1−b)·KL(q‖m) with m = b·p + (1−b)·q.

    Args:
        logp: `[N, V]` teacher log-probabilities.
        logq: `[N, V]` student log-probabilities.
        beta: b in (0, 1), the teacher's share of the mixture. At both ends the value vanishes; divided by b it
            tends to `kl` as b → 0, divided by 1−b to `rkl` as b → 1.

    Returns:
        `[N]` nats, at most log 2. Agarwal et al. 2023 (GKD), arXiv 2306.13649, equation 1.
    """
    mixed = log_mixture(logp, logq, beta)
    return beta * kl(logp, mixed) + (1.0 - beta) * kl(logq, mixed)


def tvd(logp: Tensor, logq: Tensor) -> Tensor:
    """Total variation distance, ½ Σ |p − q|.

    Args:
        logp: `[N, V]` teacher log-probabilities.
        logq: `[N, V]` student log-probabilities.

    Returns:
        `[N]` in [0, 1]. Wen et al. 2023 (f-distill), arXiv 2307.15190.
    """
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


def skl(logp: Tensor, logq: Tensor, alpha: float | Tensor = 0.1) -> Tensor:
    """Skew KL divergence, KL(p ‖ α·p + (1−α)·q).

    Args:
        logp: `[N, V]` teacher log-probabilities.
        logq: `[N, V]` student log-probabilities.
        alpha: α in [0, 1], a number or `[N]`: the teacher's share of the mixture. 0 is `kl`, exactly.

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
        alpha: α in [0, 1], a number or `[N]`: the student's share of the mixture. 0 is `rkl`, exactly.
        detach_mixture: Whether the gradient stops at the student's half of the mixture, as in the code released with
            DistiLLM-2. The value is the same.

    Returns:
        `[N]` nats, at most −log α. Ko et al. 2024 (DistiLLM), arXiv 2402.03898, equation 6.
    """
    if isinstance(alpha, float | int) and alpha == 0:
        return rkl(logp, logq)
    return kl(logq, log_mixture(logq.detach() if detach_mixture else logq, logp, alpha))


def overlap(logp: Tensor, logq: Tensor) -> Tensor:
    """Expected acceptance of a token that the student drafts and the teacher checks, Σ min(p, q) = 1 − tvd.

    Args:
        logp: `[N, V]` teacher log-probabilities.
        logq: `[N, V]` student log-probabilities.

    Returns:
        `[N]` in [0, 1]. Leviathan et al. 2022, arXiv 2211.17192, corollary 3.6.
    """
    return torch.minimum(logp, logq).exp().sum(-1)


def log_mixture(first: Tensor, second: Tensor, share: float | Tensor) -> Tensor:
    """Log of share·exp(first) + (1−share)·exp(second), formed in log space.

    Args:
        first: `[N, V]` log-probabilities.
        second: `[N, V]` log-probabilities.
        share: Weight of `first` in [0, 1], a number or `[N]`; it carries no gradient.

    Returns:
        `[N, V]` log-probabilities; -inf where neither side has mass.
    """
    log_share: float | Tensor
    log_rest: float | Tensor
    if isinstance(share, Tensor):
        share = share.detach().to(first.dtype).unsqueeze(-1)  # [N, 1]
        log_share, log_rest = share.log(), torch.log1p(-share)
    else:
        log_share = math.log(share) if share > 0 else -math.inf
        log_rest = math.log1p(-share) if share < 1 else -math.inf
    mixed = torch.logaddexp((first + log_share).clamp_min(_LOG_ZERO), (second + log_rest).clamp_min(_LOG_ZERO))
    return mixed.masked_fill_(mixed <= _LOG_ZERO / 2, -math.inf)
