from importlib import resources

import pytest
import torch
import yaml
from distillkit_abkd.loss import AlphaBeta

from distillkit import registry
from distillkit.errors import ConfigError
from distillkit.testing import check_loss


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 9, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2)]


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (1.0, 1.0), (0.5, 0.5), (2.0, 0.3)])
def test_it_keeps_the_contract_of_a_loss(alpha, beta):
    check_loss(AlphaBeta(alpha, beta))


def test_it_is_half_the_squared_distance_at_one_and_one(pair):
    p, q = (each.exp() for each in pair)
    torch.testing.assert_close(AlphaBeta(1.0, 1.0).divergence(*pair), 0.5 * (p - q).square().sum(-1))


def test_it_is_four_hellingers_at_a_half_and_a_half(pair):
    p, q = (each.exp() for each in pair)
    hellinger = 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1)
    torch.testing.assert_close(AlphaBeta(0.5, 0.5).divergence(*pair), 4.0 * hellinger)


def test_it_tends_to_both_kl_divergences(pair):
    logp, logq = pair
    forward = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="none").sum(-1)
    reverse = torch.nn.functional.kl_div(logp, logq, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(AlphaBeta(1.0 - 1e-5, 1e-5).divergence(logp, logq), forward, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(AlphaBeta(1e-5, 1.0 - 1e-5).divergence(logp, logq), reverse, rtol=1e-3, atol=0.0)


def test_the_ends_are_refused():
    with pytest.raises(ConfigError, match=r"AlphaBeta\.alpha and \.beta must be above 0, got 1\.0 and 0\.0"):
        AlphaBeta(1.0, 0.0)


def test_the_configuration_names_an_installed_part():
    config = yaml.safe_load(resources.files("distillkit_abkd").joinpath("abkd.yaml").read_text())
    loss = config["model"]["loss"]
    assert registry.get("loss", loss["class_path"]) is AlphaBeta
    AlphaBeta(**loss["init_args"])
