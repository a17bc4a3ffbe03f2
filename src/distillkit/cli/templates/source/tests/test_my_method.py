from importlib import resources

import pytest
import yaml
from distillkit import registry
from distillkit.errors import ConfigError
from distillkit.testing import SourceContract

from my_plugin.source import MyPlugin


class TestContract(SourceContract):
    """The contract of sources, one test per promise: valid conversations, the same each time."""

    def make(self):
        return MyPlugin(num_prompts=5)


def test_the_answer_is_the_sum():
    for record in MyPlugin(num_prompts=20, largest=9).records():
        question, answer = (message["content"] for message in record.messages)
        first, second = question.removeprefix("What is ").removesuffix("?").split(" + ")
        assert int(answer) == int(first) + int(second)


def test_another_seed_gives_other_prompts():
    assert MyPlugin(seed=1).records() != MyPlugin(seed=2).records()


@pytest.mark.parametrize("name", ["num_prompts", "largest"])
def test_a_number_below_1_is_refused(name):
    with pytest.raises(ConfigError, match=rf"MyPlugin\.{name} must be at least 1, got 0"):
        MyPlugin(**{name: 0})


def test_the_configuration_names_the_installed_part():
    file = resources.files("my_plugin") / "my_method.yaml"
    source = yaml.safe_load(file.read_text())["data"]["train"]
    assert registry.get("source", source["class_path"]) is MyPlugin
    assert len(MyPlugin(**source["init_args"]).records()) == 100
