from importlib import resources

import numpy as np
import pytest
import torch
import yaml
from distillkit_akl.loss import AdaptiveKL
from scipy.special import rel_entr

from distillkit import registry
from distillkit.errors import ConfigError
from distillkit.testing import check_loss


def by_hand(p, q, mu):
    """One position, token by token."""
    mass, head, tail = 0.0, 0.0, 0.0
    for rank, token in enumerate(sorted(range(len(p)), key=lambda token: -p[token])):
        mass += p[token]
        if rank == 0 or mass <= mu:
            head += abs(p[token] - q[token])
        else:
            tail += abs(p[token] - q[token])
    share = head / (head + tail)
    return share * rel_entr(p, q).sum() + (1 - share) * rel_entr(q, p).sum()


@pytest.mark.parametrize("mu", [0.2, 0.5, 0.9])
def test_it_keeps_the_contract_of_a_loss(mu):
    # The shares are detached in the gradient.
    check_loss(AdaptiveKL(mu), exact_gradient=False)


@pytest.mark.parametrize("mu", [0.2, 0.5, 0.9])
def test_it_is_the_mixture_of_the_paper(mu):
    generator = torch.Generator().manual_seed(0)
    logp, logq = (torch.randn(50, 9, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    values = AdaptiveKL(mu).divergence(logp, logq)
    expected = [by_hand(p, q, mu) for p, q in zip(logp.exp().numpy(), logq.exp().numpy(), strict=True)]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-12)


def test_a_worked_position():
    # The two tokens of 0.3 have 0.6 together: one of them is the head, or both. All gaps together are 0.6.
    rows = ((0.3, 0.2, 0.2, 0.3), (0.1, 0.1, 0.3, 0.5))
    logp, logq = (torch.tensor([row], dtype=torch.float64).log() for row in rows)
    assert AdaptiveKL(0.55).head_share(logp, logq).item() == pytest.approx(0.2 / 0.6)
    assert AdaptiveKL(0.65).head_share(logp, logq).item() == pytest.approx(0.4 / 0.6)


def test_the_first_token_is_always_in_the_head():
    logp, logq = (torch.tensor([row], dtype=torch.float64).log() for row in ((0.9, 0.06, 0.04), (0.5, 0.3, 0.2)))
    assert AdaptiveKL(0.5).head_share(logp, logq).item() == pytest.approx(0.4 / 0.8)


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_a_share_that_leaves_head_or_tail_empty_is_refused(mu):
    with pytest.raises(ConfigError, match=rf"AdaptiveKL\.mu must lie in \(0, 1\), got {mu}"):
        AdaptiveKL(mu)


def test_the_configuration_names_an_installed_part():
    config = yaml.safe_load(resources.files("distillkit_akl").joinpath("akl.yaml").read_text())
    loss = config["model"]["loss"]
    assert registry.get("loss", loss["class_path"]) is AdaptiveKL
    AdaptiveKL(**loss["init_args"])
