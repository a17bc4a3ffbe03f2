"""Kullback-Leibler divergences as losses."""

from torch import Tensor

from distillkit import divergences
from distillkit.losses.token import TokenLoss, checked_share
from distillkit.types import Reduction


class ForwardKL(TokenLoss):
    """Forward KL, KL(p‖q) = Σ p (log p − log q): the student covers all that the teacher would generate.

    Hinton et al. 2015, arXiv 1503.02531. By default the temperature is 1 and the loss is not multiplied by τ².
    """

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """Returns `divergences.kl`."""
        return divergences.kl(logp, logq)

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `divergences.kl_and_grad`."""
        return divergences.kl_and_grad(logp, logq)


class ReverseKL(TokenLoss):
    """Reverse KL, KL(q‖p) = Σ q (log q − log p): the student avoids what the teacher would not generate.

    Gu et al. 2023 (MiniLLM), arXiv 2306.08543. Computed exactly over the vocabulary instead of by policy gradient.
    """

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """Returns `divergences.rkl`."""
        return divergences.rkl(logp, logq)

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `divergences.rkl_and_grad`."""
        return divergences.rkl_and_grad(logp, logq)


class JeffreysKL(TokenLoss):
    """Weighted symmetric KL, (1−λ)·KL(p‖q) + λ·KL(q‖p).

    A baseline of Ko et al. 2024 (DistiLLM), arXiv 2402.03898.

    Args:
        weight: λ in [0, 1], weight of the reverse KL; 0 is ForwardKL, 1 is ReverseKL.
        reduction: Weighting of positions: `sequence_mean` or `token_mean`.
        temperature: τ > 0, divides both models' logits before the softmax.
        rescale: Whether the loss is multiplied by τ².

    Raises:
        ConfigError: If `weight` is outside [0, 1].
    """

    def __init__(
        self,
        weight: float = 0.5,
        reduction: Reduction = "sequence_mean",
        temperature: float = 1.0,
        rescale: bool = False,
    ) -> None:
        super().__init__(reduction, temperature, rescale)
        self.weight = checked_share("JeffreysKL.weight", weight, upper_closed=True)

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """Returns `divergences.jeffreys`."""
        return divergences.jeffreys(logp, logq, self.weight)

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `divergences.jeffreys_and_grad`."""
        return divergences.jeffreys_and_grad(logp, logq, self.weight)
