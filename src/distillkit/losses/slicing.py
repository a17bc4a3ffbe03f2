"""Runs a loss over response positions a slice at a time, so that its memory does not grow with N·V.

A slice is what the heads turn into logits at once: two `[n, V]` tensors, written over in each slice. Within it the loss
sees the log-probabilities of a block of positions at a time, few enough on the CPU that what it makes of them stays in
the cache.

Letters: N response positions, n positions of a slice, m of a block, V vocabulary, C columns of the log-probabilities
that a loss sees (V, or K+1 where the teacher kept its K most likely tokens), D hidden width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distillkit.heads import HeadPass
from distillkit.losses.budget import Budget
from distillkit.types import Scores, log_softmax

Values = Callable[..., Tensor]
"""From `logp [m, C]` (None without a teacher), `logq [m, C]` and what belongs to the positions: values `[m]`, with a
graph by `logq`."""
Gradient = Callable[..., tuple[Tensor, Tensor]]
"""From the same: values `[m]` and their gradient by the student's logits `[m, C]`. It may overwrite its arguments."""
Extra = Callable[[slice, Tensor | None, Tensor | None], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
"""From the place of a slice and its own tokens' log-probabilities by teacher and student, `[n]` each: what is handed to
the loss with the positions, `[n, ...]` each, and what is reported, `[r]` each."""


def _nothing(*_: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return (), ()


class Sliced:
    """Sums a loss over the N positions of a batch, with the gradient of the student's hidden states and head.

    The gradient of each slice is taken while its log-probabilities exist, and they are written over by the next slice:
    peak memory is that of one slice plus `[N, D]` and the head's own gradient. Slices and blocks are as large as
    `student.slicing` allows, by what the loss is seen to need.

    Args:
        owner: The loss, whose need of memory is measured once.
        student: Scores of N positions, with a graph where a gradient is wanted.
        teacher: Scores of the same positions, or None if the loss does without.
        values: What is summed.
        gradient: The same with its gradient, where that is known; used unless the teacher has a support.
        targets: `[N]` own token of each position; None if `extra` does not read their log-probabilities.
        temperature: Divides both models' logits.
    """

    def __init__(
        self,
        owner: object,
        student: Scores,
        teacher: Scores | None,
        values: Values,
        gradient: Gradient | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.student, self.teacher, self.targets, self.temperature = student, teacher, targets, temperature
        self.support = None if teacher is None else teacher.support
        self.values, self.gradient = values, gradient if self.support is None else None
        if student.slicing.compile:  # what is made for a loss's code is found again in the next step
            self.values = torch.compile(self.values, dynamic=True)
            self.gradient = None if self.gradient is None else torch.compile(self.gradient, dynamic=True)
        self.hidden = student.hidden.detach()
        self.head = HeadPass(student.head, self.hidden)
        self.teacher_head = None if teacher is None or self.support is not None else HeadPass(teacher.head, self.hidden)
        self.with_grad = torch.is_grad_enabled() and (student.hidden.requires_grad or bool(self.head.leaves))
        heads = [self.head] * (self.head.num_tensors if self.with_grad else 1)
        heads += [] if self.teacher_head is None else [self.teacher_head]
        self.budget = Budget(owner, student, [head.stored for head in heads])
        self.reported: list[tuple[Tensor, ...]] = []
        self._buffers: list[Tensor] = []

    @property
    def positions(self) -> int:
        """Most positions in a slice."""
        return self.budget.positions

    def sum(
        self, weights: Tensor, parts: Sequence[slice] | None = None, extra: Extra = _nothing
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Σ weight · value.

        Args:
            weights: `[N]` weight of each position.
            parts: Slices that cover the positions, in order; None cuts them into equal ones.
            extra: What each slice hands to the loss besides log-probabilities.

        Returns:
            The total `[]` with a graph (also without any position), and the values `[N]` with what was reported.
        """
        self.weights, self.extra = weights, extra
        self.parts = slices(len(self.hidden), self.positions) if parts is None else parts
        if self.with_grad:
            leaves = self.head.leaves
            total: Tensor = _SlicedTotal.apply(self, self.student.hidden, *leaves)  # type: ignore[no-untyped-call]
        else:
            total = self.run()[0]
        return total, tuple(torch.cat(found) for found in zip(*self.reported, strict=True))

    def run(self) -> tuple[Tensor, Tensor]:
        """The total, and its gradient by the hidden states; those of the head's parameters are in `head`."""
        total = torch.zeros((), dtype=self.head.wide, device=self.hidden.device)
        grad = torch.zeros_like(self.hidden) if self.with_grad else total
        if self.with_grad:
            self.head.start()
        # Without a position one empty slice is looked at: the number of what is reported doesn't depend on the batch.
        for part in self.parts or [slice(0, 0)]:
            by_logits = self._slice(part, total)
            if self.with_grad and len(by_logits):
                grad[part] = self.head.backward(by_logits)
        self._buffers = []
        return total, grad

    def _slice(self, part: slice, total: Tensor) -> Tensor:
        """Adds a slice to the total, and gives the gradient by its logits `[n, V]`."""
        logits = self.head.logits(self.hidden[part], self._buffer(0, self.head, part), self.with_grad)
        with torch.no_grad():
            given = self._teacher(part)
            extra, reported = self.extra(part, *self._own(part, given, logits))
            values = torch.empty(len(logits), dtype=self.head.wide, device=logits.device)
            weights, one = self.weights[part].to(values), slice(0, 1)
            copies = None if given is None else given[one].clone(), logits[one].clone()
            size = self.budget.block(lambda: self._block(part, one, *copies, extra, weights)) if len(logits) else 1
            for block in slices(len(logits), size):
                values[block] = self._block(part, block, given, logits, extra, weights)
            total += (values * weights).sum()
        self.reported.append((values, *reported))
        return logits

    def _block(
        self, part: slice, block: slice, given: Tensor | None, logits: Tensor, extra: Sequence[Tensor], weights: Tensor
    ) -> Tensor:
        """Values of a block `[m]`; its logits become their weighted gradient."""
        logp, here = self._given(given, block), logits[block]
        others = tuple(own[block] for own in extra)
        if self.with_grad and self.gradient is not None:
            values, grad = self.gradient(logp, log_softmax(here, self.temperature), *others)
            here.copy_(grad.mul_((weights[block] / self.temperature)[:, None]))
            return values
        with torch.set_grad_enabled(self.with_grad):
            leaf = here.detach().to(self.head.wide).requires_grad_(self.with_grad)
            logq = log_softmax(leaf, self.temperature)
            if self.support is not None:
                logq = gathered(logq, self.support[part][block])
            values = self.values(logp, logq, *others)
            if self.with_grad:
                weighted = (values * weights[block]).sum()
                found = torch.autograd.grad(weighted, leaf)[0] if weighted.requires_grad else torch.zeros_like(leaf)
                here.copy_(found)
        return values.detach()

    def _teacher(self, part: slice) -> Tensor | None:
        """The teacher's logits `[n, V]`, or with a support its log-probabilities `[n, K+1]`."""
        if self.teacher is None:
            return None
        if self.teacher_head is None:
            return self.teacher.log_probs(part, self.temperature)
        return self.teacher_head.logits(self.teacher.hidden[part], self._buffer(1, self.teacher_head, part))

    def _given(self, given: Tensor | None, block: slice) -> Tensor | None:
        """The teacher's log-probabilities `[m, C]` of a block, which the loss may write over."""
        if given is None or self.teacher_head is None:
            return None if given is None else given[block]
        return log_softmax(given[block], self.temperature)

    def _own(self, part: slice, given: Tensor | None, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Log-probabilities `[n]` of the positions' own tokens, by the teacher and by the student."""
        if self.targets is None:
            return None, None
        own_q = self._of_targets(part, logits)
        if self.teacher is not None and self.teacher.own is not None:
            return self.teacher.own[part].to(own_q.dtype), own_q
        return None if given is None else self._of_targets(part, given), own_q

    def _of_targets(self, part: slice, logits: Tensor) -> Tensor:
        """Log-probabilities `[n]` of the positions' own tokens by logits `[n, V]`."""
        assert self.targets is not None
        found = torch.empty(len(logits), dtype=self.head.wide, device=logits.device)
        for block in slices(len(logits), self.budget.cached):
            found[block] = own_log_probs(log_softmax(logits[block], self.temperature), self.targets[part][block])
        return found

    def _buffer(self, place: int, head: HeadPass, part: slice) -> Tensor:
        """`[n, V]` room for a slice, the same in each."""
        rows = part.stop - part.start
        while len(self._buffers) <= place:
            largest = max([own.stop - own.start for own in self.parts], default=0)
            shape = (largest, self.student.vocab)
            self._buffers.append(torch.empty(shape, dtype=head.stored, device=self.hidden.device))
        return self._buffers[place][:rows]


def slices(num_positions: int, step: int) -> list[slice]:
    """Slices of `step` positions over `num_positions`, the last one shorter; as equal as they can be."""
    count = -(-num_positions // step)
    size = -(-num_positions // count) if count else 1
    return [slice(start, min(start + size, num_positions)) for start in range(0, num_positions, size)]


def row_slices(lengths: Sequence[int], step: int) -> list[slice] | None:
    """Slices of at most `step` positions that never cut a row, or None if a row is longer than that.

    Args:
        lengths: Number of positions of each row, in the positions' order.
        step: Most positions in a slice.
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


def own_log_probs(logs: Tensor, targets: Tensor) -> Tensor:
    """`[n]` entries of `[n, V]` at the token ids `targets` `[n]`."""
    return logs.gather(-1, targets[:, None]).squeeze(-1)


def gathered(logq: Tensor, support: Tensor) -> Tensor:
    """`[n, K+1]` log-probabilities of the tokens in `support` `[n, K]`, then of all others of `[n, V]` together."""
    rest = logq.scatter(-1, support, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logq.gather(-1, support), rest], dim=-1)


class _SlicedTotal(torch.autograd.Function):
    """Takes the gradient in the forward pass; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, job: Sliced, hidden: Tensor, *leaves: Tensor) -> Tensor:
        total, grad = job.run()
        ctx.grads = [grad, *job.head.finished()]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.grads
        assert grads is not None, "the gradient was taken before, and its graph not retained"
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return (None, *(grad * grad_output.to(grad.dtype) for grad in grads))
        ctx.grads = None  # in place: a second copy of the head's gradient may not fit
        return (None, *(grad.mul_(grad_output.to(grad.dtype)) for grad in grads))
