"""Letters: R rows, V vocabulary, M uniform numbers."""

import numpy as np
import pytest
import torch
from scipy import stats

from distillkit.generators import sampling as module
from distillkit.generators.sampling import sample_from, sample_tokens, sampling_log_probs
from distillkit.types import Sampling

SETTINGS = [
    Sampling(temperature=1.0, top_p=1.0),
    Sampling(temperature=0.6, top_p=1.0),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=1.0, top_p=1.0, top_k=5),
    Sampling(temperature=1.7, top_p=0.8, top_k=7),
    Sampling(temperature=0.8, top_p=0.95, top_k=1000),
]


def probabilities(logits, sampling):
    """`[V]` what each token should be drawn with: top-k first, then the smallest set that reaches top-p of it."""
    weights = {token: float(np.exp(np.float64(value) / sampling.temperature)) for token, value in enumerate(logits)}
    by_weight = sorted(weights, key=lambda token: -weights[token])[: sampling.top_k or None]
    whole = sum(weights[token] for token in by_weight)
    kept, reached = [], 0.0
    for token in by_weight:
        if reached >= sampling.top_p * whole:
            break
        kept.append(token)
        reached += weights[token]
    return np.array([weights[token] / reached if token in kept else 0.0 for token in range(len(logits))])


def some_logits(vocab, spread=2.0, seed=0):
    return spread * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def frequencies(logits, sampling, uniform):
    """`[V]` shares of the tokens that the `[M]` uniform numbers give."""
    tokens = sample_tokens(logits.expand(len(uniform), -1), sampling, uniform)
    return np.bincount(tokens.numpy(), minlength=len(logits)) / len(uniform)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_evenly_spread_numbers_give_each_token_its_share(sampling):
    logits, count = some_logits(24), 20_000
    uniform = (torch.arange(count) + 0.5) / count
    # Each token owns one interval of the numbers, so its share is off by one number at each end, at most.
    expected = probabilities(logits.tolist(), sampling)
    np.testing.assert_allclose(frequencies(logits, sampling, uniform), expected, atol=2 / count)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_random_numbers_give_the_distribution(sampling):
    logits, count = some_logits(24, spread=1.0, seed=1), 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(2))
    expected = probabilities(logits.tolist(), sampling)
    found = frequencies(logits, sampling, uniform)
    assert not found[expected == 0].any()
    drawn = expected > 0
    assert stats.chisquare(count * found[drawn], count * expected[drawn]).pvalue > 1e-3


@pytest.mark.parametrize("top_p", [1e-6, 0.3])
def test_the_likeliest_token_is_kept_when_top_p_is_tiny(top_p):
    logits = torch.tensor([0.0, 1.0, 3.0, 1.0])  # the third has 0.74
    uniform = torch.tensor([0.0, 0.5, 0.999999])
    assert sample_tokens(logits.expand(3, -1), Sampling(top_p=top_p, temperature=1.0), uniform).tolist() == [2, 2, 2]


def test_a_set_that_reaches_top_p_exactly_is_not_widened():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    tokens = sample_tokens(logits.expand(8, -1), Sampling(temperature=1.0, top_p=0.75), torch.arange(8) / 8)
    assert set(tokens.tolist()) == {0, 1}


def test_greedy_takes_the_largest_logit_whatever_the_number():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert sample_tokens(logits, Sampling(temperature=0.0), torch.tensor([0.99, 0.99])).tolist() == [1, 0]


def test_top_p_is_a_share_of_what_top_k_leaves_in_a_large_vocabulary():
    # The 64 likeliest of the 150 that top-k leaves reach top_p already, but not top_p of the 150.
    logits = torch.linspace(0.0, -6.0, 400)
    sampling = Sampling(temperature=1.0, top_p=0.6, top_k=150)
    expected = probabilities(logits.tolist(), sampling)
    count = 20_000
    uniform = (torch.arange(count) + 0.5) / count
    np.testing.assert_allclose(frequencies(logits, sampling, uniform), expected, atol=2 / count)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 0.9999])
def test_looking_at_the_likeliest_first_equals_sorting_everything(top_p, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    spreads = torch.tensor([0.1, 1.0, 2.0, 5.0])[:, None]  # from nearly uniform to nearly certain
    logits = (spreads * torch.randn(4, 3000, generator=generator)).repeat(16, 1)
    uniform = torch.rand(64, generator=generator)
    sampling = Sampling(temperature=1.0, top_p=top_p)
    found = sample_tokens(logits, sampling, uniform)
    monkeypatch.setattr(module, "_TRIAL_SIZES", ())
    assert torch.equal(found, sample_tokens(logits, sampling, uniform))


def test_the_ends_of_the_numbers_give_tokens_that_have_weight():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1.0])  # 1 is beyond what a generator gives, and stands for rounding
    for sampling in (Sampling(temperature=1.0, top_p=1.0), Sampling(temperature=1.0, top_p=0.9)):
        assert set(sample_tokens(logits, sampling, ends).tolist()) == {1, 2}


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(sampling):
    logits = torch.stack([some_logits(2000, spread, seed) for seed, spread in enumerate((0.1, 1.0, 4.0, 8.0))])
    uniform = torch.tensor([0.1, 0.4, 0.7, 0.97])
    alone = [sample_tokens(logits[row : row + 1], sampling, uniform[row : row + 1]) for row in range(4)]
    assert torch.equal(sample_tokens(logits, sampling, uniform), torch.cat(alone))


@pytest.mark.parametrize("sampling", [*SETTINGS, Sampling(temperature=0.0, top_p=0.3, top_k=2)], ids=str)
def test_the_processed_distribution_is_what_is_drawn_by(sampling):
    logits = torch.stack([some_logits(24), some_logits(24, spread=0.5, seed=1)])
    greedy = sampling.temperature == 0
    expected = [probabilities(row, Sampling(1.0, 1.0, 1) if greedy else sampling) for row in logits.tolist()]
    np.testing.assert_allclose(sampling_log_probs(logits, sampling).exp(), expected, atol=1e-6)


def test_tokens_are_drawn_from_given_log_probabilities():
    log_probs = torch.tensor([0.5, 0.0, 0.25, 0.25]).log().expand(8, -1)
    assert sample_from(log_probs, torch.arange(8) / 8).tolist() == [0, 0, 0, 0, 2, 2, 3, 3]
