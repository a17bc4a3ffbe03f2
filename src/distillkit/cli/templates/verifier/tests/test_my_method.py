from importlib import resources

import pytest
import yaml
from distillkit import registry
from distillkit.errors import ConfigError
from distillkit.testing import VerifierContract
from distillkit.types import Prompt, Prompts, Response

from my_plugin.verifier import MyPlugin


class TestContract(VerifierContract):
    """The contract of verifiers, one test per promise: a finite score per response, independent of the batch."""

    def make(self):
        return MyPlugin(shortest=1)


@pytest.mark.parametrize(
    ("text", "expected"), [("Paris, a CITY on the Seine.", 1.0), ("A city.", 1 / 3), ("I do not know.", 0.0)]
)
def test_it_counts_the_words_of_the_reference(text, expected):
    prompts = Prompts((Prompt("an id", (), (5,), reference="The city of Paris is on the Seine."),))
    assert MyPlugin(shortest=4).verify(prompts, [Response("an id", (6,), text, "stop")]) == [expected]


def test_a_minimum_of_0_letters_is_refused():
    with pytest.raises(ConfigError, match=r"MyPlugin\.shortest must be at least 1 letter, got 0"):
        MyPlugin(0)


def test_the_configuration_names_the_installed_part():
    file = resources.files("my_plugin") / "my_method.yaml"
    config = yaml.safe_load(file.read_text())
    verifier = config["model"]["curator"]["init_args"]["verifier"]
    assert registry.get("verifier", verifier["class_path"]) is MyPlugin
    MyPlugin(**verifier["init_args"])
