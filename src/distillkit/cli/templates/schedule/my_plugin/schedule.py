"""A schedule: a value that changes during training."""

from collections.abc import Mapping

import torch
from distillkit.errors import ConfigError
from distillkit.interfaces import Schedule
from distillkit.types import Progress, Summary
from torch import Tensor


class MyPlugin(Schedule):
    """Exponential change from `start` to `end`: start · (end / start)^(completed fraction of training).

    Args:
        start: Value before the first step, above 0.
        end: Value after the last step, above 0.

    Raises:
        ConfigError: If `start` or `end` is not above 0.
    """

    _value: Tensor

    def __init__(self, start: float, end: float) -> None:
        super().__init__()
        if not (start > 0 and end > 0):
            raise ConfigError(f"MyPlugin.start and .end must be above 0, got {start} and {end}.")
        self.start, self.end = start, end
        # Buffers are saved in checkpoints.
        self.register_buffer("_value", torch.tensor(start, dtype=torch.float32))

    @property
    def value(self) -> Tensor:
        """The current value, a 0-dim tensor."""
        return self._value

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Sets the value for `progress`. `metrics`, the loss's metrics of the last step, are not used here."""
        self._value.fill_(self.start * (self.end / self.start) ** progress.fraction)
