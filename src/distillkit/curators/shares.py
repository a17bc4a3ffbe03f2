"""Draws that depend on a seed, the round and the prompt alone, and the shares that they are compared with."""

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from distillkit.errors import ConfigError
from distillkit.interfaces import Schedule
from distillkit.types import Progress, Summary


def drawn(seed: int, round_number: int, prompt_id: str) -> float:
    """A uniform number in [0, 1) for a prompt in a round: the same on every rank and in a resumed run."""
    text = f"share/{seed}/{round_number}/{prompt_id}"  # not the text of a response's seed: the two must not go together
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 11) / 2**53


class RoundShare(nn.Module):
    """A share in [0, 1] that is read when a round starts, and kept for that round.

    The shares of the last two rounds are part of the checkpoint: a run that resumes within a round asks for it again,
    when a schedule has moved on, and the round after it may be written already.

    Args:
        name: What errors call it, such as `ReplayCurator.replay`.
        share: The share, or a schedule of it.

    Raises:
        ConfigError: If it is a number outside [0, 1].
    """

    def __init__(self, name: str, share: float | Schedule) -> None:
        super().__init__()
        self.name = name
        self.schedule = share if isinstance(share, Schedule) else None
        self._fixed = 0.0 if isinstance(share, Schedule) else self._checked(share)
        self._kept: dict[int, float] = {}

    def at(self, round_number: int) -> float:
        """The share in a round.

        Raises:
            ConfigError: If the schedule gives a number outside [0, 1].
        """
        if self.schedule is None:
            return self._fixed
        if round_number not in self._kept:
            share = self._checked(float(self.schedule.value))
            self._kept = dict([*self._kept.items()][-1:]) | {round_number: share}
        return self._kept[round_number]

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Moves the schedule; called as `Schedule.update` is."""
        if self.schedule is not None:
            self.schedule.update(progress, metrics)

    def get_extra_state(self) -> dict[str, Any]:
        """The last two rounds and their shares."""
        return {"kept": [[number, share] for number, share in self._kept.items()]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes up what was saved."""
        self._kept = {int(number): float(share) for number, share in state["kept"]}

    def _checked(self, share: float) -> float:
        if not 0 <= share <= 1:
            raise ConfigError(f"{self.name} must lie in [0, 1], got {share}.")
        return share
