"""Log-likelihoods of whole responses, in memory that does not grow with N·V."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distillkit import gradients
from distillkit.losses.slicing import Sliced, own_log_probs
from distillkit.types import Batch, Scores, Slicing


def target_log_probs(scores: Scores, targets: Tensor, slicing: Slicing | None = None) -> Tensor:
    """Log-probability of each position's own token, differentiable.

    What a slice's gradient is multiplied by is known only in the backward pass, so that its log-probabilities are
    computed again there.

    Args:
        scores: Scores of N positions.
        targets: `[N]` token ids.
        slicing: How they are sliced; None is as the scores have it, which of a teacher is not what was asked for.

    Returns:
        `[N]` nats, at most 0.
    """
    if scores.own is not None:
        return scores.own
    scores = replace(scores, slicing=slicing or scores.slicing)

    def log_probs(_: None, logq: Tensor, own: Tensor) -> Tensor:
        return own_log_probs(logq, own)

    def gradient(_: None, logq: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        values, grad = gradients.cross_entropy(logq, own)
        return values.neg_(), grad.neg_()

    sliced = Sliced(target_log_probs, scores, None, log_probs, gradient)
    sliced.extra = lambda part, *_: ((targets[part],), ())
    if not sliced.with_grad:
        return _values(sliced)
    values: Tensor = _TargetLogProbs.apply(sliced, scores.hidden, *sliced.head.leaves)  # type: ignore[no-untyped-call]
    return values


def row_means(values: Tensor, batch: Batch) -> Tensor:
    """Mean of `[N]` values over the positions of each row: `[B]`, 0 for a row without positions."""
    sums = values.new_zeros(len(batch.lengths)).index_add(0, batch.rows, values)
    lengths = torch.tensor(batch.lengths, dtype=values.dtype).to(values.device, non_blocking=True)
    return sums / lengths.clamp_min(1)


def _values(sliced: Sliced) -> Tensor:
    sliced.with_grad = False
    return sliced.sum(sliced.hidden.new_zeros(len(sliced.hidden)), extra=sliced.extra)[1][0]


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sliced: Sliced, hidden: Tensor, *leaves: Tensor) -> Tensor:
        ctx.sliced = sliced
        return _values(sliced)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        sliced = ctx.sliced
        sliced.with_grad, sliced.weights = True, grad_output
        sliced.reported.clear()
        grad = sliced.run()[1]
        return (None, grad, *sliced.head.finished())
