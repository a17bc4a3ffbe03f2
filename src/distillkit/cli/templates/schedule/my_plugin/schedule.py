"""A number that moves with training."""

from collections.abc import Mapping

import torch
from distillkit.errors import ConfigError
from distillkit.interfaces import Schedule
from distillkit.types import Progress, Summary
from torch import Tensor


class MyPlugin(Schedule):
    """From `start` to `end` by the same factor in every step, start · (end / start)^(share of training that is done).

    Args:
        start: Number before the first step, above 0.
        end: Number after the last step, above 0.

    Raises:
        ConfigError: If a number is not above 0.
    """

    _value: Tensor

    def __init__(self, start: float, end: float) -> None:
        super().__init__()
        if not (start > 0 and end > 0):
            raise ConfigError(f"MyPlugin.start and .end must be above 0, got {start} and {end}.")
        self.start, self.end = start, end
        # State in a buffer is saved in checkpoints.
        self.register_buffer("_value", torch.tensor(start, dtype=torch.float32))

    @property
    def value(self) -> Tensor:
        """The number now: 0-dim."""
        return self._value

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Moves to `progress`; `metrics` holds what the loss reported in the step that ended, and is not read."""
        self._value.fill_(self.start * (self.end / self.start) ** progress.fraction)
