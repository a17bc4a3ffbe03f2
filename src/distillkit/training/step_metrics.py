"""Metrics of a loss, reduced over the micro-batches of an optimizer step and over all ranks."""

from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from distillkit.devices.distributed import is_initialized
from distillkit.interfaces import Schedule
from distillkit.types import Summary


class StepMeter:
    """Sum, count, minimum and maximum of each metric since the last `reduce`."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}  # name -> [sum, count] and [min, -max]
        self._loss: list[Tensor] = []

    def add(self, metrics: Mapping[str, Tensor], loss: Tensor) -> None:
        """Adds a micro-batch.

        Args:
            metrics: Scalars, or one value per row or position.
            loss: `[]` this rank's part of the step's loss, times the number of ranks; summed over micro-batches.
        """
        self._loss.append(loss.detach())
        for name, values in metrics.items():
            self._count(name, values)

    def _count(self, name: str, values: Tensor) -> None:
        values = values.detach().double().flatten()
        pair = torch.stack([values.sum(), values.new_full((), float(values.numel()))])
        infinite = values.new_full((1,), torch.inf)
        ends = torch.stack([torch.cat([values, infinite]).amin(), torch.cat([-values, infinite]).amin()])
        if name in self._sums:
            old_pair, old_ends = self._sums[name]
            pair, ends = old_pair + pair, torch.minimum(old_ends, ends)
        self._sums[name] = [pair, ends]

    def reduce(self) -> dict[str, Summary]:
        """Returns each metric over all ranks, and resets. All ranks must have the same names."""
        if not self._loss:
            return {}
        self._count("loss", torch.stack(self._loss).sum())
        self._loss = []
        names = sorted(self._sums)
        pairs = torch.stack([self._sums[name][0] for name in names])  # [K, 2]
        ends = torch.stack([self._sums[name][1] for name in names])  # [K, 2]
        self._sums = {}
        if is_initialized():
            dist.all_reduce(pairs, dist.ReduceOp.SUM)
            dist.all_reduce(ends, dist.ReduceOp.MIN)
        means = pairs[:, 0] / pairs[:, 1].clamp_min(1.0)
        return {name: Summary(means[i], ends[i, 0], -ends[i, 1], pairs[i, 1]) for i, name in enumerate(names)}


def flatten(summaries: Mapping[str, Summary], schedules: Mapping[str, Schedule]) -> dict[str, Tensor]:
    """Values for a logger: the mean of each metric, and of schedules that vary by row also the smallest and largest.

    Args:
        summaries: The metrics of a step.
        schedules: The schedules that are logged, by name.
    """
    values = {name: summary.mean.float() for name, summary in summaries.items()}
    for name, schedule in schedules.items():
        if name in summaries and type(schedule).for_rows is not Schedule.for_rows:
            values |= {f"{name}_min": summaries[name].min.float(), f"{name}_max": summaries[name].max.float()}
    return values


def current_values(schedules: Mapping[str, Schedule], metrics: Collection[str]) -> dict[str, Tensor]:
    """Copies of the values of schedules, by name, and of their own metrics; without those that a loss reports itself.

    Args:
        schedules: The schedules that are logged, by name.
        metrics: Names of the metrics that the loss reports.
    """
    values: dict[str, Tensor] = {}
    for name, schedule in schedules.items():
        if name not in metrics:
            values[name] = schedule.value.detach().float().clone()
            values |= {f"{name}/{key}": value.float() for key, value in schedule.metrics().items()}
    return values
