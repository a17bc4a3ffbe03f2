"""Random choices per prompt and round, reproducible on every rank, and the shares they are compared with."""

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from distillkit.errors import check_range
from distillkit.interfaces import Schedule
from distillkit.types import Progress, Summary


def uniform_draw(seed: int, round_index: int, prompt_id: str) -> float:
    """A uniform random number in [0, 1) for a prompt in a round: the same on every rank and in a resumed run."""
    text = f"share/{seed}/{round_index}/{prompt_id}"  # not the text of a response's seed: they are independent
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 11) / 2**53


class RoundShare(nn.Module):
    """A share in [0, 1] that is read when a round starts and stays fixed for that round.

    The shares of the last two rounds are part of the checkpoint: a run that resumes within a round needs the share of
    its start, after the schedule has moved on, and the next round may already have been generated.

    Args:
        name: The setting's name in error messages, such as `ReplayCurator.replay`.
        share: A fixed number, or a schedule.

    Raises:
        ConfigError: If it is a number outside [0, 1].
    """

    def __init__(self, name: str, share: float | Schedule) -> None:
        super().__init__()
        self.name = name
        self.schedule = share if isinstance(share, Schedule) else None
        self._fixed = 0.0 if isinstance(share, Schedule) else self._checked(share)
        self._by_round: dict[int, float] = {}

    def at(self, round_index: int) -> float:
        """Returns the share in a round.

        Raises:
            ConfigError: If the schedule gives a number outside [0, 1].
        """
        if self.schedule is None:
            return self._fixed
        if round_index not in self._by_round:
            share = self._checked(float(self.schedule.value))
            self._by_round = dict([*self._by_round.items()][-1:]) | {round_index: share}
        return self._by_round[round_index]

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Updates the schedule; called as `Schedule.update` is."""
        if self.schedule is not None:
            self.schedule.update(progress, metrics)

    def schedules(self) -> dict[str, Schedule]:
        """The schedule by the setting's name, without the class; empty for a fixed number."""
        return {} if self.schedule is None else {self.name.rpartition(".")[2]: self.schedule}

    def get_extra_state(self) -> dict[str, Any]:
        """The last two rounds and their shares."""
        return {"kept": [[round_index, share] for round_index, share in self._by_round.items()]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the saved shares."""
        self._by_round = {int(round_index): float(share) for round_index, share in state["kept"]}

    def _checked(self, share: float) -> float:
        check_range(self.name, share, 0, 1)
        return share
