"""Reverse KL, estimated from the tokens that the student sampled."""

import torch
from torch import Tensor

from distillkit.chunked import target_log_probs
from distillkit.interfaces import Loss
from distillkit.losses import checked_reduction, count_units, position_weights
from distillkit.types import Batch, LossOutput, Reduction, Scores


class SampledReverseKL(Loss):
    """Reverse KL by single samples: the value log q(y_t) − log p(y_t) at each position, the gradient of REINFORCE.

    The gradient is (log q(y_t) − log p(y_t))·∇ log q(y_t), with the factor detached. Over tokens y_t sampled from q its
    mean is the gradient of KL(q‖p) at that position, without the effect of a token on later ones (a discount of 0). It
    needs no sum over the vocabulary, only the log-probabilities of the tokens, and has the variance of one sample.

    Lu and Thinking Machines Lab 2025, "On-Policy Distillation"; Williams 1992 for the estimate.

    Args:
        reduction: Weighting of positions: `sequence_mean` averages over responses, `token_mean` over tokens.

    Raises:
        ConfigError: If `reduction` is unknown.
    """

    def __init__(self, reduction: Reduction = "token_mean") -> None:
        super().__init__()
        self.reduction = checked_reduction("SampledReverseKL", reduction)

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """Σ weight · (log q − log p) over the batch's positions."""
        assert teacher is not None, "SampledReverseKL needs a teacher"
        logq = target_log_probs(student, batch.targets)
        with torch.no_grad():
            logp = target_log_probs(teacher, batch.targets, student.slicing)
            gap = logq - logp
        surrogate = gap * (logq - logq.detach()) + gap  # its value is the gap, its gradient that of REINFORCE
        total = (position_weights(batch, self.reduction).to(surrogate) * surrogate).sum()
        return LossOutput(total, self.units(batch).to(total.device, non_blocking=True), {"sampled_reverse_kl": gap})

    def units(self, batch: Batch) -> Tensor:
        """Number of responses or of positions, depending on `reduction`."""
        return count_units(batch.lengths, self.reduction)
