from importlib import resources

import pytest
import yaml
from distillkit import registry
from distillkit.errors import ConfigError
from distillkit.testing import ScheduleContract
from distillkit.types import Progress

from my_plugin.schedule import MyPlugin


class TestContract(ScheduleContract):
    """The contract of schedules, one test per promise: finite, without gradient, restored from checkpoints."""

    def make(self):
        return MyPlugin(start=0.1, end=0.8)


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (5, 0.1), (10, 0.01)])
def test_it_changes_by_the_same_factor_in_every_step(step, expected):
    schedule = MyPlugin(start=1.0, end=0.01)
    schedule.update(Progress(step, 10), {})
    assert float(schedule.value) == pytest.approx(expected)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, -0.5)])
def test_a_value_that_is_not_above_zero_is_refused(start, end):
    with pytest.raises(ConfigError, match=rf"must be above 0, got {start} and {end}"):
        MyPlugin(start, end)


def test_the_configuration_names_the_installed_part():
    file = resources.files("my_plugin") / "my_method.yaml"
    config = yaml.safe_load(file.read_text())
    schedule = config["model"]["loss"]["init_args"]["beta"]
    assert registry.get("schedule", schedule["class_path"]) is MyPlugin
    MyPlugin(**schedule["init_args"])
