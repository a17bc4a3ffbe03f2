"""Schedules that would never move, and metrics that would hide those of the run, are one line before training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distillkit import DistillModule, Student
from distillkit.curators import StudentCurator
from distillkit.errors import PluginError
from distillkit.losses import CrossEntropy
from distillkit.schedules import Linear
from distillkit.training.checks import check_output
from distillkit.training.schedule_checks import RUN_NAMES
from distillkit.types import LossOutput

LOG_NAMES = Path(__file__).parent.parent / "frozen" / "log_names.txt"


class Holder(CrossEntropy):
    """A loss with more attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class HoldingCurator(StudentCurator):
    """A curator with more attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def ramp() -> Linear:
    return Linear(0.0, 1.0)


@pytest.mark.parametrize("holder", [Holder, HoldingCurator])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        ([ramp()], "parts"),
        ((ramp(), 2), "parts"),
        ({"a": ramp()}, "parts"),
        (nn.ModuleList([ramp()]), r"parts\.0"),
        (nn.Sequential(nn.ModuleList([ramp()])), r"parts\.0\.0"),
    ],
)
def test_a_schedule_that_is_never_updated_is_named(holder: Any, value: Any, name: str) -> None:
    part = holder(parts=value)
    parts = {"loss": part} if holder is Holder else {"loss": CrossEntropy(), "curator": part}
    with pytest.raises(
        PluginError, match=rf"^{holder.__name__}\.{name} holds a schedule that is never updated: assign"
    ):
        DistillModule(Student("./student"), **parts)


def test_schedules_in_attributes_are_accepted_by_any_other_name() -> None:
    DistillModule(Student("./student"), Holder(q=ramp()), curator=HoldingCurator(lr=ramp()))


@pytest.mark.parametrize("name", sorted(RUN_NAMES))
def test_a_name_that_the_run_logs_is_refused(name: str) -> None:
    message = rf"^Holder, as a {{}}, logs '{name}', but train/{name} is logged by the run itself: choose another name"
    with pytest.raises(PluginError, match=message.format("schedule")):
        DistillModule(Student("./student"), Holder(**{name: ramp()}))
    output = LossOutput(torch.zeros(()), torch.ones(()), {name: torch.zeros(3)})
    with pytest.raises(PluginError, match=message.format("metric")):
        check_output(Holder(), output, torch.ones(()))


def test_the_names_are_those_that_every_run_and_the_callbacks_log() -> None:
    lines = [line.split(": ") for line in LOG_NAMES.read_text().splitlines() if line.startswith("train/")]
    logged = {name.removeprefix("train/") for name, origin in lines if origin.startswith(("every method", "callback"))}
    assert logged | {"skipped_steps"} == RUN_NAMES
