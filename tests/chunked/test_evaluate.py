"""V vocabulary, D hidden width, N response positions."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from distillkit.chunked.evaluate import row_slices, slices
from distillkit.chunked.likelihood import target_log_probs
from distillkit.errors import ConfigError
from distillkit.losses import (
    CrossEntropy,
    DistiLLM2,
    ForwardKL,
    GeneralizedJSD,
    SkewReverseKL,
    TokenLoss,
    TotalVariation,
)
from distillkit.schedules import AdaptiveAlpha
from distillkit.testing import make_batch
from distillkit.types import Progress, Scores, Slicing, Summary

V, D = 7, 5
BATCH = make_batch((3, 1, 0, 4, 2, 3), ("teacher", "student") * 3, (0, 0, 1, 1, 2, 2), V)
N = BATCH.num_tokens
SIZES = (1, 3, 5, N - 1, N, 10 * N)


class TiedModel(nn.Module):
    """One weight as embedding and as head: its gradient comes by both ways."""

    max_positions = None

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(V, D, dtype=torch.float64)
        self.mix = nn.Linear(D, D, dtype=torch.float64)
        self.head = nn.Linear(D, V, bias=False, dtype=torch.float64)
        self.head.weight = self.embedding.weight

    def forward(self, batch=BATCH):
        hidden = torch.tanh(self.mix(self.embedding(batch.input_ids))).flatten(0, 1)[batch.positions]
        return Scores(hidden, self.head, V, slicing=Slicing(max_positions=self.max_positions))


@pytest.fixture
def slice_of(monkeypatch):
    """Sets how many positions a slice holds."""

    def set_to(num_positions):
        monkeypatch.setattr(TiedModel, "max_positions", num_positions)

    return set_to


def value_and_gradients(total, model):
    return total.detach(), *torch.autograd.grad(total, list(model.parameters()))


def assert_same(first, second):
    assert len(first) == len(second) > 1
    for own, other in zip(first, second, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def row_means(values):
    """Sum over the rows of their means, without the code under test."""
    return sum(part.mean() for part in values.split(BATCH.lengths) if len(part))


@pytest.mark.parametrize("size", SIZES)
def test_slices_give_the_values_and_gradients_of_torchs_kl_div(size, slice_of):
    student, teacher = TiedModel(1), TiedModel(2)
    logp = teacher().log_probs().detach()
    whole = kl_div(torch.log_softmax(student.head(student().hidden), -1), logp, reduction="none", log_target=True)
    slice_of(size)
    output = ForwardKL()(student(), teacher(), BATCH)
    assert_same(value_and_gradients(output.total, student), value_and_gradients(row_means(whole.sum(-1)), student))
    torch.testing.assert_close(output.metrics["divergence"], whole.sum(-1).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_slices_give_the_values_and_gradients_of_torchs_cross_entropy(size, reduction, slice_of):
    student = TiedModel(1)
    whole = cross_entropy(student.head(student().hidden), BATCH.targets, reduction="none")
    expected = row_means(whole) if reduction == "sequence_mean" else whole.sum()
    slice_of(size)
    output = CrossEntropy(reduction=reduction)(student(), None, BATCH)
    assert_same(value_and_gradients(output.total, student), value_and_gradients(expected, student))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss", [GeneralizedJSD(temperature=2.0), SkewReverseKL(), TotalVariation()])
def test_slices_give_what_the_whole_gives(loss, size, slice_of):
    student, teacher = TiedModel(1), TiedModel(2)
    whole = loss(student(), teacher(), BATCH)
    slice_of(size)
    part = loss(student(), teacher(), BATCH)
    assert_same(value_and_gradients(part.total, student), value_and_gradients(whole.total, student))


def adapted_distillm2():
    """A loss behind its warm-up, whose skews differ from row to row."""
    loss = DistiLLM2(alpha=AdaptiveAlpha(initial=0.25, min=0.0, max=0.9, warmup_steps=1))
    for side, gap in (("teacher", 0.002), ("student", 0.001)):
        mean = torch.tensor(gap)
        loss.update(Progress(1, 4), {f"gap_{side}": Summary(mean, mean, mean, torch.tensor(3.0))})
    return loss


def test_distillm2_gives_the_same_in_one_pass_in_two_and_as_a_whole(slice_of):
    student, teacher = TiedModel(1), TiedModel(2)
    loss = adapted_distillm2()
    whole = loss(student(), teacher(), BATCH)
    assert len(whole.metrics["alpha_student"].unique()) > 1, "the skews must differ for the test to say something"

    both = torch.tensor([1.0, 2.0], dtype=torch.float64)  # the components differ in their weight
    expected = value_and_gradients(whole.total @ both, student)
    for size, num_student_slices in ((1, None), (3, None), (4, 3), (5, 2), (8, 1)):
        slice_of(size)
        parts = row_slices((1, 4, 3), size)  # the student's rows; None if the gaps need a pass of their own
        assert num_student_slices == (None if parts is None else len(parts))
        part = loss(student(), teacher(), BATCH)
        assert_same(value_and_gradients(part.total @ both, student), expected)
        assert part.metrics.keys() == whole.metrics.keys()
        for name, value in whole.metrics.items():
            torch.testing.assert_close(part.metrics[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_likelihoods_of_targets_do_not_depend_on_the_slices(size, slice_of):
    student = TiedModel(1)
    whole = -cross_entropy(student.head(student().hidden), BATCH.targets, reduction="none")
    slice_of(size)
    value = target_log_probs(student(), BATCH.targets)
    weights = torch.arange(N).double()
    assert_same(value_and_gradients(value @ weights, student), value_and_gradients(whole @ weights, student))


def test_a_scaled_total_scales_the_gradient():
    student, teacher = TiedModel(1), TiedModel(2)
    once, thrice = (
        value_and_gradients(scale * ForwardKL()(student(), teacher(), BATCH).total, student) for scale in (1, 3)
    )
    assert_same([3 * own for own in once], thrice)


def test_a_frozen_head_leaves_the_gradient_of_the_hidden_states():
    student, teacher = TiedModel(1), TiedModel(2)
    hidden = student().hidden.detach().requires_grad_()
    student.requires_grad_(False)
    ForwardKL()(Scores(hidden, student.head, V), teacher(), BATCH).total.backward()
    q, p = student().log_probs().exp(), teacher().log_probs().exp()
    weights = torch.tensor([1 / length for length in BATCH.lengths for _ in range(length)], dtype=torch.float64)
    expected = weights[:, None] * (q - p).detach() @ student.head.weight  # the gradient of KL by the logits is q − p
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-12, atol=1e-12)
    assert student.head.weight.grad is None


def test_no_graph_is_kept_where_no_gradient_is_wanted():
    student, teacher = TiedModel(1), TiedModel(2)
    wanted = ForwardKL()(student(), teacher(), BATCH).total
    with torch.no_grad():
        total = ForwardKL()(student(), teacher(), BATCH).total
    assert not total.requires_grad
    assert total.item() == pytest.approx(wanted.item(), rel=1e-14)


def test_the_teachers_parameters_get_no_gradient():
    student, teacher = TiedModel(1), TiedModel(2)
    ForwardKL()(student(), teacher(), BATCH).total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_half_precision_heads_gradient_is_summed_in_float32():
    # bfloat16 has 8 bits: a share of 6/7 is lost beside a sum of 256, so 600 of them would never reach 514.
    num_positions = 600
    batch = make_batch((num_positions,), ("teacher",), (0,), V)
    head = nn.Linear(1, V, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    hidden = torch.ones(num_positions, 1, dtype=torch.bfloat16)
    peaked = torch.full((num_positions, V), -1e4)
    peaked[:, 0] = 0.0
    scores = Scores(hidden, head, V, slicing=Slicing(max_positions=1))
    output = ForwardKL(reduction="token_mean")(scores, Scores.from_logits(peaked), batch)
    output.total.backward()
    assert output.total.item() == pytest.approx(num_positions * math.log(V), rel=1e-5)  # measured: 5e-6, 600 sums
    assert head.weight.grad.dtype == torch.bfloat16
    # q − p is 1/7 for every token but the first, whose own is −6/7. Shares and sum are each rounded to 1/256.
    expected = [-num_positions * 6 / 7, *[num_positions / 7] * (V - 1)]
    assert head.weight.grad.float().flatten().tolist() == pytest.approx(expected, rel=1 / 128)


def test_slices_cover_the_positions_in_order():
    assert slices(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert slices(10, 9) == [slice(0, 5), slice(5, 10)]  # as equal as they can be
    assert slices(0, 4) == []


def test_row_slices_never_cut_a_row():
    assert row_slices((3, 1, 2, 2, 4), 4) == [slice(0, 4), slice(4, 8), slice(8, 12)]
    assert row_slices((3, 2), 4) == [slice(0, 3), slice(3, 5)]
    assert row_slices((4, 5), 4) is None
    assert row_slices((), 4) == []


@pytest.mark.parametrize("loss", [ForwardKL(), TotalVariation()], ids=["in closed form", "through autograd"])
def test_a_compiled_loss_is_compiled_and_the_same(loss, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    teacher, logits = (torch.randn(N, V, generator=generator) for _ in range(2))
    totals, gradients, graphs = [], [], []
    for compiled in (False, True):
        leaf = logits.clone().requires_grad_()
        student = replace(Scores.from_logits(leaf), slicing=Slicing(compile=compiled))
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        total = loss(student, Scores.from_logits(teacher), BATCH).total
        total.backward()
        totals.append(total.detach())
        gradients.append(leaf.grad)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    torch._dynamo.reset()
    assert graphs[0] == 0
    assert graphs[1] > 0
    torch.testing.assert_close(totals[1], totals[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_limit_of_positions_below_one_is_refused():
    with pytest.raises(ConfigError, match=r"Slicing\.max_positions must be at least 1, got 0"):
        Slicing(max_positions=0)


class Doubled:
    """Another divergence, to be mixed into a loss."""

    def divergence(self, logp, logq):
        return 2 * (logp.exp() * (logp - logq)).sum(-1)


class Mixed(Doubled, ForwardKL):
    """Takes its divergence from a class that has no gradient."""


def test_a_closed_form_belongs_to_the_divergence_in_use():
    assert ForwardKL.has_closed_form
    assert ForwardKL().has_closed_form
    assert not TokenLoss.has_closed_form
    assert not Mixed.has_closed_form
    assert type("Renamed", (ForwardKL,), {}).has_closed_form
    assert not type("Rewritten", (ForwardKL,), {"divergence": Doubled.divergence}).has_closed_form
