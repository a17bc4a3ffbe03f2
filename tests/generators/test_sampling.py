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


NUCLEUS = [setting for setting in SETTINGS if setting.top_p < 1 and not setting.top_k]
"""Settings whose tokens are drawn by rejection, so no interval of the numbers belongs to a token."""


def frequencies(logits, sampling, uniform):
    """`[V]` shares of the tokens that the `[M]` uniform numbers give."""
    tokens = sample_tokens(logits.expand(len(uniform), -1), sampling, uniform)
    return np.bincount(tokens.numpy(), minlength=len(logits)) / len(uniform)


@pytest.mark.parametrize("sampling", [setting for setting in SETTINGS if setting not in NUCLEUS], ids=str)
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


def law(logits, top_p):
    """`[V]` probabilities by the definition, in float64: a token stays if the likelier ones have less than top-p."""
    probs = np.exp(logits.double().numpy() - logits.double().logsumexp(-1).item())
    kept = np.array([probs[probs > own].sum() < top_p for own in probs])
    return np.where(kept, probs, 0.0) / probs[kept].sum()


TIES = torch.tensor([0.0, 1.0, 1.0, 2.0, 0.0, 2.0, 1.0, -torch.inf, 0.0])


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0, None], ids=["even", "flat", "peaked", "ties"])
def test_top_p_draws_by_its_law(spread, top_p):
    logits = TIES if spread is None else some_logits(700, spread, seed=5)  # more than a block, and not whole ones
    rows, rounds = 500, 120
    generator = torch.Generator().manual_seed(6)
    counts = np.zeros(len(logits))
    for _ in range(rounds):
        uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
        tokens = sample_tokens(logits.expand(rows, -1), Sampling(temperature=1.0, top_p=top_p), uniform)
        counts += np.bincount(tokens.numpy(), minlength=len(logits))
    expected = law(logits, top_p)
    assert not counts[expected == 0].any()
    drawn = expected > 0
    if drawn.sum() > 1:
        rare = drawn & (rows * rounds * expected < 5)  # the test needs a few of each: rare ones count together
        often = drawn & ~rare
        observed, theory = counts[often], rows * rounds * expected[often]
        if rare.any():
            observed, theory = (
                np.append(values, own[rare].sum())
                for values, own in ((observed, counts), (theory, rows * rounds * expected))
            )
        assert stats.chisquare(observed, theory).pvalue > 1e-4
    # The distribution that speculative decoding checks drafts by is the same one.
    found = sampling_log_probs(logits[None], Sampling(temperature=1.0, top_p=top_p)).exp()[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("rule", ["edge", "order"])
def test_another_law_would_be_seen(rule):
    """The chi-square of the test above, for a token more and for a draw that is not by weight."""
    logits, count = some_logits(700, 0.5, seed=5), 60_000
    expected = law(logits, 0.9)
    wrong = law(logits, 0.905) if rule == "edge" else np.where(expected > 0, expected**0.8, 0.0)
    wrong /= wrong.sum()
    counts = np.random.default_rng(0).multinomial(count, wrong)
    drawn = expected > 0
    assert counts[~drawn].any() or stats.chisquare(counts[drawn], count * expected[drawn]).pvalue < 1e-4


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 0.9999])
def test_looking_at_the_likeliest_first_equals_sorting_everything(top_p, monkeypatch):
    spreads = torch.tensor([0.1, 1.0, 2.0, 5.0])[:, None]  # from nearly uniform to nearly certain
    logits = spreads * torch.randn(4, 3000, generator=torch.Generator().manual_seed(3))
    logits[2] = logits[2].round()  # many ties
    sampling = Sampling(temperature=1.0, top_p=top_p)
    found = sampling_log_probs(logits, sampling)
    monkeypatch.setattr(module, "_TRIAL_SIZES", ())
    assert torch.equal(found.isinf(), sampling_log_probs(logits, sampling).isinf())
    torch.testing.assert_close(found, sampling_log_probs(logits, sampling), rtol=0, atol=1e-5)


def test_the_numbers_of_further_rounds_are_uniform_and_independent():
    first = torch.rand(200_000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    second = module._next_uniform(first)
    third = module._next_uniform(second)
    for one, other in ((first, second), (second, third), (first, third)):
        assert stats.kstest(other.numpy(), "uniform").pvalue > 1e-3
        table = np.histogram2d(one.numpy(), other.numpy(), bins=20, range=[[0, 1], [0, 1]])[0]
        assert stats.chi2_contingency(table).pvalue > 1e-3
    assert second.min() >= 0
    assert second.max() < 1


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
