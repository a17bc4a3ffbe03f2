"""Fixed schedules: values that depend only on the completed share of training."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distillkit.errors import ConfigError, check_range
from distillkit.interfaces import Schedule
from distillkit.types import Progress, Summary


class FixedSchedule(Schedule):
    """Template for schedules whose value depends only on the completed share of training."""

    _value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_value", torch.tensor(self.at(0.0), dtype=torch.float32))

    @abstractmethod
    def at(self, fraction: float) -> float:
        """Returns the value when `fraction`, in [0, 1], of the optimizer steps is done."""

    @property
    def value(self) -> Tensor:
        """The current value, 0-dim."""
        return self._value

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Sets the value for `progress`; ignores `metrics`."""
        self._value.fill_(self.at(progress.fraction))


class Constant(FixedSchedule):
    """A value that never changes.

    Args:
        constant: The value.
    """

    def __init__(self, constant: float) -> None:
        self.constant = constant
        super().__init__()

    def at(self, fraction: float) -> float:
        return self.constant


class _Ramp(FixedSchedule):
    """Template for ramps from `start` to `end` over a first share of training."""

    def __init__(self, start: float, end: float, until: float = 1.0) -> None:
        note = ", a share of the optimizer steps"
        check_range(f"{type(self).__name__}.until", until, 0, 1, closed="right", note=note)
        self.start, self.end, self.until = start, end, until
        super().__init__()

    def done(self, fraction: float) -> float:
        """Returns the completed share of the ramp, in [0, 1]."""
        return min(fraction / self.until, 1.0)


class Linear(_Ramp):
    """A linear ramp from `start` to `end` over the first `until` of training, then constant.

    Args:
        start: Value before the first step.
        end: Final value.
        until: Share of the optimizer steps after which the final value is reached, in (0, 1].

    Raises:
        ConfigError: If `until` is outside (0, 1].
    """

    def at(self, fraction: float) -> float:
        """Returns `start + (end − start) · fraction / until`, at most `end`."""
        return self.start + (self.end - self.start) * self.done(fraction)


class Cosine(_Ramp):
    """Half a cosine from `start` to `end` over the first `until` of training, then constant.

    Args:
        start: Value before the first step.
        end: Final value.
        until: Share of the optimizer steps after which the final value is reached, in (0, 1].

    Raises:
        ConfigError: If `until` is outside (0, 1].
    """

    def at(self, fraction: float) -> float:
        """Returns `end + (start − end) · (1 + cos(π · fraction / until)) / 2`."""
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * self.done(fraction)))


class Piecewise(FixedSchedule):
    """Linear interpolation between points; constant before the first and after the last.

    Args:
        points: Pairs of a share of the optimizer steps in [0, 1] and the value at it, in ascending order of the share.
            Two points with the same share are a jump to the second value.

    Raises:
        ConfigError: If there is no point, or a share is outside [0, 1] or smaller than the one before.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        shares = [share for share, _ in points]
        if not points or shares != sorted(shares) or shares[0] < 0 or shares[-1] > 1:
            raise ConfigError(
                f"Piecewise.points needs pairs [share, value] with ascending shares in [0, 1], got {points}."
            )
        self.points = tuple((share, value) for share, value in points)
        super().__init__()

    def at(self, fraction: float) -> float:
        """Returns the value interpolated between the two points around `fraction`."""
        below = [point for point in self.points if point[0] <= fraction]
        above = [point for point in self.points if point[0] > fraction]
        if not below:
            return above[0][1]
        if not above:
            return below[-1][1]
        (left, start), (right, end) = below[-1], above[0]
        return start + (end - start) * (fraction - left) / (right - left)
