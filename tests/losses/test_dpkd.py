import math

import pytest
import torch

from distillkit.errors import ConfigError, DataError
from distillkit.losses import DPKD
from distillkit.testing import make_batch
from distillkit.types import Scores

V = 6
# The second pair is written in the other order; the third has a response without positions, so it is none.
WRITERS = ("teacher", "student", "student", "teacher", "teacher", "student")
BATCH = make_batch((3, 1, 2, 4, 2, 0), WRITERS, (0, 0, 1, 1, 2, 2), V)
PAIRS = ((0, 1), (3, 2))  # rows of the teacher's and of the student's response


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(12, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher


def likelihoods(logits):
    """Mean log-probability of each row's own tokens, token by token; None for a row without any."""
    start, means = 0, []
    for length in BATCH.lengths:
        own = []
        for place in range(start, start + length):
            scores = logits[place]
            own.append(scores[BATCH.targets[place]] - scores.exp().sum().log())
        start += length
        means.append(sum(own) / length if own else None)
    return means


def test_equals_the_formula_with_length_normalised_likelihoods(logits):
    student, teacher = logits
    logq, logp = likelihoods(student), likelihoods(teacher)
    expected = 0.0
    for chosen, rejected in PAIRS:
        margin = (logq[chosen] - logq[rejected]) - (logp[chosen] - logp[rejected])
        expected = expected + (1 + (-0.2 * margin).exp()).log()  # −log σ(x) = log(1 + e^−x)
    output = DPKD()(Scores.from_logits(student), Scores.from_logits(teacher), BATCH)

    torch.testing.assert_close(output.total, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(total, student)[0] for total in (output.total, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
    assert output.units.item() == DPKD().units(BATCH).item() == 2


def test_is_log_two_for_each_pair_when_student_equals_teacher(logits):
    scores = Scores.from_logits(logits[1])
    output = DPKD(beta=3.0)(scores, scores, BATCH)
    assert (output.total / output.units).item() == pytest.approx(math.log(2))


def test_beta_sharpens_the_preference():
    # One token each, V = 2: log q = log 3/4 for the teacher's token and log 1/4 for the student's, p is even.
    batch = make_batch((1, 1), ("teacher", "student"), (0, 0), vocab=2)
    q = torch.tensor([[0.25, 0.25], [0.75, 0.75]], dtype=torch.float64)
    q[0, batch.targets[0]], q[1, batch.targets[1]] = 0.75, 0.25
    student, teacher = Scores.from_logits(q.log()), Scores.from_logits(torch.zeros(2, 2).double())
    # The margin is log 3, so σ(β·log 3) = 3^β / (1 + 3^β): 3/4 for β = 1, 9/10 for β = 2.
    assert DPKD(beta=1.0)(student, teacher, batch).total.item() == pytest.approx(-math.log(0.75))
    assert DPKD(beta=2.0)(student, teacher, batch).total.item() == pytest.approx(-math.log(0.9))


def test_metrics_are_the_margin_and_the_students_likelihoods(logits):
    student, teacher = logits
    logq, logp = likelihoods(student.detach()), likelihoods(teacher)
    metrics = DPKD()(Scores.from_logits(student), Scores.from_logits(teacher), BATCH).metrics
    chosen, rejected = (torch.stack([logq[pair[side]] for pair in PAIRS]) for side in (0, 1))
    reference = torch.stack([logp[teachers] - logp[students] for teachers, students in PAIRS])
    torch.testing.assert_close(metrics["student_logp_teacher_response"], chosen)
    torch.testing.assert_close(metrics["student_logp_student_response"], rejected)
    torch.testing.assert_close(metrics["margin"], chosen - rejected - reference)


def test_a_response_outside_of_any_pair_has_no_part_even_if_it_is_impossible(logits):
    student, teacher = logits
    place = sum(BATCH.lengths[:4])  # the first position of the third pair's only response
    student = student.detach().clone()
    student[place, BATCH.targets[place]] = -math.inf
    student.requires_grad_()
    output = DPKD()(Scores.from_logits(student), Scores.from_logits(teacher), BATCH)
    output.total.backward()
    assert output.total.isfinite()
    assert student.grad[place:].eq(0).all()


def test_no_pair_with_two_responses_is_zero_with_a_graph():
    batch = make_batch((2, 0), ("teacher", "student"), (0, 0), V)
    student = torch.zeros(2, V, requires_grad=True)
    output = DPKD()(Scores.from_logits(student), Scores.from_logits(torch.zeros(2, V)), batch)
    output.total.backward()
    assert output.total.item() == output.units.item() == 0
    assert student.grad.eq(0).all()


@pytest.mark.parametrize("writers", [("teacher", "dataset"), ("student", "student")])
def test_refuses_a_prompt_without_both_responses(writers):
    batch = make_batch((1, 1), writers, (0, 0), V)
    with pytest.raises(DataError, match=r"needs a teacher's and a student's response for each prompt.*PairedCurator"):
        DPKD().units(batch)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_refuses_a_beta_that_is_not_above_zero(beta):
    with pytest.raises(ConfigError, match=r"DPKD\.beta must be above 0"):
        DPKD(beta=beta)


def test_others_responses_stand_in_the_place_of_the_teachers(logits):
    student, teacher = (Scores.from_logits(own) for own in logits)
    writers = [{"teacher": "speculative"}.get(name, name) for name in WRITERS]
    of_other = make_batch((3, 1, 2, 4, 2, 0), writers, (0, 0, 1, 1, 2, 2), V)
    assert torch.equal(DPKD()(student, teacher, of_other).total, DPKD()(student, teacher, BATCH).total)
