"""Adaptive KL: forward and reverse KL, mixed by where the two models differ."""

from torch import Tensor

from distillkit import TokenLoss, divergences
from distillkit.errors import ConfigError
from distillkit.types import Reduction


class AdaptiveKL(TokenLoss):
    """Adaptive KL, g_head/(g_head + g_tail)·KL(p‖q) + g_tail/(g_head + g_tail)·KL(q‖p) at each position.

    The head is the teacher's most likely tokens with a total mass of at most μ, and at least one token; the tail is all
    other tokens; g is Σ |p − q| over head or tail. So KL raises a head that is too light, and reverse KL lowers a tail
    that is too heavy. The shares carry no gradient.

    Wu et al. 2024, arXiv 2404.02657, section 4.3 and the authors' code.

    Args:
        mu: μ in (0, 1), the teacher's mass in the head.
        reduction: Weighting of positions: `sequence_mean` averages over responses, `token_mean` over tokens.
        temperature: τ > 0, divides both models' logits before the softmax.
        rescale: Whether the loss is multiplied by τ².

    Raises:
        ConfigError: If `mu` is outside (0, 1).
    """

    def __init__(
        self,
        mu: float = 0.5,
        reduction: Reduction = "sequence_mean",
        temperature: float = 1.0,
        rescale: bool = False,
    ) -> None:
        super().__init__(reduction, temperature, rescale)
        if not 0 < mu < 1:
            raise ConfigError(f"AdaptiveKL.mu must lie in (0, 1), got {mu}. At the ends use ForwardKL or ReverseKL.")
        self.mu = mu

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """`[n]` nats."""
        head = self.head_share(logp, logq.detach())
        return head * divergences.kl(logp, logq) + (1.0 - head) * divergences.rkl(logp, logq)

    def head_share(self, logp: Tensor, logq: Tensor) -> Tensor:
        """`[n]` share of the gap Σ |p − q| that lies in the teacher's head; ½ where there is no gap."""
        p, order = logp.exp().sort(dim=-1, descending=True, stable=True)
        gap = (p - logq.exp().gather(-1, order)).abs()
        tail = p.cumsum(-1) > self.mu
        tail[:, 0] = False
        total = gap.sum(-1)
        share = gap.masked_fill(tail, 0.0).sum(-1) / total
        return share.where(total > 0, 0.5)
