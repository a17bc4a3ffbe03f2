"""Whose distribution the responses follow, against an enumeration; six words, so that two tokens have 31 outcomes."""

import functools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from distillkit.generators.speculative.generator import SpeculativeGenerator
from distillkit.types import Prompt, Prompts, Sampling
from helpers.models import tiny_model
from helpers.pairs import WORDS, near, pair, word_tokenizer
from helpers.wrong_rules import AcceptsAll, DrawsFromTheTeacher, WithoutMaximum

TOKENIZER = word_tokenizer()
END, VOCAB = 0, len(WORDS)
COUNT = 20_000
PROMPT = (3, 1, 4, 2)
PLAIN = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=2)
TOP_P = Sampling(temperature=0.7, top_p=0.85, max_new_tokens=2)
TOP_K = Sampling(temperature=1.3, top_p=1.0, top_k=3, max_new_tokens=2)
CASES = [
    pytest.param(PLAIN, 1, id="plain, block 1"),
    pytest.param(PLAIN, 3, id="plain, block 3"),
    pytest.param(TOP_P, 3, id="top-p, block 3"),
]


@pytest.fixture(scope="module")
def models():
    teacher = tiny_model(VOCAB, layers=1, hidden=16, seed=3, eos_token_id=END)
    return pair(near(teacher, 1.0), teacher)


@pytest.fixture(scope="module")
def exact(models):
    """What the rule `exact` writes, by sampling and length of a block, each written once."""
    return functools.cache(lambda sampling, block: write(models, sampling, block=block))


def write(models, sampling, own_rule=None, **settings):
    """COUNT responses to one prompt under as many ids, and the generator that wrote them."""
    generator = SpeculativeGenerator(**{"batch_size": 8000, "progress": False} | settings)
    generator.rule = own_rule or generator.rule
    generator.refresh(models, TOKENIZER)
    prompts = Prompts(tuple(Prompt(str(number), (), PROMPT) for number in range(COUNT)))
    return [response.token_ids for response in generator.generate(prompts, sampling)], generator


@torch.no_grad()
def distribution(model, ids, sampling):
    """What `model` says after `ids`, with temperature, top-k and top-p, in plain Python."""
    logits = model(torch.tensor([ids])).logits[0, -1].double().tolist()
    weights = [math.exp(logit / sampling.temperature) for logit in logits]
    order = sorted(range(VOCAB), key=lambda token: -weights[token])[: sampling.top_k or None]
    whole, kept = sum(weights[token] for token in order), []
    for token in order:
        if sum(weights[other] for other in kept) >= sampling.top_p * whole:
            break
        kept.append(token)
    return [weights[token] / sum(weights[other] for other in kept) if token in kept else 0.0 for token in range(VOCAB)]


def two_tokens(law):
    """The probability of each response of at most two tokens, where `law(ids)` gives that of the next token."""
    found, first = {}, law(PROMPT)
    for token, chance in enumerate(first):
        if token == END:
            found[(END,)] = chance
            continue
        for other, then in enumerate(law((*PROMPT, token))):
            found[(token, other)] = chance * then
    return {outcome: chance for outcome, chance in found.items() if chance > 0}


def teachers_own(models, sampling):
    return two_tokens(lambda ids: distribution(models["teacher"], ids, sampling))


def p_value(responses, expected):
    """Of a chi-square test; outcomes that are expected less than five times are taken together."""
    counts = Counter(responses)
    if counts.keys() - expected.keys():
        return 0.0  # something that can't happen
    often = [outcome for outcome, chance in expected.items() if COUNT * chance >= 5]
    assert len(often) >= 6
    found, wanted = [counts[outcome] for outcome in often], [COUNT * expected[outcome] for outcome in often]
    rest = (COUNT - sum(found), COUNT - sum(wanted))
    if rest[1] > 1e-6:
        found, wanted = [*found, rest[0]], [*wanted, rest[1]]
    return stats.chisquare(found, np.array(wanted) * sum(found) / sum(wanted)).pvalue


@pytest.mark.parametrize(("sampling", "block"), CASES)
def test_exact_responses_follow_the_teachers_own_distribution(models, exact, sampling, block):
    responses, generator = exact(sampling, block)
    assert 0.3 < generator.acceptance.rate < 0.9  # both the draft and the residual are used, and often
    assert p_value(responses, teachers_own(models, sampling)) > 1e-3


@pytest.mark.parametrize("rule", [DrawsFromTheTeacher, WithoutMaximum])
def test_a_wrong_rule_fails_the_same_test(models, rule):
    responses, _ = write(models, PLAIN, rule())
    assert p_value(responses, teachers_own(models, PLAIN)) < 1e-6


def test_accepting_everything_fails_the_same_test_and_follows_the_student(models):
    responses, _ = write(models, PLAIN, AcceptsAll())
    assert p_value(responses, teachers_own(models, PLAIN)) < 1e-6
    students = two_tokens(lambda ids: distribution(models["student"], ids, PLAIN))
    assert p_value(responses, students) > 1e-3


def test_top_k_responses_follow_the_student_with_the_teacher_where_it_rejects(models):
    def law(ids):
        p, q = (distribution(models[name], ids, TOP_K) for name in ("teacher", "student"))
        with torch.no_grad():
            top = set(models["teacher"](torch.tensor([ids])).logits[0, -1].topk(2).indices.tolist())
        rejected = sum(q[token] for token in range(VOCAB) if token not in top)
        return [(q[token] if token in top else 0.0) + rejected * p[token] for token in range(VOCAB)]

    responses, _ = write(models, TOP_K, rule="top_k", top_k=2, block=1)
    expected = two_tokens(law)
    assert p_value(responses, expected) > 1e-3
    assert p_value(responses, teachers_own(models, TOP_K)) < 1e-6


def test_typical_responses_follow_the_student_with_the_teacher_where_it_rejects(models):
    def law(ids):
        p, q = (distribution(models[name], ids, TOP_P) for name in ("teacher", "student"))
        threshold = min(0.5, 0.9 * math.exp(sum(chance * math.log(chance) for chance in p if chance)))
        stays = [chance > threshold for chance in p]
        rejected = sum(chance for chance, stay in zip(q, stays, strict=True) if not stay)
        return [(q[token] if stays[token] else 0.0) + rejected * p[token] for token in range(VOCAB)]

    responses, generator = write(models, TOP_P, rule="typical", epsilon=0.5, delta=0.9, block=3)
    assert 0.1 < generator.acceptance.rate < 0.95
    assert p_value(responses, two_tokens(law)) > 1e-3


# ── the rate of acceptance ────────────────────────────────────────────────────────────────────────────────────────────


def overlap(models, ids, sampling):
    """Σ min(p, q) after `ids`."""
    p, q = (distribution(models[name], ids, sampling) for name in ("teacher", "student"))
    return sum(map(min, p, q))


@pytest.mark.parametrize("sampling", [PLAIN, TOP_P], ids=["plain", "top-p"])
def test_a_single_token_is_accepted_with_the_overlap_of_both_distributions(models, sampling):
    one = Sampling(sampling.temperature, sampling.top_p, sampling.top_k, max_new_tokens=1)
    _, generator = write(models, one, block=1)
    expected = overlap(models, PROMPT, sampling)
    assert generator.acceptance.judged == COUNT
    assert abs(generator.acceptance.rate - expected) < 4 * math.sqrt(expected * (1 - expected) / COUNT)


def test_longer_blocks_average_the_overlap_over_the_places_that_are_judged(models, exact):
    # A block as long as the response leaves no token to the teacher alone: every place is judged, behind a text that
    # follows the teacher. With shorter ones, the token behind a block that stays whole is drawn and not judged.
    p = distribution(models["teacher"], PROMPT, PLAIN)
    goes_on = [(token, chance) for token, chance in enumerate(p) if token != END]
    accepted = overlap(models, PROMPT, PLAIN) + sum(
        chance * overlap(models, (*PROMPT, token), PLAIN) for token, chance in goes_on
    )
    judged = 1 + sum(chance for _, chance in goes_on)
    _, generator = exact(PLAIN, 3)
    counts = generator.acceptance
    # Of a response at most two tokens are judged or accepted: the standard deviation of either is at most 1.
    assert abs(counts.judged / COUNT - judged) < 4 / math.sqrt(COUNT)
    assert abs(counts.accepted / COUNT - accepted) < 4 / math.sqrt(COUNT)
    assert counts.rate == pytest.approx(accepted / judged, abs=0.02)
