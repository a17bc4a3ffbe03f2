"""Several losses as one."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distillkit.errors import ConfigError
from distillkit.interfaces import Loss
from distillkit.types import Batch, LossOutput, Progress, Scores, Summary


class WeightedSum(Loss):
    """Σ weight · loss over several losses, each with a mean of its own over its own units.

    Args:
        losses: The losses.
        weights: A weight for each of them, in the same order.

    Raises:
        ConfigError: If there is no loss, or not one weight for each.
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

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """The parts' totals, weighted, one component after the other; metrics are prefixed with the part's place."""
        outputs = [loss(student, teacher, batch) for loss in self.losses]
        totals = [weight * output.total.reshape(-1) for weight, output in zip(self.weights, outputs, strict=True)]
        metrics = {
            f"{place}_{type(loss).__name__}/{name}": value
            for place, (loss, output) in enumerate(zip(self.losses, outputs, strict=True))
            for name, value in output.metrics.items()
        }
        return LossOutput(torch.cat(totals), torch.cat([output.units.reshape(-1) for output in outputs]), metrics)

    def units(self, batch: Batch) -> Tensor:
        """The parts' units, `[C]`."""
        return torch.cat([loss.units(batch).reshape(-1) for loss in self._parts()])

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Hands each part its own metrics, and all of them those of a validation."""
        of_all = {name: value for name, value in metrics.items() if name.startswith("val/")}
        for place, loss in enumerate(self._parts()):
            prefix = f"{place}_{type(loss).__name__}/"
            own = {name[len(prefix) :]: value for name, value in metrics.items() if name.startswith(prefix)}
            loss.update(progress, own | of_all)

    def _parts(self) -> Sequence[Loss]:
        return tuple(self.losses)  # type: ignore[arg-type]
