"""Value and gradients of every loss, in slices of any size, are those of a computation in one piece.

Letters: N response positions, D hidden width, V vocabulary, K kept tokens of a teacher.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from distillkit import divergences, registry
from distillkit.chunked import memory as budget
from distillkit.chunked.likelihood import target_log_probs
from distillkit.chunked.output_head import OutputHead
from distillkit.losses import ForwardKL
from distillkit.types import Scores, Slicing
from helpers.one_piece import (
    BATCH,
    INSTALLED,
    LOSSES,
    MODELS,
    ONE,
    PAIR,
    SIZES,
    STUDENT,
    TEACHER,
    D,
    K,
    Model,
    N,
    V,
    Whole,
    assert_same,
    by_loss,
    copied,
    in_one_piece,
    value_and_gradients,
)

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_model = pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)


@pytest.fixture
def slice_of(monkeypatch):
    """Sets how many positions a slice holds."""

    def set_to(num_positions):
        monkeypatch.setattr(Model, "max_positions", num_positions)

    return set_to


def test_every_installed_loss_is_compared():
    own = {name for name in INSTALLED if registry.get("loss", name).__module__.startswith("distillkit.losses")}
    assert len(own) >= 11
    assert own <= set(LOSSES)
    assert 0 in BATCH.lengths
    assert N % 2 == 1


def test_skews_differ_from_row_to_row_where_they_should():
    student, teacher = Model(STUDENT), Model(TEACHER)
    output = LOSSES["DistiLLM2, adapted"](student.scores(BATCH), teacher.scores(BATCH), BATCH)
    alphas = torch.cat([output.metrics[f"alpha_{side}"] for side in ("teacher", "student")])
    assert len(alphas.unique()) == 5
    assert 0 in alphas


@every_model
@every_loss
def test_value_and_gradients_are_those_of_one_piece(loss, settings, slice_of):
    loss, student, teacher = copied(loss), Model(STUDENT, **settings), Model(TEACHER, **settings)
    expected = in_one_piece(loss, student, teacher, BATCH)
    assert all(own.isfinite().all() for own in expected)
    for size in SIZES:
        slice_of(size)
        assert_same(by_loss(loss, student, teacher, BATCH), expected, 1e-12)


@every_loss
@pytest.mark.parametrize("batch", [ONE, PAIR], ids=["one position", "one pair"])
def test_small_batches_give_what_one_piece_gives(loss, batch, slice_of):
    loss, student, teacher = copied(loss), Model(STUDENT, bias=True), Model(TEACHER, tied=False)
    expected = in_one_piece(loss, student, teacher, batch)
    for size in (1, 2, 100):
        slice_of(size)
        assert_same(by_loss(loss, student, teacher, batch), expected, 1e-12)


@every_loss
@pytest.mark.parametrize("memory", [1, 1000, 3000, None])
def test_how_much_memory_there_is_changes_nothing(loss, memory, monkeypatch):
    monkeypatch.setattr(budget, "MIB", 1)  # `memory` is bytes: room for one position, for a few, for all
    loss, student, teacher = copied(loss), Model(STUDENT, softcap=2.0), Model(TEACHER, tied=False, scale=0.5)
    expected = in_one_piece(loss, student, teacher, BATCH)
    assert_same(by_loss(loss, student, teacher, BATCH, memory), expected, 1e-12)


@every_loss
@pytest.mark.parametrize("settings", [MODELS["tied"], MODELS["wide"]], ids=["tied", "wide"])
def test_in_float32_value_and_gradients_are_close_to_those_of_one_piece_in_float64(loss, settings, slice_of):
    student, teacher = Model(STUDENT, **settings).float(), Model(TEACHER, **settings).float()
    wide = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    expected = in_one_piece(loss, *wide, BATCH)
    for size in SIZES:
        slice_of(size)
        found = by_loss(loss, student, teacher, BATCH)
        assert {own.dtype for own in found[1:]} == {torch.float32}
        # The value is what is left of 1 or of τ²: N times that a rounding of 6e-8. Measured: 4e-6 besides 1e-5 of it.
        assert_same(found, expected, 1e-5, floor=1e-5)


@every_loss
def test_in_bfloat16_value_and_gradients_are_those_of_one_piece_to_two_digits(loss):
    # States and weights are bfloat16, the reference is float64 on the same numbers. The head's products round to 8
    # bits, 2e-3 of a logit of up to 4, and gradients once more. Measured: at most 7e-3 of a tensor's largest entry.
    head = Model(STUDENT, tied=False, bias=True, softcap=4.0).head.bfloat16()
    hidden = Model(STUDENT).hidden(BATCH).detach().bfloat16().requires_grad_()
    teacher = Model(TEACHER, tied=False)
    wide = copy.deepcopy(head).double()
    leaf = hidden.detach().double().requires_grad_()
    logits = 4 * torch.tanh(wide(leaf) / 4)
    whole = Whole(BATCH, logits, teacher.logits(BATCH).detach())
    expected = value_and_gradients(whole.of(loss), [leaf, *wide.parameters()])
    for size in SIZES:
        scores = Scores(hidden, OutputHead(head, V, softcap=4.0), V, slicing=Slicing(max_positions=size))
        total = loss(scores, teacher.float().scores(BATCH) if loss.needs_teacher else None, BATCH).total
        found = value_and_gradients(total, [hidden, *head.parameters()])
        assert {own.dtype for own in found[1:]} == {torch.bfloat16}
        assert_same(found, expected, 1.5e-2)


def kept_by(teacher, batch):
    """Scores of a teacher that kept its K most likely tokens, and which; some targets are not among them."""
    logp = teacher.logits(batch).detach().log_softmax(-1)
    top = logp.topk(K)
    rest = torch.log1p(-top.values.exp().sum(-1, keepdim=True))
    own = logp[torch.arange(len(logp)), batch.targets]
    return Scores.from_top_k(torch.cat([top.values, rest], -1), top.indices, own), top.indices


AT_ONE = {
    name: loss
    for name, loss in LOSSES.items()
    if all(getattr(own, "temperature", 1.0) == 1.0 for own in loss.modules())
}


@pytest.mark.parametrize("loss", AT_ONE.values(), ids=AT_ONE)
@pytest.mark.parametrize("settings", [MODELS["tied"], MODELS["wide"]], ids=["tied", "wide"])
def test_a_teacher_that_kept_its_likeliest_tokens_gives_what_gathered_columns_give(loss, settings, slice_of):
    loss, student, teacher = copied(loss), Model(STUDENT, **settings), Model(TEACHER, **settings)
    kept, top_k_ids = kept_by(teacher, BATCH)
    assert not (top_k_ids == BATCH.targets[:, None]).any(-1).all()
    whole = Whole(BATCH, student.logits(BATCH), teacher.logits(BATCH).detach(), top_k_ids)
    expected = value_and_gradients(whole.of(loss), list(student.parameters()))
    for size in SIZES:
        slice_of(size)
        total = loss(student.scores(BATCH), kept, BATCH).total
        assert_same(value_and_gradients(total, list(student.parameters())), expected, 1e-12)


class Counted(ForwardKL):
    """Counts how often its closed form is asked for."""

    calls = 0

    def gradient(self, logp, logq):
        self.calls += 1
        return super().gradient(logp, logq)


class Unlike(Counted):
    """A divergence of its own, and no gradient to it."""

    def divergence(self, logp, logq):
        return divergences.rkl(logp, logq)


class Like(Unlike):
    """Both of its own."""

    def divergence(self, logp, logq):
        return divergences.kl(logp, logq)

    def gradient(self, logp, logq):
        return Counted.gradient(self, logp, logq)


@pytest.mark.parametrize(("kind", "used"), [(Counted, True), (Unlike, False), (Like, True)])
def test_a_closed_form_is_used_only_with_the_divergence_that_it_was_written_for(kind, used):
    loss, student, teacher = kind(), Model(STUDENT), Model(TEACHER)
    assert_same(by_loss(loss, student, teacher, BATCH), in_one_piece(loss, student, teacher, BATCH), 1e-12)
    assert (loss.calls > 0) is used


def test_without_a_gradient_the_closed_form_is_not_asked_for():
    loss, student, teacher = Counted(), Model(STUDENT), Model(TEACHER)
    with torch.no_grad():
        loss(student.scores(BATCH), teacher.scores(BATCH), BATCH)
    assert loss.calls == 0


class Deep(nn.Module):
    """A head that is no linear layer, as an adapter on it makes it."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first, self.second = nn.Linear(D, D), nn.Linear(D, V + 2)

    def forward(self, hidden):
        return self.second(torch.tanh(self.first(hidden)))


@every_loss
def test_a_head_that_is_no_linear_layer_gives_what_one_piece_gives(loss):
    loss, deep, teacher = copied(loss), Deep().double(), Model(TEACHER)
    hidden = Model(STUDENT).hidden(BATCH).detach().requires_grad_()
    trained = [hidden, *deep.parameters()]
    logits = 2 * torch.tanh(0.5 * deep(hidden)[:, :V] / 2)
    expected = value_and_gradients(Whole(BATCH, logits, teacher.logits(BATCH).detach()).of(loss), trained)
    for size in SIZES:
        scores = Scores(hidden, OutputHead(deep, V, scale=0.5, softcap=2.0), V, slicing=Slicing(max_positions=size))
        total = loss(scores, teacher.scores(BATCH), BATCH).total
        assert_same(value_and_gradients(total, trained), expected, 1e-12)


@every_loss
def test_logits_as_they_are_give_what_one_piece_gives(loss):
    loss, teacher = copied(loss), Model(TEACHER)
    logits = Model(STUDENT).logits(BATCH).detach().requires_grad_()
    whole = Whole(BATCH, logits, teacher.logits(BATCH).detach())
    expected = value_and_gradients(whole.of(loss), [logits])
    for size in SIZES:
        scores = replace(Scores.from_logits(logits), slicing=Slicing(max_positions=size))
        total = loss(scores, teacher.scores(BATCH), BATCH).total
        assert_same(value_and_gradients(total, [logits]), expected, 1e-12)


@pytest.mark.parametrize("kind", ["plain", "deep"])
def test_likelihoods_may_be_weighed_after_autocast_has_ended(kind):
    # The gradient is taken in the backward pass, which runs outside of autocast.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(D, V) if kind == "plain" else Deep()
    hidden = Model(STUDENT).float().hidden(BATCH).detach().requires_grad_()
    weights = torch.linspace(-1, 1, N)
    exact = cross_entropy(head(hidden)[:, :V], BATCH.targets, reduction="none")
    expected = value_and_gradients(-exact @ weights, [hidden, *head.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        values = target_log_probs(Scores(hidden, OutputHead(head, V), V), BATCH.targets)
    found = value_and_gradients(values @ weights, [hidden, *head.parameters()])
    assert_same(found, expected, 2e-2, floor=2e-2)  # products in bfloat16, as above
