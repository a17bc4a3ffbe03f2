"""KL from a distribution between the student's and the teacher's."""

from torch import Tensor

from distillkit import TokenLoss, divergences, gradients
from distillkit.errors import ConfigError
from distillkit.interfaces import Schedule
from distillkit.types import Reduction
from distillkit_taid.schedule import Interpolation


class TAID(TokenLoss):
    """KL(p_t ‖ q) with p_t = softmax((1−t)·z_q + t·z_p), logits between the student's, held, and the teacher's.

    At t = 0 there is nothing to learn, at t = 1 it is ForwardKL. t grows while training, see `Interpolation`.

    Shing et al. 2025, arXiv 2501.16937, equations 2 and 3.

    Args:
        t: t in [0, 1], a number or a schedule; None is `Interpolation()`.
        reduction: How positions are weighed.
        temperature: τ > 0, divides both models' logits before the softmax.
        rescale: Whether the loss is multiplied by τ².

    Raises:
        ConfigError: If `t` is a number outside [0, 1].
    """

    def __init__(
        self,
        t: float | Schedule | None = None,
        reduction: Reduction = "sequence_mean",
        temperature: float = 1.0,
        rescale: bool = False,
    ) -> None:
        super().__init__(reduction, temperature, rescale)
        self.schedule = Interpolation() if t is None else t if isinstance(t, Schedule) else None
        self._fixed = 1.0 if self.schedule is not None else float(t)  # type: ignore[arg-type]
        if not 0 <= self._fixed <= 1:
            raise ConfigError(f"TAID.t must lie in [0, 1], got {t}.")

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """`[n]` nats."""
        return divergences.kl(self._between(logp, logq.detach()), logq)

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """The value, and q − p_t."""
        return gradients.kl(self._between(logp, logq), logq)

    def _between(self, logp: Tensor, logq: Tensor) -> Tensor:
        """`[n, V]` log p_t."""
        t = self._fixed if self.schedule is None else self.schedule.value.to(logp)
        # A token that one of the two excludes would be −∞·0 at the ends: it is as good as excluded.
        lowest = -1e4
        mixed = (1.0 - t) * logq.clamp_min(lowest) + t * logp.clamp_min(lowest)
        excluded = (logp <= lowest) & (logq <= lowest)
        return mixed.masked_fill(excluded, -float("inf")).log_softmax(-1)
