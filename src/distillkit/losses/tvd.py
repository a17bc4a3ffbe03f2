"""Total variation distance as a loss."""

from torch import Tensor

from distillkit import divergences
from distillkit.losses.token import TokenLoss


class TotalVariation(TokenLoss):
    """Total variation distance, ½ Σ |p − q|: 1 minus the expected acceptance rate of the student as a draft model.

    Wen et al. 2023 (f-distill), arXiv 2307.15190.
    """

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """Returns `divergences.tvd`."""
        return divergences.tvd(logp, logq)

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `divergences.tvd_and_grad`."""
        return divergences.tvd_and_grad(logp, logq)
