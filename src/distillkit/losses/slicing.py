"""Runs a loss over response positions a slice at a time, so that its memory does not grow with N·V.

Letters: N response positions, n positions of a slice, V vocabulary, D hidden width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distillkit.types import Scores

SLICE_BYTES = 64 * 2**20
"""Aim for one float32 `[n, V]` tensor of a slice. A loss holds a handful of them at once."""

SliceLoss = Callable[[Tensor | None, Tensor, slice], tuple[Tensor, tuple[Tensor, ...]]]
"""From `logp [n, V]` (None without a teacher), `logq [n, V]` and the slice of positions that they belong to: the part
of the total `[]` that the slice has, and detached values of it, each `[m]`."""


def positions_per_slice(vocab: int) -> int:
    """How many positions fit into a slice for a vocabulary of `vocab` tokens, at least 1."""
    return max(1, SLICE_BYTES // (4 * vocab))


def slices(num_positions: int, vocab: int) -> list[slice]:
    """Slices of equal size over `num_positions` positions."""
    step = positions_per_slice(vocab)
    return [slice(start, min(start + step, num_positions)) for start in range(0, num_positions, step)]


def row_slices(lengths: Sequence[int], vocab: int) -> list[slice] | None:
    """Slices that never cut a row, or None if a row is longer than a slice.

    Args:
        lengths: Number of positions of each row, in the positions' order.
        vocab: V, which the size of a slice depends on.
    """
    step = positions_per_slice(vocab)
    if any(length > step for length in lengths):
        return None
    parts, start, end = [], 0, 0
    for length in lengths:
        if end + length - start > step:
            parts.append(slice(start, end))
            start = end
        end += length
    return [*parts, slice(start, end)] if end > start else parts


def sliced_total(
    loss: SliceLoss,
    student: Scores,
    teacher: Scores | None,
    parts: Sequence[slice],
    temperature: float = 1.0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Sum of `loss` over slices, with the gradient of the student's hidden states and head.

    The gradient of each slice is taken while its log-probabilities exist, and they are freed before the next slice:
    peak memory is that of one slice plus `[N, D]` and the head's own gradient. This is why `loss` gives a sum whose
    weights are known in advance.

    Args:
        loss: What is summed.
        student: Scores of N positions, with a graph where a gradient is wanted.
        teacher: Scores of the same positions, or None if `loss` does without.
        parts: Slices that cover the positions, in order.
        temperature: Divides both models' logits.

    Returns:
        The total `[]` with a graph (also without any position), and each detached value, concatenated over the slices.
    """
    parameters = [parameter for parameter in student.head.parameters() if parameter.requires_grad]
    job = _Job(loss, student, teacher, parts, temperature, parameters)
    if torch.is_grad_enabled() and (student.hidden.requires_grad or parameters):
        total: Tensor = _SlicedTotal.apply(job, student.hidden, *parameters)  # type: ignore[no-untyped-call]
    else:
        total = job.run(with_grad=False)[0]
    return total, tuple(torch.cat(values) for values in zip(*job.values, strict=True))


class _Job:
    """One call of `sliced_total`."""

    def __init__(
        self,
        loss: SliceLoss,
        student: Scores,
        teacher: Scores | None,
        parts: Sequence[slice],
        temperature: float,
        parameters: list[Tensor],
    ) -> None:
        self.loss, self.student, self.teacher, self.parts = loss, student, teacher, parts
        self.temperature, self.parameters = temperature, parameters
        self.values: list[tuple[Tensor, ...]] = []

    def run(self, with_grad: bool) -> tuple[Tensor, list[Tensor]]:
        """The total, and its gradients by the hidden states and each parameter of the head."""
        hidden = self.student.hidden.detach()
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        # A head in half precision would lose small parts of its gradient in the sum over slices.
        wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in self.parameters]
        grads = [torch.zeros_like(hidden)] if with_grad else []
        if with_grad:
            grads += [torch.zeros_like(own, dtype=dtype) for own, dtype in zip(self.parameters, wide, strict=True)]
        for part in self.parts:
            with torch.no_grad():
                logp = None if self.teacher is None else self.teacher.log_probs(part, self.temperature)
            with torch.set_grad_enabled(with_grad):
                leaf = hidden[part].requires_grad_(with_grad)
                logq = Scores(leaf, self.student.head, self.student.vocab).log_probs(temperature=self.temperature)
                value, details = self.loss(logp, logq, part)
            total += value.detach()
            self.values.append(details)
            if with_grad and value.requires_grad:
                found = torch.autograd.grad(value, (leaf, *self.parameters), allow_unused=True)
                _accumulate(grads, found, part)
        if not self.parts:  # the names and number of the values don't depend on the batch
            empty = hidden.new_zeros((0, self.student.vocab), dtype=total.dtype)
            self.values.append(self.loss(None if self.teacher is None else empty, empty, slice(0, 0))[1])
        return total, grads


def _accumulate(grads: list[Tensor], found: Sequence[Tensor | None], part: slice) -> None:
    hidden, *rest = found
    if hidden is not None:
        grads[0][part] = hidden
    for grad, more in zip(grads[1:], rest, strict=True):
        if more is not None:
            grad += more


class _SlicedTotal(torch.autograd.Function):
    """Takes the gradient in the forward pass; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, job: _Job, hidden: Tensor, *parameters: Tensor) -> Tensor:
        total, grads = job.run(with_grad=True)
        ctx.save_for_backward(*(grad.to(own.dtype) for grad, own in zip(grads, (hidden, *parameters), strict=True)))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors))
