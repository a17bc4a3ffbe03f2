"""Log-likelihoods of responses, in memory that does not grow with N·V."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from distillkit import divergences
from distillkit.chunked.evaluate import ChunkedLoss, PositionLoss, gather_targets
from distillkit.types import Batch, Scores, Slicing


class _TargetLogProb(PositionLoss):
    """Log-probability log q(y) of the target token; its column is the `[N]` token ids y."""

    has_closed_form = True

    def values(self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor) -> Tensor:
        (targets,) = columns
        return gather_targets(student_logp, targets)

    def values_and_grad(
        self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        (targets,) = columns
        values, grad = divergences.cross_entropy_and_grad(student_logp, targets)
        return values.neg_(), grad.neg_()


_TARGET_LOG_PROB = _TargetLogProb()


def target_log_probs(scores: Scores, targets: Tensor, slicing: Slicing | None = None) -> Tensor:
    """Returns the log-probability of the target token at each position, differentiable.

    The weights of the gradient are known only in the backward pass, which therefore computes the log-probabilities
    again.

    Args:
        scores: Scores of N positions.
        targets: `[N]` token ids.
        slicing: Slicing to use instead of that of the scores. Pass the student's for a teacher: only the student's
            scores have the user's setting.

    Returns:
        `[N]` nats, at most 0.
    """
    if scores.target_logp is not None:
        return scores.target_logp
    chunked = ChunkedLoss(_TARGET_LOG_PROB, replace(scores, slicing=slicing or scores.slicing))
    if not chunked.needs_grad:
        return chunked.values((targets,))
    values: Tensor = _TargetLogProbs.apply(  # type: ignore[no-untyped-call]
        chunked, targets, scores.hidden, *chunked.head.leaves
    )
    return values


def row_means(values: Tensor, batch: Batch) -> Tensor:
    """Returns the mean of `[N]` values over the positions of each row: `[B]`, 0 for a row without positions."""
    sums = values.new_zeros(len(batch.lengths)).index_add(0, batch.rows, values)
    lengths = torch.tensor(batch.lengths, dtype=values.dtype).to(values.device, non_blocking=True)
    return sums / lengths.clamp_min(1)


class _LogProbsContext(FunctionCtx):
    chunked: ChunkedLoss
    targets: Tensor


class _TargetLogProbs(torch.autograd.Function):
    """Computes the log-probabilities in the forward pass, and again with their gradient in the backward pass."""

    @staticmethod
    def forward(
        ctx: _LogProbsContext, chunked: ChunkedLoss, targets: Tensor, hidden: Tensor, *leaves: Tensor
    ) -> Tensor:
        ctx.chunked, ctx.targets = chunked, targets
        return chunked.values((targets,))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _LogProbsContext, values_grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.chunked.gradients(values_grad, (ctx.targets,)))
