"""The contract finds each kind of broken schedule, and says which promise it breaks."""

import re

import pytest
import torch
from torch import nn

from distillkit.interfaces import Schedule
from distillkit.schedules import Linear
from distillkit.testing import ScheduleContract, check_schedule


class Plain(Schedule):
    """A sound schedule that a broken one differs from in one line: it halves with each step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("number", torch.tensor(1.0))

    @property
    def value(self):
        return self.number

    def update(self, progress, metrics):
        self.number.fill_(0.5**progress.step)


class CountsItself(Plain):
    def update(self, progress, metrics):
        self.number *= 0.5


class MovesWhenRead(Plain):
    @property
    def value(self):
        self.number += 1e-3
        return self.number


class ForgetsItsState(Plain):
    def __init__(self):
        super().__init__()
        self.number_seen = 0.0

    def update(self, progress, metrics):
        self.number_seen += metrics["gap"].mean.item() if metrics else 0.0

    @property
    def value(self):
        return torch.tensor(self.number_seen)


class IsTrained(Plain):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    @property
    def value(self):
        return self.weight * self.number


class IsAVector(Plain):
    @property
    def value(self):
        return self.number[None]


class Explodes(Plain):
    def update(self, progress, metrics):
        self.number.fill_(1.0 / (10 - progress.step) if progress.step != 10 else torch.inf)


class DividesByTheGap(Plain):
    def for_rows(self, gap):
        return (0.1 / gap).detach()


class FollowsTheGap(Plain):
    def for_rows(self, gap):
        return gap * 2


class ForgetsTheType(Plain):
    def for_rows(self, gap):
        return self.number.expand_as(gap)


class LosesPrecision(Plain):
    def update(self, progress, metrics):
        self.number.fill_(1 / 3)

    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (CountsItself, "a second update with the same progress must not change it"),
        (MovesWhenRead, "reading it must not change it"),
        (ForgetsItsState, "its buffers must contain its state of step 3"),
        (IsTrained, "value must carry no gradient"),
        (IsAVector, r"value must be 0-dim, got \[1\]"),
        (Explodes, "value must be finite, got inf after step 10 of 20"),
        (DividesByTheGap, "for_rows must be finite"),
        (FollowsTheGap, "for_rows must carry no gradient"),
        (ForgetsTheType, "for_rows must return torch.float64, got torch.float32"),
        (LosesPrecision, "a cast to torch.bfloat16 must not change its buffers"),
    ],
)
def test_a_broken_schedule_is_found(broken, promise):
    found = failures(broken())
    assert any(re.search(promise, sentence) for sentence in found), found
    assert all(sentence.startswith(f"{broken.__name__} breaks its contract: ") for sentence in found)


def failures(schedule):
    """What each promise says about a schedule."""
    contract = ScheduleContract()
    contract.make = lambda: schedule
    found = []
    for name in dir(contract):
        if name.startswith("test_"):
            try:
                getattr(contract, name)()
            except AssertionError as error:
                found.append(str(error))
    return found


def test_a_sound_schedule_passes_and_is_not_changed():
    assert failures(Plain()) == []
    schedule = Linear(0.0, 1.0)
    check_schedule(schedule)
    assert schedule.value.item() == 0.0


def test_the_contract_asks_for_a_schedule():
    with pytest.raises(NotImplementedError, match="write make"):
        ScheduleContract().test_is_a_finite_number_without_gradient()
