"""Skew KL divergences as losses (DistiLLM)."""

from torch import Tensor

from distillkit import divergences
from distillkit.losses.token import TokenLoss, checked_share
from distillkit.types import Reduction


class SkewKL(TokenLoss):
    """Skew KL, KL(p ‖ α·p + (1−α)·q).

    Ko et al. 2024 (DistiLLM), arXiv 2402.03898, equation 5. α is the teacher's share of the mixture; 0 is ForwardKL.

    Args:
        alpha: α in [0, 1).
        reduction: Weighting of positions: `sequence_mean` or `token_mean`.
        temperature: τ > 0, divides both models' logits before the softmax.
        rescale: Whether the loss is multiplied by τ².

    Raises:
        ConfigError: If `alpha` is outside [0, 1).
    """

    def __init__(
        self,
        alpha: float = 0.1,
        reduction: Reduction = "sequence_mean",
        temperature: float = 1.0,
        rescale: bool = False,
    ) -> None:
        super().__init__(reduction, temperature, rescale)
        self.alpha = checked_share("SkewKL.alpha", alpha)

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """Returns `divergences.skl`."""
        return divergences.skl(logp, logq, self.alpha)

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `divergences.skl_and_grad`."""
        return divergences.skl_and_grad(logp, logq, self.alpha)


class SkewReverseKL(TokenLoss):
    """Skew reverse KL, KL(q ‖ (1−α)·p + α·q).

    Ko et al. 2024 (DistiLLM), arXiv 2402.03898, equation 6. α is the student's share of the mixture; 0 is ReverseKL.

    Args:
        alpha: α in [0, 1).
        detach_mixture: Whether the gradient stops at the student's half of the mixture, as in the code released with
            DistiLLM-2; the value is the same.
        reduction: Weighting of positions: `sequence_mean` or `token_mean`.
        temperature: τ > 0, divides both models' logits before the softmax.
        rescale: Whether the loss is multiplied by τ².

    Raises:
        ConfigError: If `alpha` is outside [0, 1).
    """

    def __init__(
        self,
        alpha: float = 0.1,
        detach_mixture: bool = False,
        reduction: Reduction = "sequence_mean",
        temperature: float = 1.0,
        rescale: bool = False,
    ) -> None:
        super().__init__(reduction, temperature, rescale)
        self.alpha = checked_share("SkewReverseKL.alpha", alpha)
        self.detach_mixture = detach_mixture

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """Returns `divergences.srkl`."""
        return divergences.srkl(logp, logq, self.alpha, self.detach_mixture)

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `divergences.srkl_and_grad`."""
        return divergences.srkl_and_grad(logp, logq, self.alpha, self.detach_mixture)
