from importlib import resources

import pytest
import torch
import yaml
from distillkit import Sampling, registry
from distillkit.errors import ConfigError
from distillkit.testing import GeneratorContract

from my_plugin.generator import MyPlugin


class TestContract(GeneratorContract):
    """The contract of generators, one test per promise: a response per prompt, independent of its batch, and so on."""

    def make(self):
        return MyPlugin(min_p=0.2)


def test_only_tokens_close_to_the_most_likely_are_sampled():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    random = torch.Generator().manual_seed(0)
    sampled = {MyPlugin(min_p=0.3)._sample(probs.log(), 1.0, random) for _ in range(300)}
    assert sampled == {0, 1, 2}  # 0.3 · 0.5 = 0.15 is just enough


def test_temperature_0_selects_the_most_likely_token():
    assert MyPlugin()._sample(torch.tensor([0.0, 2.0, 1.0]), 0.0, torch.Generator()) == 1


def test_top_p_is_refused_if_it_would_take_effect():
    MyPlugin().check(Sampling(temperature=0.0, top_p=0.9))
    with pytest.raises(ConfigError, match=r"MyPlugin samples with min_p only, got top_p 0\.9 and top_k 0"):
        MyPlugin().check(Sampling(temperature=1.0, top_p=0.9))


def test_a_min_p_above_1_is_refused():
    with pytest.raises(ConfigError, match=r"MyPlugin\.min_p must lie in \[0, 1\], got 1\.5"):
        MyPlugin(1.5)


def test_the_configuration_names_the_installed_part():
    file = resources.files("my_plugin") / "my_method.yaml"
    config = yaml.safe_load(file.read_text())["model"]
    assert registry.get("generator", config["generator"]["class_path"]) is MyPlugin
    generator = MyPlugin(**config["generator"]["init_args"])
    generator.check(Sampling(**config["curator"]["init_args"]["sampling"]))
