"""Cross-entropy of the responses: supervised fine-tuning, and sequence-level distillation on a teacher's responses."""

from typing import ClassVar

from torch import Tensor

from distillkit.interfaces import Loss
from distillkit.losses.slicing import sliced_total, slices
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
        weights = position_weights(batch, self.reduction)

        def part_of_total(_: Tensor | None, logq: Tensor, part: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
            values = -logq.gather(-1, batch.targets[part, None]).squeeze(-1)
            return (values * weights[part].to(values.dtype)).sum(), (values.detach(),)

        parts = slices(student.hidden.shape[0], student.vocab)
        total, (values,) = sliced_total(part_of_total, student, None, parts)
        return LossOutput(total, self.units(batch).to(total.device), {"nll": values})

    def units(self, batch: Batch) -> Tensor:
        """Number of responses or of positions, as `reduction` says."""
        return count_units(batch.lengths, self.reduction)
