"""What becomes of a loss's graph: backward twice, scaled, added up, frozen in parts, or not wanted."""

import pytest
import torch

from distillkit.chunked.output_head import OutputHead
from distillkit.losses import DPKD, ForwardKL
from distillkit.types import Scores
from helpers.one_piece import (
    BATCH,
    LOSSES,
    STUDENT,
    TEACHER,
    Model,
    Overlap,
    V,
    Whole,
    assert_same,
    both_totals,
    copied,
    in_one_piece,
    sum_of_losses,
    value_and_gradients,
)

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)

# One that takes its gradient in the forward pass, by closed form and by autograd; one that does in the backward pass.
every_pass = pytest.mark.parametrize(
    "loss", [ForwardKL(), Overlap(), DPKD(), sum_of_losses()], ids=lambda loss: type(loss).__name__
)


def gradients_of(model):
    return [own.grad.clone() for own in model.parameters()]


@every_pass
def test_backward_twice_gives_the_same_gradient_twice(loss):
    loss, student, teacher = copied(loss), Model(STUDENT, bias=True), Model(TEACHER)
    _, *expected = in_one_piece(loss, student, teacher, BATCH)
    total = both_totals(loss(student.scores(BATCH), teacher.scores(BATCH), BATCH).total)
    for times in (1, 2):
        total.backward(retain_graph=True)
        assert_same(gradients_of(student), [times * own for own in expected], 1e-12)
    total.backward()
    assert_same(gradients_of(student), [3 * own for own in expected], 1e-12)


@every_pass
def test_backward_twice_without_keeping_the_graph_is_refused(loss):
    loss, teacher = copied(loss), Model(TEACHER)
    hidden = Model(STUDENT).hidden(BATCH).detach().requires_grad_()  # a leaf: no graph but the loss's own
    scores = Scores(hidden, OutputHead(Model(STUDENT).head, V), V)
    total = both_totals(loss(scores, teacher.scores(BATCH), BATCH).total)
    total.backward()
    with pytest.raises((AssertionError, RuntimeError), match=r"backward ran before|second time"):
        total.backward()


@every_pass
def test_two_losses_of_the_same_scores_add_up(loss):
    loss, student, teacher = copied(loss), Model(STUDENT, bias=True), Model(TEACHER)
    _, *expected = in_one_piece(loss, student, teacher, BATCH)
    scores = student.scores(BATCH)
    totals = [both_totals(loss(scores, teacher.scores(BATCH), BATCH).total) for _ in range(2)]
    (3.0 * totals[0] - 0.5 * totals[1]).backward()
    assert_same(gradients_of(student), [2.5 * own for own in expected], 1e-12)


@every_pass
@pytest.mark.parametrize("factor", [-2.5, 0.0, 1e-3])
def test_a_scaled_total_scales_the_gradient(loss, factor):
    loss, student, teacher = copied(loss), Model(STUDENT, bias=True), Model(TEACHER)
    _, *expected = in_one_piece(loss, student, teacher, BATCH)
    total = both_totals(loss(student.scores(BATCH), teacher.scores(BATCH), BATCH).total)
    (factor * total).backward()
    assert_same(gradients_of(student), [factor * own for own in expected], 1e-12)


@every_pass
def test_the_gradient_is_added_to_one_that_is_there(loss):
    loss, student, teacher = copied(loss), Model(STUDENT, bias=True), Model(TEACHER)
    _, *expected = in_one_piece(loss, student, teacher, BATCH)
    before = [torch.randn_like(own) for own in student.parameters()]
    for own, there in zip(student.parameters(), before, strict=True):
        own.grad = there.clone()
    both_totals(loss(student.scores(BATCH), teacher.scores(BATCH), BATCH).total).backward()
    added = [own + there for own, there in zip(expected, before, strict=True)]
    assert_same(gradients_of(student), added, 1e-12)


@every_loss
def test_without_a_gradient_total_and_metrics_are_the_same(loss):
    loss, student, teacher = copied(loss), Model(STUDENT, softcap=2.0), Model(TEACHER)
    wanted = loss(student.scores(BATCH), teacher.scores(BATCH), BATCH)
    with torch.no_grad():
        found = loss(student.scores(BATCH), teacher.scores(BATCH), BATCH)
    assert not found.total.requires_grad
    torch.testing.assert_close(found.total, wanted.total.detach(), rtol=1e-13, atol=1e-14)
    assert found.metrics.keys() == wanted.metrics.keys()
    for name, value in wanted.metrics.items():
        torch.testing.assert_close(found.metrics[name], value, rtol=1e-12, atol=1e-14)


@every_loss
def test_a_student_that_is_frozen_has_a_value_and_no_graph(loss):
    loss, student, teacher = copied(loss), Model(STUDENT).requires_grad_(False), Model(TEACHER)
    total = loss(student.scores(BATCH), teacher.scores(BATCH), BATCH).total
    assert not total.requires_grad
    expected = Whole(BATCH, student.logits(BATCH), teacher.logits(BATCH)).of(loss).detach()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-13)


@every_pass
def test_a_frozen_head_leaves_the_rest_its_gradient(loss):
    loss, student, teacher = copied(loss), Model(STUDENT, tied=False, bias=True), Model(TEACHER)
    student.head.requires_grad_(False)
    trained = [own for own in student.parameters() if own.requires_grad]
    whole = Whole(BATCH, student.logits(BATCH), teacher.logits(BATCH).detach())
    total = loss(student.scores(BATCH), teacher.scores(BATCH), BATCH).total
    assert_same(value_and_gradients(total, trained), value_and_gradients(whole.of(loss), trained), 1e-12)


@every_pass
def test_a_frozen_body_leaves_the_head_its_gradient(loss):
    loss, student, teacher = copied(loss), Model(STUDENT, tied=False, bias=True), Model(TEACHER)
    for own in (student.embedding, student.mix):
        own.requires_grad_(False)
    trained = list(student.head.parameters())
    whole = Whole(BATCH, student.logits(BATCH), teacher.logits(BATCH).detach())
    total = loss(student.scores(BATCH), teacher.scores(BATCH), BATCH).total
    assert_same(value_and_gradients(total, trained), value_and_gradients(whole.of(loss), trained), 1e-12)
