"""Cross-entropy: supervised fine-tuning, or sequence-level distillation on a teacher's responses."""

from typing import ClassVar

from torch import Tensor

from distillkit import divergences
from distillkit.chunked.evaluate import PositionLoss, chunked_sum, gather_targets
from distillkit.interfaces import Loss
from distillkit.losses.token import checked_reduction, count_units, position_weights
from distillkit.types import Batch, LossOutput, Reduction, Scores


class _TargetCrossEntropy(PositionLoss):
    """Cross-entropy −log q(y) at each position; its column is the target token ids y."""

    has_closed_form = True

    def values(self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor) -> Tensor:
        (targets,) = columns
        return -gather_targets(student_logp, targets)

    def values_and_grad(
        self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        (targets,) = columns
        return divergences.cross_entropy_and_grad(student_logp, targets)


_TARGET_CROSS_ENTROPY = _TargetCrossEntropy()


class CrossEntropy(Loss):
    """Cross-entropy −log q(y) of the response's tokens. It needs no teacher.

    On a data set's responses this is supervised fine-tuning; on a teacher's responses it is sequence-level knowledge
    distillation (Kim and Rush 2016, arXiv 1606.07947).

    Args:
        reduction: Weighting of positions: `sequence_mean` or `token_mean`.
    """

    needs_teacher: ClassVar[bool] = False

    def __init__(self, reduction: Reduction = "sequence_mean") -> None:
        super().__init__()
        self.reduction = checked_reduction(type(self).__name__, reduction)

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """Returns Σ weight · −log q(y) over the batch's positions."""
        weights = position_weights(batch, self.reduction)
        total, nll = chunked_sum(_TARGET_CROSS_ENTROPY, student, None, weights, (batch.targets,))
        return LossOutput(total, self.units(batch).to(total.device, non_blocking=True), {"nll": nll})

    def units(self, batch: Batch) -> Tensor:
        """Returns the number of responses or positions, depending on `reduction`."""
        return count_units(batch.lengths, self.reduction)
