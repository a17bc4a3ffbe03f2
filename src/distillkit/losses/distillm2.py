"""The contrastive loss of DistiLLM-2."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from distillkit import divergences
from distillkit.interfaces import Loss, Schedule
from distillkit.losses.likelihood import target_log_probs
from distillkit.losses.slicing import row_slices, sliced_total, slices
from distillkit.losses.token import checked_reduction, checked_share, count_units, position_weights
from distillkit.schedules import AdaptiveAlpha, Constant, Linear
from distillkit.types import Batch, LossOutput, Progress, Reduction, Scores, Summary

_SIDES = ("teacher", "student")


class DistiLLM2(Loss):
    """Skew KL pulls the student up on the teacher's responses, skew reverse KL pushes it down on its own.

    L = (1−β)·SKL_α(y_t) + β·SRKL_α(y_s), each term a mean over the global batch of its own responses. α is a number per
    row (`AdaptiveAlpha`, with a reference gap of its own for each term), β grows with training. Rows that neither the
    teacher nor the student wrote are in neither term.

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
        lengths = _lengths(batch, side)
        kept = [length for length in lengths if length]
        index = _positions(batch, side)
        student, teacher = student.select(index), teacher.select(index)
        targets, weights = batch.targets[index], position_weights(batch, self.reduction)[index]
        host_rows = torch.repeat_interleave(torch.tensor(kept, dtype=torch.long))  # [n], from 0
        rows = host_rows.to(index.device, non_blocking=True)
        gaps: Tensor | None = None
        parts = row_slices(kept, student.vocab)
        if parts is None:  # a row is longer than a slice: its gap needs a pass of its own
            parts = slices(len(rows), student.vocab)
            with torch.no_grad():
                own_p, own_q = (target_log_probs(scores, targets) for scores in (teacher, student))
            gaps = _gap(side, own_p, own_q, rows, len(kept))

        def part_of_total(logp: Tensor | None, logq: Tensor, part: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
            assert logp is not None
            local, gap = rows[part], gaps
            if gap is None:  # the slice holds whole rows
                here = torch.unique_consecutive(host_rows[part])
                own = targets[part, None]
                own_p, own_q = (scores.detach().gather(-1, own).squeeze(-1) for scores in (logp, logq))
                local = local - (int(here[0]) if len(here) else 0)
                gap = _gap(side, own_p, own_q, local, len(here))
            alpha = (self.alpha_teacher if side == "teacher" else self.alpha_student).for_rows(gap)
            values = self._divergence(side, logp, logq, alpha[local])
            total = (values * weights[part].to(values.dtype)).sum()
            return total, (values.detach(), gap, alpha)

        total, (values, gap, alpha) = sliced_total(part_of_total, student, teacher, parts)
        if gaps is not None:
            gap, alpha = gap[: len(kept)], alpha[: len(kept)]
        return total, {"divergence": values, "gap": gap, "alpha": alpha, **self._reference(side)}

    def _divergence(self, side: str, logp: Tensor, logq: Tensor, alpha: Tensor) -> Tensor:
        if side == "teacher":
            return divergences.skl(logp, logq, alpha)
        return divergences.srkl(logp, logq, alpha, self.detach_mixture)

    def _reference(self, side: str) -> dict[str, Tensor]:
        alpha = self.alpha_teacher if side == "teacher" else self.alpha_student
        return {"reference_gap": alpha.reference_gap.clone()} if isinstance(alpha, AdaptiveAlpha) else {}


def _lengths(batch: Batch, side: str) -> tuple[int, ...]:
    return tuple(length for length, writer in zip(batch.lengths, batch.writer, strict=True) if writer == side)


def _positions(batch: Batch, side: str) -> Tensor:
    """`[n]` places among the N positions of the rows that `side` wrote; made on the host."""
    starts = torch.tensor((0, *batch.lengths)).cumsum(0).tolist()
    chosen = [torch.arange(start, start + length) for start, length, writer in
              zip(starts, batch.lengths, batch.writer, strict=False) if writer == side]  # fmt: skip
    index = torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.long)
    return index.to(batch.rows.device, non_blocking=True)


def _gap(side: str, logp: Tensor, logq: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Gap g of each row, `[R]`: its writer's length-normalised likelihood minus the other model's."""
    counts = logp.new_zeros(num_rows).index_add(0, rows, torch.ones_like(logp)).clamp_min(1)
    p, q = ((logp.new_zeros(num_rows).index_add(0, rows, own) / counts).exp() for own in (logp, logq))
    return p - q if side == "teacher" else q - p
