"""TAID: KL from a distribution between the student's and the teacher's."""

from collections.abc import Mapping

from torch import Tensor

from distillkit import TokenLoss, divergences
from distillkit.errors import check_range
from distillkit.interfaces import Schedule
from distillkit.types import Reduction
from distillkit_taid.schedule import Interpolation


class TAID(TokenLoss):
    """KL(p_t ‖ q) with p_t = softmax((1−t)·z_q + t·z_p), logits between the student's (detached) and the teacher's.

    At t = 0 the loss is 0, at t = 1 it is ForwardKL. t grows during training, see `Interpolation`.

    Shing et al. 2025, arXiv 2501.16937, equations 2 and 3.

    Args:
        t: Weight of the teacher's logits in [0, 1], a number or a schedule; None is `Interpolation()`.
        reduction: Weighting of positions: `sequence_mean` averages over responses, `token_mean` over tokens.
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
        check_range("TAID.t", self._fixed, 0, 1)

    def schedules(self) -> Mapping[str, Schedule]:
        """The schedule of t."""
        return {} if self.schedule is None else {"t": self.schedule}

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """`[n]` nats."""
        return divergences.kl(self._between(logp, logq.detach()), logq)

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """The value, and q − p_t."""
        return divergences.kl_and_grad(self._between(logp, logq), logq)

    def _between(self, logp: Tensor, logq: Tensor) -> Tensor:
        """`[n, V]` log p_t."""
        t = self._fixed if self.schedule is None else self.schedule.value.to(logp)
        # A token that only one model excludes would give −∞·0 at the ends: −1e4 excludes it in effect.
        lowest = -1e4
        mixed = (1.0 - t) * logq.clamp_min(lowest) + t * logp.clamp_min(lowest)
        excluded = (logp <= lowest) & (logq <= lowest)
        return mixed.masked_fill(excluded, -float("inf")).log_softmax(-1)
