"""The contrastive loss of DistiLLM-2.

Letters: n positions of one side's responses, R their rows.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distillkit import divergences
from distillkit.chunked.evaluate import ChunkedLoss, PositionLoss, SliceColumns, row_slices
from distillkit.chunked.likelihood import target_log_probs
from distillkit.devices.streams import send
from distillkit.interfaces import Loss, Schedule
from distillkit.losses.token import checked_reduction, checked_share, count_units, position_weights, side_of
from distillkit.schedules import AdaptiveAlpha, Constant, Linear
from distillkit.types import Batch, LossOutput, Progress, Reduction, Scores, Summary

_SIDES = ("teacher", "student")


class _SkewKL(PositionLoss):
    """SKL with the skew α of each position, `[n]`, as its column."""

    has_closed_form = True

    def values(self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor) -> Tensor:
        assert teacher_logp is not None
        (alpha,) = columns
        return divergences.skl(teacher_logp, student_logp, alpha)

    def values_and_grad(
        self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert teacher_logp is not None
        (alpha,) = columns
        return divergences.skl_and_grad(teacher_logp, student_logp, alpha)


class _SkewReverseKL(PositionLoss):
    """SRKL with the skew α of each position, `[n]`, as its column."""

    has_closed_form = True

    def __init__(self, detach_mixture: bool) -> None:
        self.detach_mixture = detach_mixture

    def values(self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor) -> Tensor:
        assert teacher_logp is not None
        (alpha,) = columns
        return divergences.srkl(teacher_logp, student_logp, alpha, self.detach_mixture)

    def values_and_grad(
        self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert teacher_logp is not None
        (alpha,) = columns
        return divergences.srkl_and_grad(teacher_logp, student_logp, alpha, self.detach_mixture)


class DistiLLM2(Loss):
    """Skew KL pulls the student up on the teacher's responses, skew reverse KL pushes it down on its own responses.

    L = (1−β)·SKL_α(y_t) + β·SRKL_α(y_s). Each term is a mean over its own responses in the global batch. α is set per
    row (`AdaptiveAlpha`, with a separate reference gap for each term), and β grows during training. Responses that the
    teacher and the student generated together, those of a stronger model and those of the data set count as the
    teacher's.

    Ko et al. 2025 (DistiLLM-2), arXiv 2503.07067, equation 7 and section 3.3. The code released with the paper computes
    (2−b)·SKL + b·SRKL with b from 1 to 1.5, which is 2·L with β = b/2, and leaves both schedules switched off.

    Args:
        alpha: Skew α in [0, 1): a number, or a schedule that sets it per row. None is `AdaptiveAlpha()`.
        beta: Weight β in [0, 1] of the student's term: a number or a schedule. None is linear from 0.5 to 0.75 over the
            first half of training.
        detach_mixture: Whether the gradient stops at the student's half of the SRKL mixture, as in the released code.
        reduction: Weighting of positions: `sequence_mean` or `token_mean`.

    Raises:
        ConfigError: If a number is outside its range.
    """

    contrasts_sides = True

    def __init__(
        self,
        alpha: Schedule | float | None = None,
        beta: Schedule | float | None = None,
        detach_mixture: bool = False,
        reduction: Reduction = "sequence_mean",
    ) -> None:
        super().__init__()
        if alpha is None:
            alpha = AdaptiveAlpha()
        elif not isinstance(alpha, Schedule):
            alpha = Constant(checked_share("DistiLLM2.alpha", alpha))
        if beta is None:
            beta = Linear(start=0.5, end=0.75, until=0.5)
        elif not isinstance(beta, Schedule):
            beta = Constant(checked_share("DistiLLM2.beta", beta, upper_closed=True))
        self.alpha_teacher, self.alpha_student, self.beta = alpha, copy.deepcopy(alpha), beta
        self.detach_mixture = detach_mixture
        self.reduction = checked_reduction(type(self).__name__, reduction)
        self._divergences = {"teacher": _SkewKL(), "student": _SkewReverseKL(detach_mixture)}

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """Returns both terms as components, `[2]`."""
        assert teacher is not None, "DistiLLM2 needs a teacher"
        beta = self.beta.value
        totals, metrics = [], {"beta": beta.detach().clone()}
        for side, weight in zip(_SIDES, (1.0 - beta, beta), strict=True):
            total, side_metrics = self._term(side, student, teacher, batch)
            totals.append(weight.to(total) * total)
            metrics |= {f"{name}_{side}": value for name, value in side_metrics.items()}
        return LossOutput(torch.stack(totals), self.units(batch).to(totals[0].device, non_blocking=True), metrics)

    def units(self, batch: Batch) -> Tensor:
        """Returns the units of the teacher's and of the student's responses, `[2]`."""
        return torch.stack([count_units(_lengths(batch, side), self.reduction) for side in _SIDES])

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Updates β, and the α of each side with the gap of that side."""
        self.beta.update(progress, metrics)
        for side, alpha in zip(_SIDES, (self.alpha_teacher, self.alpha_student), strict=True):
            name = f"gap_{side}"
            alpha.update(progress, {"gap": metrics[name]} if name in metrics else {})

    def _term(self, side: str, student: Scores, teacher: Scores, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the total of one side, and the metrics of its positions and rows."""
        index = _positions(batch, side)
        student, teacher = student.select(index), teacher.select(index)
        targets, weights = batch.targets[index], position_weights(batch, self.reduction)[index]
        schedule = self.alpha_teacher if side == "teacher" else self.alpha_student
        rows = _SideRows.of(side, [length for length in _lengths(batch, side) if length], index.device)
        chunked = ChunkedLoss(self._divergences[side], student, teacher)
        parts = row_slices(rows.lengths, chunked.max_positions)
        if parts is not None:
            row_skews = _RowSkews(rows, schedule)
            total, values = chunked.sum(weights, SliceColumns(targets, parts, row_skews.compute))
            gap, alpha = torch.cat(row_skews.gaps), torch.cat(row_skews.alphas)
        else:  # a row is longer than a slice: a first pass computes the gaps of all rows
            with torch.no_grad():
                logp, logq = (target_log_probs(scores, targets, student.slicing) for scores in (teacher, student))
            gap = row_gaps(side, logp, logq, rows.row_index, len(rows.lengths))
            alpha = schedule.for_rows(gap)
            total, values = chunked.sum(weights, (alpha[rows.row_index],))
        return total, {"divergence": values, "gap": gap, "alpha": alpha, **schedule.metrics()}


@dataclass(frozen=True)
class _SideRows:
    """Rows of one side that have a position.

    Args:
        side: Side of the rows, `teacher` or `student`.
        lengths: Number of positions of each row.
        host_row_index: `[n]` row of each position, from 0, on the host.
        row_index: The same on the device of the scores.
    """

    side: str
    lengths: list[int]
    host_row_index: Tensor
    row_index: Tensor

    @classmethod
    def of(cls, side: str, lengths: list[int], device: torch.device) -> "_SideRows":
        """Returns the rows with these lengths."""
        row_index = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.long))
        return cls(side, lengths, row_index, send(row_index, device))


class _RowSkews:
    """Computes gap and skew of the rows of a slice from the slice's own log-probabilities.

    Args:
        rows: All rows of the side; a slice contains whole rows.
        schedule: Sets α from the gap.
    """

    def __init__(self, rows: _SideRows, schedule: Schedule) -> None:
        self.rows, self.schedule = rows, schedule
        self.gaps: list[Tensor] = []
        self.alphas: list[Tensor] = []

    def compute(self, part: slice, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, ...]:
        """Returns α of each position of a slice, and stores gap and α of its rows."""
        slice_rows = torch.unique_consecutive(self.rows.host_row_index[part])
        local_index = self.rows.row_index[part] - (int(slice_rows[0]) if len(slice_rows) else 0)
        gap = row_gaps(self.rows.side, teacher_logp, student_logp, local_index, len(slice_rows))
        alpha = self.schedule.for_rows(gap)
        self.gaps.append(gap)
        self.alphas.append(alpha)
        return (alpha[local_index],)


def row_gaps(side: str, logp: Tensor, logq: Tensor, row_index: Tensor, num_rows: int) -> Tensor:
    """Returns the gap g of each row, `[R]`: its likelihood under the model of its side, minus that under the other.

    Args:
        side: Side of all rows, `teacher` or `student`.
        logp: `[n]` teacher log-probabilities of the target tokens.
        logq: `[n]` student log-probabilities of the target tokens.
        row_index: `[n]` row of each position.
        num_rows: R.
    """
    counts = logp.new_zeros(num_rows).index_add(0, row_index, torch.ones_like(logp)).clamp_min(1)
    p, q = ((logp.new_zeros(num_rows).index_add(0, row_index, values) / counts).exp() for values in (logp, logq))
    return p - q if side == "teacher" else q - p


def _lengths(batch: Batch, side: str) -> tuple[int, ...]:
    return tuple(length for length, writer in zip(batch.lengths, batch.writer, strict=True) if side_of(writer) == side)


def _positions(batch: Batch, side: str) -> Tensor:
    """Returns the indices `[n]`, among the N positions, of the rows of `side`; computed on the host."""
    starts = torch.tensor((0, *batch.lengths)).cumsum(0).tolist()
    ranges = [
        torch.arange(start, start + length)
        for start, length, writer in zip(starts, batch.lengths, batch.writer, strict=False)
        if side_of(writer) == side
    ]
    index = torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.long)
    return send(index, batch.rows.device)
