"""Reduces what a loss reports over the micro-batches of an optimizer step and over all ranks."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from distillkit.types import Summary


class StepMeter:
    """Sum, count, minimum and maximum of each metric since the last `reduce`."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}  # name -> [sum, count] and [min, -max]
        self._loss: list[Tensor] = []

    def add(self, metrics: Mapping[str, Tensor], loss: Tensor) -> None:
        """Counts in a micro-batch.

        Args:
            metrics: Scalars, or one value per row or position.
            loss: `[]` this rank's share of the step's loss times the ranks; shares add up over micro-batches.
        """
        self._loss.append(loss.detach())
        for name, values in metrics.items():
            self._count(name, values)

    def _count(self, name: str, values: Tensor) -> None:
        values = values.detach().double().flatten()
        pair = torch.stack([values.sum(), values.new_tensor(float(values.numel()))])
        infinite = values.new_full((1,), torch.inf)
        ends = torch.stack([torch.cat([values, infinite]).amin(), torch.cat([-values, infinite]).amin()])
        if name in self._sums:
            old_pair, old_ends = self._sums[name]
            pair, ends = old_pair + pair, torch.minimum(old_ends, ends)
        self._sums[name] = [pair, ends]

    def reduce(self) -> dict[str, Summary]:
        """Each metric over all ranks, and starts anew. Ranks must have the same names."""
        if not self._loss:
            return {}
        self._count("loss", torch.stack(self._loss).sum())
        self._loss = []
        names = sorted(self._sums)
        pairs = torch.stack([self._sums[name][0] for name in names])  # [K, 2]
        ends = torch.stack([self._sums[name][1] for name in names])  # [K, 2]
        self._sums = {}
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(pairs, dist.ReduceOp.SUM)
            dist.all_reduce(ends, dist.ReduceOp.MIN)
        means = pairs[:, 0] / pairs[:, 1].clamp_min(1.0)
        return {name: Summary(means[row], ends[row, 0], -ends[row, 1], pairs[row, 1]) for row, name in enumerate(names)}


def flatten(summaries: Mapping[str, Summary], prefix: str) -> dict[str, Tensor]:
    """Figures for a logger: each metric's mean, and the smallest and largest α of a row."""
    figures = {prefix + name: summary.mean.float() for name, summary in summaries.items()}
    for name, summary in summaries.items():
        if name.rpartition("/")[2].startswith("alpha"):
            figures |= {f"{prefix}{name}_min": summary.min.float(), f"{prefix}{name}_max": summary.max.float()}
    return figures
