"""Differences of logits between all pairs of tokens."""

from typing import Literal

import torch
from torch import Tensor

from distillkit import TokenLoss
from distillkit.errors import ConfigError
from distillkit.types import Reduction

Weights = Literal["teacher", "student", "uniform"]

_LOWEST = -1e4
"""Stands for the logarithm of 0, and of what is nearly that: a square of it is a float32."""


class ConcreteScore(TokenLoss):
    """Concrete score distillation, ½ Σ_y Σ_x w1(y)·w2(x)·(d(x) − d(y))² with d = log q − log p.

    d(x) − d(y) is by how much the student's difference of two logits is not the teacher's: adding a number to all
    logits changes nothing. As w1 and w2 sum to 1, the double sum is ½·(Var1 d + Var2 d + (E1 d − E2 d)²), which takes
    time linear in the vocabulary. The weights carry no gradient.

    Kim et al. 2025, arXiv 2509.25837, equation 8 and theorem 3.

    Args:
        first: w1, the distribution by which y is weighed: the teacher's, the student's, or the uniform one.
        second: w2, that of x. In the paper (student, student) seeks modes most, (uniform, student) and
            (teacher, student) keep more of the teacher's spread.
        reduction: How positions are weighed.
        temperature: τ > 0, divides both models' logits before the softmax.
        rescale: Whether the loss is multiplied by τ².

    Raises:
        ConfigError: If a weight is none of these.
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
        residual, one, two = self._parts(logp, logq)
        mean1, mean2 = _mean(one, residual), _mean(two, residual)
        spread = _mean(one, (residual - mean1).square()) + _mean(two, (residual - mean2).square())
        return 0.5 * (spread + (mean1 - mean2).square()).squeeze(-1)

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """The value, and w1·(d − E2 d) + w2·(d − E1 d): it sums to 0, so that it is the logits' as well as log q's."""
        logp, low = logp.clamp_min_(_LOWEST), logq <= _LOWEST
        logq = logq.clamp_min_(_LOWEST)
        residual, one, two = self._parts(logp, logq)
        mean1, mean2 = _mean(one, residual), _mean(two, residual)
        from1, from2 = residual - mean1, residual - mean2
        spread = _mean(one, from1.square()) + _mean(two, from2.square())
        value = 0.5 * (spread + (mean1 - mean2).square()).squeeze(-1)
        held = from2.mul_(one).add_(from1.mul_(two)).masked_fill_(low, 0.0)
        return value, held.sub_(logq.exp_().mul_(held.sum(-1, keepdim=True)))

    def _parts(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """d, w1 and w2, all `[n, V]`."""
        # The uniform distribution is that over the tokens that either model may write.
        written = ((logp > _LOWEST) | (logq.detach() > _LOWEST)).to(logp)
        made = {"teacher": lambda: logp.exp(), "student": lambda: logq.detach().exp(), "uniform": lambda: written}
        one, two = (_normalised(made[name]()) for name in (self.first, self.second))
        return logq - logp, one, two


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    return (weights * values).sum(-1, keepdim=True)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
