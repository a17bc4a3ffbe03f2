"""Divergences with their gradients in closed form: `[n, V], [n, V] -> [n], [n, V]`.

Each function gives what the function of the same name in `divergences` gives, and its gradient by the student's logits
z (log q = log softmax z). It needs no graph and three or four `[n, V]` tensors instead of a dozen, and overwrites its
arguments. With a divergence f and h = ∂f/∂log q the gradient is h − q·Σh; each docstring gives what becomes of it.

Letters: n positions of a slice, V vocabulary.
"""

import math

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def kl(logp: Tensor, logq: Tensor) -> Pair:
    """Forward KL: the gradient is q − p.

    Args:
        logp: `[n, V]` teacher log-probabilities; overwritten.
        logq: `[n, V]` student log-probabilities; overwritten.

    Returns:
        `[n]` nats and `[n, V]`.
    """
    _bound(logp, logq)
    ratio = logp - logq
    p = logp.exp_()
    return _unbound(_dot(p, ratio)), logq.exp_().sub_(p)


def rkl(logp: Tensor, logq: Tensor) -> Pair:
    """Reverse KL f: the gradient is q·(log q − log p − f).

    Args:
        logp: `[n, V]` teacher log-probabilities; overwritten.
        logq: `[n, V]` student log-probabilities; overwritten.

    Returns:
        `[n]` nats and `[n, V]`.
    """
    _bound(logp, logq)
    ratio = torch.sub(logq, logp, out=logp)
    q = logq.exp_()
    terms = ratio * q
    values = terms.sum(-1)
    return _unbound(values), terms.sub_(q.mul_(values[:, None]))


def jeffreys(logp: Tensor, logq: Tensor, weight: float = 0.5) -> Pair:
    """Weighted symmetric KL, (1−λ)·kl + λ·rkl: the gradient is the same sum of both gradients.

    Args:
        logp: `[n, V]` teacher log-probabilities; overwritten.
        logq: `[n, V]` student log-probabilities; overwritten.
        weight: λ in [0, 1].

    Returns:
        `[n]` nats and `[n, V]`.
    """
    _bound(logp, logq)
    ratio = logq - logp
    p, q = logp.exp_(), logq.exp_()
    forward = -(p * ratio).sum(-1)
    terms = ratio.mul_(q)
    reverse = terms.sum(-1)
    # λ·q·(log q − log p − rkl) + (1−λ)·(q − p)
    grad = terms.mul_(weight).add_(q.mul_((1.0 - weight - weight * reverse)[:, None])).sub_(p, alpha=1.0 - weight)
    return _unbound((1.0 - weight) * forward + weight * reverse), grad


def jsd(logp: Tensor, logq: Tensor, beta: float = 0.5) -> Pair:
    """Generalized Jensen-Shannon divergence: the gradient is (1−b)·q·(log(q/m) − KL(q‖m)).

    Args:
        logp: `[n, V]` teacher log-probabilities; overwritten.
        logq: `[n, V]` student log-probabilities; overwritten.
        beta: b in (0, 1), the teacher's share of the mixture m.

    Returns:
        `[n]` nats and `[n, V]`.
    """
    _bound(logp, logq)
    p, q = logp.exp(), logq.exp()
    log_m = _mixture(p, q, beta).log_()
    of_teacher = _dot(p, logp.sub_(log_m))
    terms = logq.sub_(log_m).mul_(q)
    of_student = terms.sum(-1)
    grad = terms.sub_(q.mul_(of_student[:, None])).mul_(1.0 - beta)
    return beta * of_teacher + (1.0 - beta) * of_student, grad


def tvd(logp: Tensor, logq: Tensor) -> Pair:
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
    return values, _projected(difference.sign_().mul_(0.5).mul_(q), q)


def skl(logp: Tensor, logq: Tensor, alpha: float | Tensor = 0.1) -> Pair:
    """Skew KL: with m = α·p + (1−α)·q and r = p·(1−α)·q/m the gradient is q·Σr − r.

    Args:
        logp: `[n, V]` teacher log-probabilities; overwritten.
        logq: `[n, V]` student log-probabilities; overwritten.
        alpha: α in [0, 1), a number or `[n]`: the teacher's share of the mixture.

    Returns:
        `[n]` nats and `[n, V]`.
    """
    if _is_zero(alpha):
        return kl(logp, logq)
    _bound(logp, logq)
    p, q = logp.exp(), logq.exp()
    share = _column(alpha, q)
    mixed = _mixture(p, q, share)
    held = torch.div(q, mixed)
    log_m = mixed.log_()
    if isinstance(share, Tensor):  # at α = 0 the mixture is q, also where q underflows
        held.masked_fill_(share == 0, 1.0)
        torch.where(share == 0, logq, log_m, out=log_m)
    held.mul_(p).mul_(share - 1.0)  # −r
    return _unbound(_dot(p, logp.sub_(log_m))), _projected(held, q)


def srkl(logp: Tensor, logq: Tensor, alpha: float | Tensor = 0.1, detach_mixture: bool = False) -> Pair:
    """Skew reverse KL: with m = (1−α)·p + α·q and h = q·(log(q/m) − α·q/m) the gradient is h − q·Σh.

    Args:
        logp: `[n, V]` teacher log-probabilities; overwritten.
        logq: `[n, V]` student log-probabilities; overwritten.
        alpha: α in [0, 1), a number or `[n]`: the student's share of the mixture.
        detach_mixture: Whether the gradient stops at the student's half of the mixture; then h = q·log(q/m).

    Returns:
        `[n]` nats and `[n, V]`.
    """
    if _is_zero(alpha):
        return rkl(logp, logq)
    _bound(logp, logq)
    p, q = logp.exp(), logq.exp()
    share = _column(alpha, q)
    mixed = _mixture(q, p, share)
    of_mixture = None if detach_mixture else torch.mul(q, q, out=p).div_(mixed).mul_(share)
    log_m = mixed.log_()
    if isinstance(share, Tensor):  # at α = 0 the mixture is p, also where p underflows
        torch.where(share == 0, logp, log_m, out=log_m)
    terms = logq.sub_(log_m).mul_(q)
    values = terms.sum(-1)
    held = terms if of_mixture is None else terms.sub_(of_mixture)
    return _unbound(values), _projected(held, q)


def cross_entropy(logq: Tensor, targets: Tensor) -> Pair:
    """Cross-entropy −log q(y): the gradient is q less 1 at the token y.

    Args:
        logq: `[n, V]` student log-probabilities; overwritten.
        targets: `[n]` token ids.

    Returns:
        `[n]` nats and `[n, V]`.
    """
    values = -logq.gather(-1, targets[:, None]).squeeze(-1)
    grad = logq.exp_()
    return values, grad.scatter_add_(-1, targets[:, None], grad.new_full((1, 1), -1.0).expand(len(targets), 1))


_LOWEST = -1e38
"""Stands for log 0: a true -inf would turn 0·log 0 into NaN."""


def _bound(*logs: Tensor) -> None:
    """Makes log-probabilities finite in place; a NaN stays one."""
    for log in logs:
        log.clamp_min_(_LOWEST)


def _unbound(values: Tensor) -> Tensor:
    """Infinity where mass lies on a token that the other side excludes."""
    return values.masked_fill(values > 1e20, math.inf)


def _dot(weights: Tensor, values: Tensor) -> Tensor:
    """Σ weights·values over the vocabulary, `[n]`; overwrites `values`."""
    return values.mul_(weights).sum(-1)


def _projected(held: Tensor, q: Tensor) -> Tensor:
    """H − q·Σh; overwrites both."""
    return held.sub_(q.mul_(held.sum(-1, keepdim=True)))


def _column(alpha: float | Tensor, like: Tensor) -> float | Tensor:
    return alpha.detach().to(like.dtype).unsqueeze(-1) if isinstance(alpha, Tensor) else alpha


def _is_zero(alpha: float | Tensor) -> bool:
    return not isinstance(alpha, Tensor) and alpha == 0


def _mixture(first: Tensor, second: Tensor, share: float | Tensor) -> Tensor:
    """share·first + (1−share)·second `[n, V]`, and the least normal number where both underflow."""
    mixed = torch.lerp(second, first, share)
    return mixed.clamp_min_(torch.finfo(first.dtype).tiny)
