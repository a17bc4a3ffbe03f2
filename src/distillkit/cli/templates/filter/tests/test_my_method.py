from importlib import resources

import pytest
import yaml
from distillkit import registry
from distillkit.errors import ConfigError
from distillkit.testing import FilterContract
from distillkit.types import Row

from my_plugin.filter import MyPlugin


class TestContract(FilterContract):
    """The contract of filters, one test per promise: a decision for each row, the same each time."""

    def make(self):
        return MyPlugin()


@pytest.mark.parametrize(("num_tokens", "refused"), [(0, True), (2, True), (3, False), (9, False)])
def test_it_counts_the_tokens_of_the_response(num_tokens, refused):
    row = Row((5,) * (4 + num_tokens), (False,) * 4 + (True,) * num_tokens, "student", "an id")
    assert MyPlugin(min_tokens=3).refuses(row) is refused


def test_a_minimum_of_0_tokens_is_refused():
    with pytest.raises(ConfigError, match=r"MyPlugin\.min_tokens must be at least 1, got 0"):
        MyPlugin(0)


def test_the_configuration_names_the_installed_part():
    file = resources.files("my_plugin") / "my_method.yaml"
    config = yaml.safe_load(file.read_text())
    (part,) = config["model"]["curator"]["init_args"]["filters"]
    assert registry.get("filter", part["class_path"]) is MyPlugin
    assert MyPlugin(**part["init_args"]).min_tokens == 2
