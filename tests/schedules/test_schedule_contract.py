"""Every installed schedule keeps the promises of `distillkit.testing`."""

import pytest

from distillkit import registry
from distillkit.schedules import AdaptiveAlpha
from distillkit.testing import ScheduleContract, check_schedule

# How to make a schedule whose constructor asks for something.
ARGUMENTS = {
    "Constant": {"constant": 0.3},
    "Cosine": {"start": 1.0, "end": 0.0},
    "Linear": {"start": 0.5, "end": 0.75, "until": 0.5},
    "Piecewise": {"points": [(0.0, 1.0), (0.5, 0.2), (0.5, 0.8)]},
}
INSTALLED = registry.available("schedule")


def test_all_built_in_schedules_are_installed():
    assert {"AdaptiveAlpha", "Constant", "Cosine", "Linear", "Piecewise"} <= set(INSTALLED)


@pytest.mark.parametrize("name", INSTALLED)
def test_every_installed_schedule_keeps_the_contract(name):
    check_schedule(registry.get("schedule", name)(**ARGUMENTS.get(name, {})))


class TestShortWarmUp(ScheduleContract):
    def make(self):
        return AdaptiveAlpha(initial=0.0, min=0.0, max=0.9, warmup_steps=2)
