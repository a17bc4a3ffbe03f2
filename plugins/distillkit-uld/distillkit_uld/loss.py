"""The loss of ULD, which compares sorted distributions of two vocabularies."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distillkit.chunked import default_budget, slices, target_log_probs
from distillkit.errors import check_range
from distillkit.interfaces import Loss
from distillkit.losses import checked_reduction, count_units, position_weights
from distillkit.types import Batch, LossOutput, Reduction, Scores

_TENSORS = 8
"""Number of `[n, V]` tensors that are in memory at once."""


class ULD(Loss):
    """−log q of the response, plus the distance between the sorted distributions, whatever their tokens are.

    Per position Σ_k |p_(k) − q_(k)|, where p_(k) is the k-th largest probability and the smaller vocabulary is filled
    up with zeros: the Wasserstein distance for a cost that is the same for all pairs of tokens. Positions that are
    not aligned with a token boundary of the teacher have no distance. Boizard et al. 2024 (ULD), arXiv 2402.12030,
    section 3.

    Args:
        weight: λ ≥ 0, weight of the distance.
        cross_entropy: Weight of −log q, at least 0.
        reduction: Weighting of positions in both terms: `sequence_mean` averages over responses, `token_mean` over
            tokens.

    Raises:
        ConfigError: If a weight is negative or `reduction` is unknown.
    """

    compares_tokens = False

    def __init__(self, weight: float = 1.5, cross_entropy: float = 1.0, reduction: Reduction = "sequence_mean") -> None:
        super().__init__()
        for name, value in (("weight", weight), ("cross_entropy", cross_entropy)):
            check_range(f"ULD.{name}", value, 0)
        self.weight, self.cross_entropy = weight, cross_entropy
        self.reduction = checked_reduction("ULD", reduction)

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """Totals of both terms, `[2]`, over all positions, including those without a distance."""
        assert teacher is not None, "ULD needs a teacher"
        logq = target_log_probs(student, batch.targets)
        aligned = getattr(teacher, "aligned", None)  # scores of a teacher with the same tokenizer have none
        aligned = torch.ones_like(batch.targets, dtype=torch.bool) if aligned is None else aligned
        index = aligned.nonzero().squeeze(-1)
        distance = torch.zeros_like(logq).index_add(0, index, _distances(student.select(index), _at(teacher, index)))
        weights = position_weights(batch, self.reduction).to(distance)
        total = torch.stack([self.cross_entropy * -(weights * logq).sum(), self.weight * (weights * distance).sum()])
        metrics = {"distance": distance.detach()[index], "cross_entropy": -logq.detach(), "aligned": aligned.double()}
        return LossOutput(total, self.units(batch).to(total.device, non_blocking=True), metrics)

    def units(self, batch: Batch) -> Tensor:
        """Number of responses or of positions, depending on `reduction`, `[2]`."""
        return count_units(batch.lengths, self.reduction).expand(2)


def _at(teacher: Scores, index: Tensor) -> Scores:
    return Scores(teacher.hidden, teacher.head, teacher.vocab, teacher.top_k_ids, teacher.target_logp).select(index)


def _distances(student: Scores, teacher: Scores) -> Tensor:
    """Σ_k |p_(k) − q_(k)| of each position, `[n]`, a slice at a time; the backward pass recomputes them."""
    width = max(student.vocab, teacher.vocab)
    step = max(1, default_budget(student.hidden.device) // (_TENSORS * 4 * width))

    def slice_distances(part: slice, hidden: Tensor) -> Tensor:
        p = _sorted(teacher.log_probs(part), width)
        q = _sorted(Scores(hidden, student.head, student.vocab).log_probs(), width)
        return (p.to(q) - q).abs().sum(-1)

    distances: list[Tensor] = [
        checkpoint(slice_distances, part, student.hidden[part], use_reentrant=False)
        for part in slices(len(student.hidden), step)
    ]
    return torch.cat(distances) if distances else slice_distances(slice(0, 0), student.hidden)


def _sorted(log_probs: Tensor, width: int) -> Tensor:
    probs = log_probs.exp().sort(-1, descending=True).values
    return torch.nn.functional.pad(probs, (0, width - probs.shape[-1]))
