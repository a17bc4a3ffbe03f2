"""Letters: R rows, n draft tokens, V vocabulary. p is the teacher and q the student."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from distillkit.generators.speculative.acceptance import (
    Acceptance,
    Check,
    Exact,
    TopK,
    Typical,
    in_top,
    is_typical,
    passes_ratio,
    residual,
)
from helpers.wrong_rules import WRONG_RULES

P = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
Q = torch.tensor([0.2, 0.4, 0.0, 0.3, 0.1])
EVENLY = (torch.arange(10_000) + 0.5) / 10_000


def check_of(p, tokens, q=Q, uniform=0.5, logits=None):
    """One row whose every place has the same p and q."""
    log_p, log_q = (of.log().expand(1, len(tokens), -1) for of in (p, q))
    logits = log_p if logits is None else logits.expand(1, len(tokens), -1)
    return Check(torch.tensor([tokens]), logits, log_p, log_q, torch.full((1, len(tokens)), uniform))


# ── exact ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("p", "q", "share"), [(0.2, 0.8, 0.25), (0.6, 0.6, 1.0), (0.9, 0.3, 1.0), (0.0, 0.4, 0.0)])
def test_a_token_passes_with_the_smaller_of_1_and_p_over_q(p, q, share):
    log_p, log_q = (torch.tensor(number).log().expand(1, len(EVENLY)) for number in (p, q))
    assert float(passes_ratio(log_p, log_q, EVENLY[None]).double().mean()) == pytest.approx(share, abs=1e-4)


def test_a_token_that_the_teacher_never_draws_fails_even_at_0():
    zero = torch.zeros(1, 1)
    assert not passes_ratio(torch.full((1, 1), -torch.inf), zero - 1.0, zero).any()


def test_equal_models_pass_at_the_largest_number_that_can_be_drawn():
    largest = torch.tensor([[1 - 2.0**-24]])
    assert passes_ratio(largest - 3.0, largest - 3.0, largest).all()


def test_the_residual_is_what_the_student_has_too_little_of():
    # By hand: p − q = 0.3, −0.1, 0.15, −0.25, −0.1; the positive parts sum to 0.45.
    found = residual(P.log()[None], Q.log()[None]).exp()
    np.testing.assert_allclose(found, [[2 / 3, 0.0, 1 / 3, 0.0, 0.0]], atol=1e-6)


def test_the_residual_of_disjoint_supports_is_the_teachers_own():
    p, q = torch.tensor([[0.25, 0.75, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    torch.testing.assert_close(residual(p.log(), q.log()).exp(), p)


def test_where_nothing_was_drafted_the_residual_is_the_teachers_own():
    torch.testing.assert_close(residual(P.log()[None], torch.full((1, 5), -torch.inf)).exp(), P[None])


def test_equal_models_have_the_teachers_own_as_residual_and_no_row_changes_another():
    log_p, log_q = torch.stack([P, P]).log(), torch.stack([P, Q]).log()
    found = residual(log_p, log_q).exp()
    torch.testing.assert_close(found[0], P)
    torch.testing.assert_close(found[1:], residual(log_p[1:], log_q[1:]).exp())


def drawn(probs, generator, count):
    return torch.multinomial(probs, count, replacement=True, generator=generator)


def outcomes(rule, count=40_000):
    """Tokens that the rule lets through or draws anew, of drafts from q, by an independent sampler."""
    generator = torch.Generator().manual_seed(0)
    tokens = drawn(Q, generator, count)[None]
    check = check_of(P, tokens[0].tolist())
    check = Check(tokens, check.logits, check.log_p, check.log_q, torch.rand(1, count, generator=generator))
    stays = rule.accepts(check)[0]
    instead = drawn(rule.replacement(P.log()[None], Q.log()[None]).exp()[0], generator, count)
    return torch.where(stays, tokens[0], instead), stays


def p_value(tokens):
    counts = torch.bincount(tokens, minlength=5).numpy()
    if counts[4]:  # the teacher never says it
        return 0.0
    return stats.chisquare(counts[:4], len(tokens) * P[:4].double().numpy() / float(P[:4].double().sum())).pvalue


def test_what_rejection_sampling_lets_through_follows_the_teacher():
    tokens, stays = outcomes(Exact())
    assert p_value(tokens) > 1e-3
    # By hand: Σ min(p, q) = 0.2 + 0.3 + 0 + 0.05 + 0; four standard deviations.
    assert abs(float(stays.double().mean()) - 0.55) < 4 * math.sqrt(0.55 * 0.45 / len(stays))


@pytest.mark.parametrize("rule", WRONG_RULES)
def test_a_wrong_rule_does_not_follow_the_teacher(rule):
    assert p_value(outcomes(rule())[0]) < 1e-6


# ── top_k and typical, worked by hand ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("k", "stays"),
    [
        (1, [False, True, False, False, False]),
        (2, [True, True, False, False, False]),
        (3, [True, True, True, True, False]),
        (5, [True, True, True, True, True]),
    ],
)
def test_a_token_stays_in_the_teachers_top_k_and_a_tie_at_the_edge_is_within(k, stays):
    logits = torch.tensor([2.0, 5.0, 1.0, 1.0, -3.0])  # ranks 2, 1, 3, 3, 5
    assert in_top(logits.expand(1, 5, -1), torch.arange(5)[None], k).tolist() == [stays]
    assert TopK(k).accepts(check_of(P, list(range(5)), logits=logits)).tolist() == [stays]


def test_top_k_looks_past_what_the_sampling_cuts_off():
    logits, cut = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    assert TopK(2).accepts(check_of(cut, [0, 1, 2], logits=logits)).tolist() == [[True, True, False]]


def test_typical_holds_a_token_against_epsilon_where_the_teacher_is_sure():
    # p = (0.9, 0.06, 0.04): H = 0.3925 nats, δ·exp(−H) = 0.3 · 0.6754 = 0.203, so that ε = 0.05 is the smaller.
    p = torch.tensor([0.9, 0.06, 0.04])
    assert is_typical(p.log().expand(1, 3, -1), torch.arange(3)[None], 0.05, 0.3).tolist() == [[True, True, False]]


def test_typical_holds_a_token_against_the_entropy_where_the_teacher_is_unsure():
    # Sixteen tokens of 0.05 and one of 0.2: H = 16 · 0.05 · ln 20 + 0.2 · ln 5 = 2.7185, δ·exp(−H) = 0.3 · 0.06597 =
    # 0.0198, below ε = 0.09 and below 0.05: all stay. With δ = 0.8 it is 0.0528: the sixteen go.
    p = torch.tensor([0.05] * 16 + [0.2])
    log_p, tokens = p.log().expand(1, 2, -1), torch.tensor([[0, 16]])
    assert is_typical(log_p, tokens, 0.09, 0.3).tolist() == [[True, True]]
    assert is_typical(log_p, tokens, 0.09, 0.8).tolist() == [[False, True]]


def test_typical_never_keeps_a_token_that_the_teacher_never_draws():
    p = torch.tensor([0.6, 0.4, 0.0])
    assert Typical(0.09, 0.3).accepts(check_of(p, [0, 1, 2], q=torch.full((3,), 1 / 3))).tolist() == [
        [True, True, False]
    ]


def test_the_number_does_not_matter_to_top_k_and_typical():
    for rule in (TopK(2), Typical(0.09, 0.3)):
        low, high = (rule.accepts(check_of(P, [0, 1, 2, 3], uniform=u)) for u in (0.0, 0.999))
        assert torch.equal(low, high)
        torch.testing.assert_close(rule.replacement(P.log()[None], Q.log()[None]), P.log()[None])


# ── counting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tokens", "stayed", "judged", "accepted"),
    [
        (3, 2, 3, 2),  # the third was rejected
        (1, 0, 1, 0),
        (5, 4, 4, 4),  # all stayed, and a token of the teacher's
        (4, 4, 4, 4),  # all stayed
        (2, 4, 2, 2),  # all would have, but the response ended at the second
        (2, 2, 2, 2),  # the third was rejected, behind the response's end
    ],
)
def test_only_what_belongs_to_the_response_is_counted(tokens, stayed, judged, accepted):
    found = Acceptance()
    found.add(tokens, stayed, drafted=4)
    assert found == Acceptance(judged, accepted, tokens, checks=1)


def test_the_rate_is_the_share_of_judged_tokens_and_unknown_without_any():
    found = Acceptance(judged=8, accepted=6, tokens=9, checks=3)
    assert (found.rate, found.tokens_per_check) == (0.75, 3.0)
    assert math.isnan(Acceptance().rate)
    assert math.isnan(Acceptance().tokens_per_check)
