"""The contrastive loss of DistiLLM-2."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from distillkit import divergences, gradients
from distillkit.interfaces import Loss, Schedule
from distillkit.losses.likelihood import target_log_probs
from distillkit.losses.slicing import Sliced, row_slices
from distillkit.losses.token import checked_reduction, checked_share, count_units, position_weights, side_of
from distillkit.schedules import AdaptiveAlpha, Constant, Linear
from distillkit.types import Batch, LossOutput, Progress, Reduction, Scores, Summary

_SIDES = ("teacher", "student")


class DistiLLM2(Loss):
    """Skew KL pulls the student up on the teacher's responses, skew reverse KL pushes it down on its own.

    L = (1−β)·SKL_α(y_t) + β·SRKL_α(y_s), each term a mean over the global batch of its own responses. α is a number per
    row (`AdaptiveAlpha`, with a reference gap of its own for each term), β grows with training. Responses that the
    teacher and the student wrote together, a stronger model's and the data's stand in the place of the teacher's.

    Ko et al. 2025 (DistiLLM-2), arXiv 2503.07067, equation 7 and section 3.3. The code released with the paper computes
    (2−b)·SKL + b·SRKL with b from 1 to 1.5, which is 2·L with β = b/2, and leaves both schedules switched off.

    Args:
        alpha: Skew α in [0, 1): a number, or a schedule that gives one per row. None is `AdaptiveAlpha()`.
        beta: Weight β in [0, 1] of the student's term: a number or a schedule. None is linear from 0.5 to 0.75 over the
            first half of training.
        detach_mixture: Whether the gradient stops at the student's half of the SRKL mixture, as in the released code.
        reduction: How positions are weighed.

    Raises:
        ConfigError: If a number is outside its range.
    """

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

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """Both terms as components, `[2]`."""
        assert teacher is not None, "DistiLLM2 needs a teacher"
        beta = self.beta.value
        totals, metrics = [], {"beta": beta.detach().clone()}
        for side, weight in zip(_SIDES, (1.0 - beta, beta), strict=True):
            total, own = self._term(side, student, teacher, batch)
            totals.append(weight.to(total) * total)
            metrics |= {f"{name}_{side}": value for name, value in own.items()}
        return LossOutput(torch.stack(totals), self.units(batch).to(totals[0].device), metrics)

    def units(self, batch: Batch) -> Tensor:
        """Units of the teacher's and of the student's responses, `[2]`."""
        return torch.stack([count_units(_lengths(batch, side), self.reduction) for side in _SIDES])

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Moves β, and hands each side's α its own gap."""
        self.beta.update(progress, metrics)
        for side, alpha in zip(_SIDES, (self.alpha_teacher, self.alpha_student), strict=True):
            name = f"gap_{side}"
            alpha.update(progress, {"gap": metrics[name]} if name in metrics else {})

    def _term(self, side: str, student: Scores, teacher: Scores, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One side's total, and the values of its rows."""
        lengths = [length for length in _lengths(batch, side) if length]
        index = _positions(batch, side)
        student, teacher = student.select(index), teacher.select(index)
        targets, weights = batch.targets[index], position_weights(batch, self.reduction)[index]
        host_rows = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.long))  # [n], from 0
        rows = host_rows.to(index.device, non_blocking=True)
        schedule = self.alpha_teacher if side == "teacher" else self.alpha_student
        gaps: Tensor | None = None

        def skew(
            part: slice, own_p: Tensor | None, own_q: Tensor | None
        ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            """α of each position `[n]`; the gap and α of the slice's rows."""
            local, gap = rows[part], gaps
            if gap is None:  # the slice holds whole rows
                of_slice = torch.unique_consecutive(host_rows[part])
                local = local - (int(of_slice[0]) if len(of_slice) else 0)
                gap = _gap(side, own_p, own_q, local, len(of_slice))
            alpha = schedule.for_rows(gap)
            return (alpha[local],), (gap, alpha)

        def values(logp: Tensor, logq: Tensor, alpha: Tensor) -> Tensor:
            return self._divergence(side, logp, logq, alpha)

        def gradient(logp: Tensor, logq: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
            return self._gradient(side, logp, logq, alpha)

        sliced = Sliced(self, student, teacher, values, gradient, targets)
        parts = row_slices(lengths, sliced.positions)
        if parts is None:  # a row is longer than a slice: its gap needs a pass of its own
            with torch.no_grad():
                own_p, own_q = (target_log_probs(scores, targets, student.slicing) for scores in (teacher, student))
            gaps = _gap(side, own_p, own_q, rows, len(lengths))
            sliced.targets = None
        total, (found, gap, alpha) = sliced.sum(weights, parts, skew)
        if gaps is not None:
            gap, alpha = gap[: len(lengths)], alpha[: len(lengths)]
        return total, {"divergence": found, "gap": gap, "alpha": alpha, **self._reference(side)}

    def _divergence(self, side: str, logp: Tensor, logq: Tensor, alpha: Tensor) -> Tensor:
        if side == "teacher":
            return divergences.skl(logp, logq, alpha)
        return divergences.srkl(logp, logq, alpha, self.detach_mixture)

    def _gradient(self, side: str, logp: Tensor, logq: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        if side == "teacher":
            return gradients.skl(logp, logq, alpha)
        return gradients.srkl(logp, logq, alpha, self.detach_mixture)

    def _reference(self, side: str) -> dict[str, Tensor]:
        alpha = self.alpha_teacher if side == "teacher" else self.alpha_student
        return {"reference_gap": alpha.reference_gap.clone()} if isinstance(alpha, AdaptiveAlpha) else {}


def _lengths(batch: Batch, side: str) -> tuple[int, ...]:
    return tuple(length for length, writer in zip(batch.lengths, batch.writer, strict=True) if side_of(writer) == side)


def _positions(batch: Batch, side: str) -> Tensor:
    """`[n]` places among the N positions of the rows that `side` wrote; made on the host."""
    starts = torch.tensor((0, *batch.lengths)).cumsum(0).tolist()
    chosen = [torch.arange(start, start + length) for start, length, writer in
              zip(starts, batch.lengths, batch.writer, strict=False) if side_of(writer) == side]  # fmt: skip
    index = torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.long)
    return index.to(batch.rows.device, non_blocking=True)


def _gap(side: str, logp: Tensor | None, logq: Tensor | None, rows: Tensor, num_rows: int) -> Tensor:
    """Gap g of each row, `[R]`: its writer's length-normalised likelihood minus the other model's."""
    assert logp is not None
    assert logq is not None
    counts = logp.new_zeros(num_rows).index_add(0, rows, torch.ones_like(logp)).clamp_min(1)
    p, q = ((logp.new_zeros(num_rows).index_add(0, rows, own) / counts).exp() for own in (logp, logq))
    return p - q if side == "teacher" else q - p
