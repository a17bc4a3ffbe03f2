from importlib import resources

import pytest
import torch
import yaml
from distillkit import registry
from distillkit.errors import ConfigError
from distillkit.testing import TokenLossContract

from my_plugin.loss import MyPlugin


class TestContract(TokenLossContract):
    """The contract of losses, one test per promise: zero at p = q, never negative, finite gradients, and so on."""

    def make(self):
        return MyPlugin(alpha=0.3)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 9, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2)]


def test_order_one_half_is_the_bhattacharyya_distance(pair):
    p, q = (log_probs.exp() for log_probs in pair)
    torch.testing.assert_close(MyPlugin(0.5).divergence(*pair), -2.0 * (p * q).sqrt().sum(-1).log())


def test_near_order_one_it_is_the_forward_kl(pair):
    logp, logq = pair
    expected = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(MyPlugin(1.0 - 1e-6).divergence(logp, logq), expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_orders_0_and_1_are_refused(alpha):
    with pytest.raises(ConfigError, match=rf"MyPlugin\.alpha must lie strictly between 0 and 1, got {alpha}"):
        MyPlugin(alpha)


def test_the_configuration_names_the_installed_part():
    file = resources.files("my_plugin") / "my_method.yaml"
    config = yaml.safe_load(file.read_text())
    loss = config["model"]["loss"]
    assert registry.get("loss", loss["class_path"]) is MyPlugin
    MyPlugin(**loss["init_args"])
