"""Concrete score distillation: differences of logits between all pairs of tokens."""

from typing import Literal

import torch
from torch import Tensor

from distillkit import TokenLoss
from distillkit.errors import ConfigError
from distillkit.types import Reduction

Weights = Literal["teacher", "student", "uniform"]

_LOWEST = -1e4
"""Lower bound of log-probabilities, in place of log 0: its square still fits in float32."""


class ConcreteScore(TokenLoss):
    """Concrete score distillation, ½ Σ_y Σ_x w1(y)·w2(x)·(d(x) − d(y))² with d = log q − log p.

    d(x) − d(y) is the student's difference of two logits minus the teacher's, so adding a constant to all logits
    changes nothing. As w1 and w2 sum to 1, the double sum is ½·(Var1 d + Var2 d + (E1 d − E2 d)²), which takes time
    linear in the vocabulary. The weights carry no gradient.

    Kim et al. 2025, arXiv 2509.25837, equation 8 and theorem 3.

    Args:
        first: w1, the distribution that weights y: `teacher`, `student` or `uniform`.
        second: w2, the distribution that weights x. In the paper (student, student) is the most mode-seeking;
            (uniform, student) and (teacher, student) keep more of the teacher's spread.
        reduction: Weighting of positions: `sequence_mean` averages over responses, `token_mean` over tokens.
        temperature: τ > 0, divides both models' logits before the softmax.
        rescale: Whether the loss is multiplied by τ².

    Raises:
        ConfigError: If a weight is none of the three.
    """

    def __init__(
        self,
        first: Weights = "student",
        second: Weights = "student",
        reduction: Reduction = "sequence_mean",
        temperature: float = 1.0,
        rescale: bool = False,
    ) -> None:
        super().__init__(reduction, temperature, rescale)
        for name, weights in (("first", first), ("second", second)):
            if weights not in ("teacher", "student", "uniform"):
                raise ConfigError(f"ConcreteScore.{name} must be teacher, student or uniform, got {weights!r}.")
        self.first, self.second = first, second

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """`[n]` squared nats."""
        logp, logq = logp.clamp_min(_LOWEST), logq.clamp_min(_LOWEST)
        residual, w1, w2 = self._parts(logp, logq)
        mean1, mean2 = _mean(w1, residual), _mean(w2, residual)
        spread = _mean(w1, (residual - mean1).square()) + _mean(w2, (residual - mean2).square())
        return 0.5 * (spread + (mean1 - mean2).square()).squeeze(-1)

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """The value, and w1·(d − E2 d) + w2·(d − E1 d): it sums to 0, so that it is the logits' as well as log q's."""
        logp, low = logp.clamp_min_(_LOWEST), logq <= _LOWEST
        logq = logq.clamp_min_(_LOWEST)
        residual, w1, w2 = self._parts(logp, logq)
        mean1, mean2 = _mean(w1, residual), _mean(w2, residual)
        from1, from2 = residual - mean1, residual - mean2
        spread = _mean(w1, from1.square()) + _mean(w2, from2.square())
        value = 0.5 * (spread + (mean1 - mean2).square()).squeeze(-1)
        grad = from2.mul_(w1).add_(from1.mul_(w2)).masked_fill_(low, 0.0)
        return value, grad.sub_(logq.exp_().mul_(grad.sum(-1, keepdim=True)))

    def _parts(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """d, w1 and w2, all `[n, V]`."""
        # The uniform distribution is over the tokens that at least one of the models can generate.
        possible = ((logp > _LOWEST) | (logq.detach() > _LOWEST)).to(logp)
        weights = {"teacher": lambda: logp.exp(), "student": lambda: logq.detach().exp(), "uniform": lambda: possible}
        w1, w2 = (_normalised(weights[name]()) for name in (self.first, self.second))
        return logq - logp, w1, w2


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    return (weights * values).sum(-1, keepdim=True)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
