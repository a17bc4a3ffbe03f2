"""Chunked evaluation of a loss: one slice of response positions at a time, so that memory does not grow with N·V.

A slice is the number of positions for which the heads compute logits at a time, in two `[n, V]` buffers that every
slice reuses. Within a slice the loss is evaluated on blocks of positions, which on the CPU are small enough that its
temporary tensors stay in the cache.

Letters: N response positions, n positions of a slice, m of a block, V vocabulary, C columns of the log-probabilities
(V, or K+1 if only the teacher's K most likely tokens are available), D hidden width, L leaves of the student's head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from distillkit.chunked.memory import Budget
from distillkit.chunked.output_head import HeadPass
from distillkit.errors import PluginError
from distillkit.types import Scores, log_softmax


class PositionLoss(Protocol):
    """A loss with one value per response position. A subclass defines `values`; the closed form is optional."""

    has_closed_form: ClassVar[bool] = False
    """True if `values_and_grad` is defined. Otherwise autograd computes the gradient of `values`."""

    def values(self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor) -> Tensor:
        """Returns the loss at each position of a block.

        Args:
            teacher_logp: `[m, C]` log-probabilities without gradient; None if the loss has no teacher.
            student_logp: `[m, C]` log-probabilities, with a graph if a gradient is needed.
            columns: `[m, …]` further values of the positions, such as their target tokens.

        Returns:
            `[m]` values, with a graph by `student_logp`.
        """
        ...

    def values_and_grad(
        self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns `[m]` values and their gradient `[m, C]` by the student's logits; may overwrite the arguments."""
        raise NotImplementedError


@dataclass(frozen=True)
class SliceColumns:
    """Columns that depend on the likelihoods of the slice itself, computed from its logits in the same pass.

    Args:
        targets: `[N]` token ids whose log-probabilities `compute` needs.
        parts: Slices that cover the N positions in order.
        compute: Returns the columns, `[n, …]` each, for a slice and the `[n]` log-probabilities of its target tokens
            under the teacher and the student. Called once per slice, in order, without gradient.
    """

    targets: Tensor
    parts: Sequence[slice]
    compute: Callable[[slice, Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Block:
    """Tensors of a slice (or block) of positions.

    Args:
        teacher: `[n, V]` teacher logits, or with `top_k_ids` `[n, K+1]` log-probabilities; None without a teacher.
        logits: `[n, V]` student logits, overwritten with the weighted gradient of the loss if one is needed.
        weights: `[n]` weights.
        columns: `[n, …]` columns of the loss.
        top_k_ids: `[n, K]` token ids of the teacher's columns, or None.
    """

    teacher: Tensor | None
    logits: Tensor
    weights: Tensor
    columns: tuple[Tensor, ...]
    top_k_ids: Tensor | None

    def part(self, index: slice) -> "_Block":
        """Returns views of some positions."""
        teacher, top_k_ids = (None if tensor is None else tensor[index] for tensor in (self.teacher, self.top_k_ids))
        columns = tuple(column[index] for column in self.columns)
        return _Block(teacher, self.logits[index], self.weights[index], columns, top_k_ids)


def chunked_sum(
    loss: PositionLoss,
    student: Scores,
    teacher: Scores | None,
    weights: Tensor,
    columns: Sequence[Tensor] = (),
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sums a loss over the N positions of a batch.

    Args:
        loss: The loss at each position.
        student: Scores of N positions, with a graph if a gradient is needed.
        teacher: Scores of the same positions; None if the loss has no teacher.
        weights: `[N]` weight of each position.
        columns: `[N, …]` further arguments of the loss, passed on a block at a time.
        temperature: Divides both models' logits.

    Returns:
        Σ weight · value `[]`, with a graph even if N = 0, and the values `[N]` without a graph.
    """
    return ChunkedLoss(loss, student, teacher, temperature).sum(weights, columns)


class ChunkedLoss:
    """A loss on the scores of a batch, ready to be evaluated a slice of positions at a time.

    The gradient of each slice is computed while its log-probabilities are in memory; the next slice overwrites them.
    Peak memory is that of one slice, plus `[N, D]` and the gradient of the head. Slices and blocks are as large as
    `student.slicing` allows; the memory that the loss uses in a block is measured once.

    Args:
        loss: The loss at each position. Measurements are cached for this object.
        student: Scores of N positions, with a graph if a gradient is needed.
        teacher: Scores of the same positions; None if the loss has no teacher.
        temperature: Divides both models' logits.
    """

    def __init__(
        self, loss: PositionLoss, student: Scores, teacher: Scores | None = None, temperature: float = 1.0
    ) -> None:
        self.loss, self.student, self.teacher, self.temperature = loss, student, teacher, temperature
        self.top_k_ids = None if teacher is None else teacher.top_k_ids
        self.closed_form = loss.has_closed_form and self.top_k_ids is None
        self.hidden = student.hidden.detach()
        self.head = HeadPass(student.head, self.hidden)
        has_teacher_head = teacher is not None and self.top_k_ids is None
        self.teacher_head = HeadPass(teacher.head, self.hidden) if teacher is not None and has_teacher_head else None
        self.needs_grad = torch.is_grad_enabled() and (student.hidden.requires_grad or bool(self.head.leaves))
        heads = [self.head] * (self.head.num_tensors if self.needs_grad else 1)
        heads += [] if self.teacher_head is None else [self.teacher_head]
        self.budget = Budget(loss, student, [head.stored for head in heads])

    @property
    def max_positions(self) -> int:
        """Maximum number of positions in a slice."""
        return self.budget.positions

    def sum(self, weights: Tensor, columns: Sequence[Tensor] | SliceColumns = ()) -> tuple[Tensor, Tensor]:
        """Returns the weighted sum `[]`, with a graph, and the values `[N]`; see `chunked_sum`."""
        if not self.needs_grad:
            total, values, _ = self.evaluate(weights, columns, with_grad=False)
            return total, values
        total, values = _ChunkedTotal.apply(  # type: ignore[no-untyped-call]
            self, weights, columns, self.student.hidden, *self.head.leaves
        )
        return total, values

    def values(self, columns: Sequence[Tensor] = ()) -> Tensor:
        """Returns the values `[N]`, without a graph."""
        return self.evaluate(self.hidden.new_zeros(len(self.hidden)), columns, with_grad=False)[1]

    def gradients(self, weights: Tensor, columns: Sequence[Tensor] = ()) -> list[Tensor]:
        """Returns the gradients of Σ weight · value by the hidden states `[N, D]` and by each leaf of the head."""
        return self.evaluate(weights, columns, with_grad=True)[2]

    def evaluate(
        self, weights: Tensor, columns: Sequence[Tensor] | SliceColumns, with_grad: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Evaluates the loss on all slices.

        Args:
            weights: `[N]` weight of each position.
            columns: Further arguments of the loss, `[N, …]` each or computed for each slice.
            with_grad: Whether gradients are computed.

        Returns:
            The weighted sum `[]`, the values `[N]`, and the gradients by the hidden states `[N, D]` and by each leaf of
            the head; no gradients without `with_grad`.
        """
        device, wide = self.hidden.device, self.head.wide
        total = torch.zeros((), dtype=wide, device=device)
        values = torch.empty(len(self.hidden), dtype=wide, device=device)
        weights = weights.to(values)
        if not with_grad:
            self._run(total, values, None, weights, columns)
            return total, values, []
        hidden_grad = torch.zeros_like(self.hidden)
        self.head.start()
        self._run(total, values, hidden_grad, weights, columns)
        return total, values, [hidden_grad, *self.head.finished()]

    def _run(
        self,
        total: Tensor,
        values: Tensor,
        hidden_grad: Tensor | None,
        weights: Tensor,
        columns: Sequence[Tensor] | SliceColumns,
    ) -> None:
        """Fills the outputs slice by slice; the gradients of the head's leaves are accumulated in `head`."""
        parts = columns.parts if isinstance(columns, SliceColumns) else slices(len(values), self.max_positions)
        heads = [self.head] if self.teacher_head is None else [self.head, self.teacher_head]
        shape = (max((part.stop - part.start for part in parts), default=0), self.student.vocab)
        buffers = [torch.empty(shape, dtype=head.stored, device=values.device) for head in heads]
        with_grad = hidden_grad is not None
        # Without positions one empty slice is evaluated: the same checks and collectives run for every batch.
        for part in parts or [slice(0, 0)]:
            values[part] = self._slice_values(self._scored(part, weights, columns, buffers, with_grad), with_grad)
            total += (values[part] * weights[part]).sum()
            if hidden_grad is not None and part.stop > part.start:
                hidden_grad[part] = self.head.backward(buffers[0][: part.stop - part.start])

    def _scored(
        self,
        part: slice,
        weights: Tensor,
        columns: Sequence[Tensor] | SliceColumns,
        buffers: Sequence[Tensor],
        with_grad: bool,
    ) -> _Block:
        """Computes both models' logits of a slice, and its columns."""
        num_positions = part.stop - part.start
        logits = self.head.logits(self.hidden[part], buffers[0][:num_positions], with_grad)
        teacher = None
        with torch.no_grad():
            if self.teacher is not None and self.teacher_head is None:
                teacher = self.teacher.log_probs(part, self.temperature)
            elif self.teacher is not None and self.teacher_head is not None:
                teacher = self.teacher_head.logits(self.teacher.hidden[part], buffers[1][:num_positions])
            if isinstance(columns, SliceColumns):
                student_logp = self._target_logp(logits, columns.targets[part])
                part_columns = columns.compute(part, self._teacher_target_logp(part, teacher, columns), student_logp)
            else:
                part_columns = tuple(column[part] for column in columns)
        top_k_ids = None if self.top_k_ids is None else self.top_k_ids[part]
        return _Block(teacher, logits, weights[part], part_columns, top_k_ids)

    def _slice_values(self, whole: _Block, with_grad: bool) -> Tensor:
        """Returns the values `[n]` of a slice; its logits become their weighted gradient if `with_grad`."""
        num_positions = len(whole.logits)
        values = torch.empty(num_positions, dtype=self.head.wide, device=whole.logits.device)
        first = whole.part(slice(0, 1))
        teacher = None if first.teacher is None else first.teacher.clone()
        first = _Block(teacher, first.logits.clone(), first.weights, first.columns, first.top_k_ids)

        # The uncompiled loss is measured: a compiled one hides its tensors, and dynamo would then never compile it.
        def one_position() -> Tensor:
            return self._block_values(first, with_grad, self.loss.values, self.loss.values_and_grad)

        values_fn, values_and_grad_fn = self.loss.values, self.loss.values_and_grad
        if self.student.slicing.compile:
            values_fn = torch.compile(values_fn, dynamic=True)
            values_and_grad_fn = torch.compile(values_and_grad_fn, dynamic=True)
        with torch.no_grad():
            for index in slices(num_positions, self.budget.block(one_position) if num_positions else 1):
                values[index] = self._block_values(whole.part(index), with_grad, values_fn, values_and_grad_fn)
        return values

    def _block_values(
        self,
        block: _Block,
        with_grad: bool,
        values_fn: Callable[..., Tensor],
        values_and_grad_fn: Callable[..., tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Returns the values `[m]` of a block; its logits become their weighted gradient if `with_grad`."""
        teacher_logp = block.teacher
        if teacher_logp is not None and self.teacher_head is not None:
            teacher_logp = log_softmax(teacher_logp, self.temperature)
        if teacher_logp is not None:
            teacher_logp = teacher_logp.to(self.head.wide)  # of a float64 student and a float32 teacher
        if with_grad and self.closed_form:
            student_logp = log_softmax(block.logits, self.temperature)
            values, grad = values_and_grad_fn(teacher_logp, student_logp, *block.columns)
            self._check_shape(values, block)
            block.logits.copy_(grad.mul_((block.weights / self.temperature)[:, None]))
            return values
        with torch.set_grad_enabled(with_grad):
            leaf = block.logits.detach().to(self.head.wide).requires_grad_(with_grad)
            student_logp = log_softmax(leaf, self.temperature)
            if block.top_k_ids is not None:
                student_logp = gather_top_k(student_logp, block.top_k_ids)
            values = values_fn(teacher_logp, student_logp, *block.columns)
            self._check_shape(values, block)
            if with_grad:
                weighted = (values * block.weights).sum()
                grad = torch.autograd.grad(weighted, leaf)[0] if weighted.requires_grad else torch.zeros_like(leaf)
                block.logits.copy_(grad)
        return values.detach()

    def _check_shape(self, values: Tensor, block: _Block) -> None:
        """Refuses values that are not `[m]`: a mean would be broadcast, and depend on the slices."""
        if values.shape != block.weights.shape:
            raise PluginError(
                f"{type(self.loss).__name__} must return one value per position, `[n]`, got the shape "
                f"{list(values.shape)} for {len(block.weights)} positions of {block.logits.shape[-1]} tokens. Reduce "
                "the last dimension alone: the mean over positions is taken once, over the whole batch."
            )

    def _teacher_target_logp(self, part: slice, teacher: Tensor | None, columns: SliceColumns) -> Tensor:
        """Returns the teacher's `[n]` log-probabilities of the target tokens of a slice."""
        assert self.teacher is not None, "SliceColumns need a teacher"
        assert teacher is not None
        if self.teacher.target_logp is not None:
            return self.teacher.target_logp[part].to(self.head.wide)
        return self._target_logp(teacher, columns.targets[part])

    def _target_logp(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the log-probabilities `[n]` of target tokens `[n]` under logits `[n, V]`, a block at a time."""
        logp = torch.empty(len(logits), dtype=self.head.wide, device=logits.device)
        for block in slices(len(logits), self.budget.cached):
            logp[block] = gather_targets(log_softmax(logits[block], self.temperature), targets[block])
        return logp


class _TotalContext(FunctionCtx):
    grads: list[Tensor] | None


class _ChunkedTotal(torch.autograd.Function):
    """Computes the gradient in the forward pass; the backward pass only scales it."""

    @staticmethod
    def forward(
        ctx: _TotalContext,
        chunked: ChunkedLoss,
        weights: Tensor,
        columns: Sequence[Tensor] | SliceColumns,
        hidden: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, Tensor]:
        total, values, ctx.grads = chunked.evaluate(weights, columns, with_grad=True)
        ctx.mark_non_differentiable(values)
        return total, values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _TotalContext, total_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.grads
        assert grads is not None, "backward ran before without retain_graph=True, and the gradient was freed"
        unused = None, None, None
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return (*unused, *(grad * total_grad.to(grad.dtype) for grad in grads))
        ctx.grads = None  # in place: a second copy of the head's gradient may not fit
        return (*unused, *(grad.mul_(total_grad.to(grad.dtype)) for grad in grads))


def slices(num_positions: int, step: int) -> list[slice]:
    """Returns slices of at most `step` positions that cover `num_positions`, as equal in size as possible."""
    count = -(-num_positions // step)
    size = -(-num_positions // count) if count else 1
    return [slice(start, min(start + size, num_positions)) for start in range(0, num_positions, size)]


def row_slices(lengths: Sequence[int], step: int) -> list[slice] | None:
    """Returns slices of at most `step` positions that never split a row, or None if a row is longer than that.

    Args:
        lengths: Number of positions of each row, in the order of the positions.
        step: Maximum number of positions in a slice.
    """
    if any(length > step for length in lengths):
        return None
    parts, start, end = [], 0, 0
    for length in lengths:
        if end + length - start > step:
            parts.append(slice(start, end))
            start = end
        end += length
    return [*parts, slice(start, end)] if end > start else parts


def gather_targets(logp: Tensor, targets: Tensor) -> Tensor:
    """Returns the `[n]` entries of `[n, V]` log-probabilities at the target token ids `[n]`."""
    return logp.gather(-1, targets[:, None]).squeeze(-1)


def gather_top_k(logp: Tensor, top_k_ids: Tensor) -> Tensor:
    """Returns `[n, K+1]` log-probabilities: those of the tokens `top_k_ids` `[n, K]`, then that of all other tokens."""
    rest = logp.scatter(-1, top_k_ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logp.gather(-1, top_k_ids), rest], dim=-1)
