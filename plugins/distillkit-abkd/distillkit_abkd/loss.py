"""The α-β divergence as a token loss."""

from torch import Tensor

from distillkit import TokenLoss
from distillkit.errors import ConfigError
from distillkit.types import Reduction


class AlphaBeta(TokenLoss):
    """α-β divergence, Σ [α/(α+β)·p^(α+β) + β/(α+β)·q^(α+β) − p^α·q^β] / (α·β).

    It tends to KL(p‖q) as (α, β) → (1, 0) and to KL(q‖p) as (α, β) → (0, 1); at (1, 1) it is half the squared distance,
    at (½, ½) four times the squared Hellinger distance. Wang et al. 2025 (ABKD), arXiv 2505.04560; the family is due to
    Cichocki et al. 2011. Here α and β are above 0; the limits at 0 are ForwardKL and ReverseKL.

    Args:
        alpha: α > 0, exponent of the teacher's probabilities.
        beta: β > 0, exponent of the student's probabilities.
        reduction: Weighting of positions: `sequence_mean` averages over responses, `token_mean` over tokens.
        temperature: τ > 0, divides both models' logits before the softmax.
        rescale: Whether the loss is multiplied by τ².

    Raises:
        ConfigError: If `alpha` or `beta` is not above 0.
    """

    def __init__(
        self,
        alpha: float = 0.2,
        beta: float = 0.7,
        reduction: Reduction = "sequence_mean",
        temperature: float = 1.0,
        rescale: bool = False,
    ) -> None:
        super().__init__(reduction, temperature, rescale)
        if not (alpha > 0 and beta > 0):
            raise ConfigError(
                f"AlphaBeta.alpha and .beta must be above 0, got {alpha} and {beta}. "
                "At the ends use ForwardKL or ReverseKL."
            )
        self.alpha, self.beta = alpha, beta

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """`[n]` nats."""
        total = self.alpha + self.beta
        powers = self.alpha / total * (total * logp).exp() + self.beta / total * (total * logq).exp()
        return (powers - (self.alpha * logp + self.beta * logq).exp()).sum(-1) / (self.alpha * self.beta)
