"""Log-likelihoods of whole responses, in memory that does not grow with N·V."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distillkit.losses.slicing import slices
from distillkit.types import Batch, Scores


def target_log_probs(scores: Scores, targets: Tensor) -> Tensor:
    """Log-probability of each position's own token, differentiable.

    A slice's `[n, V]` log-probabilities are computed again in the backward pass instead of being kept.

    Args:
        scores: Scores of N positions.
        targets: `[N]` token ids.

    Returns:
        `[N]` nats, at most 0.
    """

    def of_slice(hidden: Tensor, wanted: Tensor) -> Tensor:
        logq = Scores(hidden, scores.head, scores.vocab).log_probs()
        return logq.gather(-1, wanted[:, None]).squeeze(-1)

    parts = slices(scores.hidden.shape[0], scores.vocab) or [slice(0, 0)]
    values = [checkpoint(of_slice, scores.hidden[part], targets[part], use_reentrant=False) for part in parts]
    return torch.cat(values)


def row_means(values: Tensor, batch: Batch) -> Tensor:
    """Mean of `[N]` values over the positions of each row: `[B]`, 0 for a row without positions."""
    sums = values.new_zeros(len(batch.lengths)).index_add(0, batch.rows, values)
    lengths = torch.tensor(batch.lengths, dtype=values.dtype).to(values.device, non_blocking=True)
    return sums / lengths.clamp_min(1)
