"""Every installed loss, with its defaults and with others, keeps the promises of `distillkit.testing`."""

import pytest
import torch

from distillkit import registry
from distillkit.losses import (
    DPKD,
    CrossEntropy,
    DistiLLM2,
    ForwardKL,
    GeneralizedJSD,
    JeffreysKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
    WeightedSum,
)
from distillkit.schedules import Constant
from distillkit.testing import LossContract, TokenLossContract, check_loss

# How to make a loss whose constructor asks for something.
ARGUMENTS = {"WeightedSum": {"losses": [ForwardKL(), CrossEntropy(), DPKD()], "weights": [0.5, 0.25, 2.0]}}
INSTALLED = [entry.name for entry in registry.entries("loss") if entry.distribution == "distillkit"]

VARIANTS = [
    ForwardKL(reduction="token_mean", temperature=2.0, rescale=True),
    JeffreysKL(weight=0.0),
    JeffreysKL(weight=1.0),
    GeneralizedJSD(beta=0.9),
    SkewKL(alpha=0.0),
    SkewKL(alpha=0.9, temperature=0.5),
    SkewReverseKL(alpha=0.0),
    CrossEntropy(reduction="token_mean"),
    DPKD(beta=5.0),
    DistiLLM2(alpha=0.1, beta=0.0),
    DistiLLM2(alpha=0.0, beta=1.0),
    DistiLLM2(alpha=Constant(0.3), reduction="token_mean"),
    WeightedSum([DistiLLM2(), WeightedSum([TotalVariation()], [0.5])], [1.0, 0.0]),
]


def test_all_built_in_losses_are_installed():
    assert {
        "CrossEntropy",
        "DPKD",
        "DistiLLM2",
        "ForwardKL",
        "GeneralizedJSD",
        "JeffreysKL",
        "ReverseKL",
        "SkewKL",
        "SkewReverseKL",
        "TotalVariation",
        "WeightedSum",
    } <= set(INSTALLED)


@pytest.mark.parametrize("name", INSTALLED)
def test_every_built_in_loss_keeps_the_contract(name):
    check_loss(registry.get("loss", name)(**ARGUMENTS.get(name, {})))


@pytest.mark.parametrize("loss", VARIANTS, ids=lambda loss: type(loss).__name__)
def test_other_settings_keep_the_contract(loss):
    check_loss(loss)


@pytest.mark.parametrize("loss", [SkewReverseKL(detach_mixture=True), DistiLLM2(detach_mixture=True)])
def test_a_stopped_gradient_breaks_one_promise_and_no_other(loss):
    check_loss(loss, exact_gradient=False)
    with pytest.raises(AssertionError, match="the gradient must match the value"):
        check_loss(loss)


@pytest.mark.parametrize("loss", [CrossEntropy(), ForwardKL(), DistiLLM2()], ids=lambda loss: type(loss).__name__)
def test_rows_of_one_writer_keep_the_contract(loss):
    check_loss(loss, writers=("dataset",))
    check_loss(loss, writers=("teacher",))


class TestSkewKL(TokenLossContract):
    def make(self):
        return SkewKL(alpha=0.2)


class TestDistiLLM2(LossContract):
    def make(self):
        torch.manual_seed(0)
        return DistiLLM2()


class TestDetachedDistiLLM2(LossContract):
    exact_gradient = False

    def make(self):
        return DistiLLM2(detach_mixture=True)
