"""Cross-entropy of the responses: supervised fine-tuning, and sequence-level distillation on a teacher's responses."""

from typing import ClassVar

from torch import Tensor

from distillkit import gradients
from distillkit.interfaces import Loss
from distillkit.losses.slicing import Sliced, own_log_probs
from distillkit.losses.token import checked_reduction, count_units, position_weights
from distillkit.types import Batch, LossOutput, Reduction, Scores


class CrossEntropy(Loss):
    """Cross-entropy −log q(y) of the response's own tokens. It reads no teacher.

    On a data set's responses it is supervised fine-tuning; on a teacher's it is sequence-level knowledge distillation
    (Kim and Rush 2016, arXiv 1606.07947).

    Args:
        reduction: How positions are weighed.
    """

    needs_teacher: ClassVar[bool] = False

    def __init__(self, reduction: Reduction = "sequence_mean") -> None:
        super().__init__()
        self.reduction = checked_reduction(type(self).__name__, reduction)

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """Σ weight · −log q(y) over the batch's positions."""

        def values(_: None, logq: Tensor, targets: Tensor) -> Tensor:
            return -own_log_probs(logq, targets)

        def gradient(_: None, logq: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return gradients.cross_entropy(logq, targets)

        sliced = Sliced(self, student, None, values, gradient)
        weights = position_weights(batch, self.reduction)
        total, (nll,) = sliced.sum(weights, extra=lambda part, *_: ((batch.targets[part],), ()))
        return LossOutput(total, self.units(batch).to(total.device), {"nll": nll})

    def units(self, batch: Batch) -> Tensor:
        """Number of responses or of positions, as `reduction` says."""
        return count_units(batch.lengths, self.reduction)
