"""Generalized Jensen-Shannon divergence.

Letters: N positions, V vocabulary.
"""

from torch import Tensor

from distillkit.divergences.kullback_leibler import kl
from distillkit.divergences.numerics import ValueAndGrad, clamp_log_zero_, dot, log_mixture, mixture


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


def jsd_and_grad(logp: Tensor, logq: Tensor, beta: float = 0.5) -> ValueAndGrad:
    """Generalized Jensen-Shannon divergence: the gradient is (1−b)·q·(log(q/m) − KL(q‖m)).

    Args:
        logp: `[n, V]` teacher log-probabilities; overwritten.
        logq: `[n, V]` student log-probabilities; overwritten.
        beta: b in (0, 1), the teacher's share of the mixture m.

    Returns:
        `[n]` nats and `[n, V]`.
    """
    clamp_log_zero_(logp, logq)
    p, q = logp.exp(), logq.exp()
    log_m = mixture(p, q, beta).log_()
    teacher_term = dot(p, logp.sub_(log_m))
    terms = logq.sub_(log_m).mul_(q)
    student_term = terms.sum(-1)
    grad = terms.sub_(q.mul_(student_term[:, None])).mul_(1.0 - beta)
    return beta * teacher_term + (1.0 - beta) * student_term, grad
