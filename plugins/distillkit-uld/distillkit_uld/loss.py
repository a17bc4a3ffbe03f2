"""The loss of ULD."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distillkit.errors import ConfigError
from distillkit.interfaces import Loss
from distillkit.losses.budget import default_budget
from distillkit.losses.likelihood import target_log_probs
from distillkit.losses.slicing import slices
from distillkit.losses.token import checked_reduction, count_units, position_weights
from distillkit.types import Batch, LossOutput, Reduction, Scores

_TENSORS = 8
"""`[n, V]` tensors that are alive at once."""


class ULD(Loss):
    """−log q of the response, and the distance between the two distributions sorted: the tokens don't matter.

    Per position Σ_k |p_(k) − q_(k)|, where p_(k) is the k-th largest probability and the smaller vocabulary is filled
    up with zeros: the Wasserstein distance for a cost that is the same for all pairs of tokens. Positions whose text
    the teacher has not read in whole tokens of its own have none. Boizard et al. 2024 (ULD), arXiv 2402.12030, section
    3.

    Args:
        weight: λ ≥ 0, weight of the distance.
        cross_entropy: Weight of −log q, at least 0.
        reduction: How positions are weighed, in both.

    Raises:
        ConfigError: If a weight is negative or `reduction` is unknown.
    """

    compares_tokens = False

    def __init__(self, weight: float = 1.5, cross_entropy: float = 1.0, reduction: Reduction = "sequence_mean") -> None:
        super().__init__()
        for name, value in (("weight", weight), ("cross_entropy", cross_entropy)):
            if not value >= 0:
                raise ConfigError(f"ULD.{name} must be at least 0, got {value}.")
        self.weight, self.cross_entropy = weight, cross_entropy
        self.reduction = checked_reduction("ULD", reduction)

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """Both terms, `[2]`; both are means over all positions, those without a distance included."""
        assert teacher is not None, "ULD needs a teacher"
        logq = target_log_probs(student, batch.targets)
        same = getattr(teacher, "aligned", None)
        same = torch.ones_like(batch.targets, dtype=torch.bool) if same is None else same
        index = same.nonzero().squeeze(-1)
        distance = torch.zeros_like(logq).index_add(0, index, _distances(student.select(index), _at(teacher, index)))
        weights = position_weights(batch, self.reduction).to(distance)
        total = torch.stack([
            self.cross_entropy * -(weights * logq).sum(), self.weight * (weights * distance).sum(),
        ])  # fmt: skip
        metrics = {"distance": distance.detach()[index], "cross_entropy": -logq.detach(), "aligned": same.double()}
        return LossOutput(total, self.units(batch).to(total.device), metrics)

    def units(self, batch: Batch) -> Tensor:
        """Responses or positions, as `reduction` says, `[2]`."""
        return count_units(batch.lengths, self.reduction).expand(2)


def _at(teacher: Scores, index: Tensor) -> Scores:
    return Scores(teacher.hidden, teacher.head, teacher.vocab, teacher.support, teacher.own).select(index)


def _distances(student: Scores, teacher: Scores) -> Tensor:
    """Σ_k |p_(k) − q_(k)| of each position, `[n]`, a slice at a time; log-probabilities are computed again backward."""
    width = max(student.vocab, teacher.vocab)
    step = max(1, default_budget(student.hidden.device) // (_TENSORS * 4 * width))

    def of(part: slice, hidden: Tensor) -> Tensor:
        own = Scores(hidden, student.head, student.vocab)
        p, q = (_sorted(scores.log_probs(place), width) for scores, place in ((teacher, part), (own, slice(None))))
        return (p.to(q) - q).abs().sum(-1)

    found: list[Any] = [
        checkpoint(of, part, student.hidden[part], use_reentrant=False) for part in slices(len(student.hidden), step)
    ]
    return torch.cat(found) if found else of(slice(0, 0), student.hidden)


def _sorted(log_probs: Tensor, width: int) -> Tensor:
    probs = log_probs.exp().sort(-1, descending=True).values
    return torch.nn.functional.pad(probs, (0, width - probs.shape[-1]))
