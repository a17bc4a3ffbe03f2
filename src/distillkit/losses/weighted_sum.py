"""Weighted sum of losses."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distillkit.errors import ConfigError
from distillkit.interfaces import Loss, Schedule
from distillkit.types import Batch, LossOutput, Progress, Scores, Summary


class WeightedSum(Loss):
    """Σ weight · loss over several losses, each averaged over its own units.

    Args:
        losses: Losses to add.
        weights: Weight of each loss, in the same order.

    Raises:
        ConfigError: If there is no loss, or not one weight for each loss.
    """

    def __init__(self, losses: list[Loss], weights: list[float]) -> None:
        super().__init__()
        if not losses or len(losses) != len(weights):
            raise ConfigError(
                f"WeightedSum needs one weight for each loss, got {len(losses)} losses and {len(weights)} weights."
            )
        self.losses = nn.ModuleList(losses)
        self.weights = tuple(weights)
        self.needs_teacher = any(loss.needs_teacher for loss in losses)  # type: ignore[misc]
        self.contrasts_sides = any(loss.contrasts_sides for loss in losses)  # type: ignore[misc]

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """Returns the weighted totals as components; metrics are prefixed with the index and name of their loss."""
        outputs = [loss(student, teacher, batch) for loss in self.losses]
        totals = [weight * output.total.reshape(-1) for weight, output in zip(self.weights, outputs, strict=True)]
        metrics = {
            f"{prefix}{name}": value
            for prefix, output in zip(self._prefixes(), outputs, strict=True)
            for name, value in output.metrics.items()
        }
        return LossOutput(torch.cat(totals), torch.cat([output.units.reshape(-1) for output in outputs]), metrics)

    def units(self, batch: Batch) -> Tensor:
        """Returns the units of the losses, `[C]`."""
        return torch.cat([loss.units(batch).reshape(-1) for loss in self._parts()])

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Updates each loss with its own metrics, and with those of a validation."""
        validation = {name: value for name, value in metrics.items() if name.startswith("val/")}
        for prefix, loss in zip(self._prefixes(), self._parts(), strict=True):
            loss_metrics = {name[len(prefix) :]: value for name, value in metrics.items() if name.startswith(prefix)}
            loss.update(progress, loss_metrics | validation)

    def schedules(self) -> Mapping[str, Schedule]:
        """Returns the schedules of the losses, prefixed as their metrics are."""
        parts = zip(self._prefixes(), self._parts(), strict=True)
        return {f"{prefix}{name}": value for prefix, loss in parts for name, value in loss.schedules().items()}

    def _prefixes(self) -> list[str]:
        """The prefix of each loss's metrics: its index and name."""
        return [f"{index}_{type(loss).__name__}/" for index, loss in enumerate(self._parts())]

    def _parts(self) -> Sequence[Loss]:
        return tuple(self.losses)  # type: ignore[arg-type]
