"""Our losses against liger-kernel's fused ones, on random hidden states and heads: value and gradient."""

import pytest
import torch
from torch import nn

from distillkit.chunked.output_head import OutputHead
from distillkit.losses import CrossEntropy, ForwardKL, GeneralizedJSD, ReverseKL, WeightedSum
from distillkit.testing import make_batch
from distillkit.types import Scores

pytestmark = pytest.mark.conformance

VOCAB, WIDTHS = 50, (8, 6)
LOSSES = {
    0.0: ForwardKL,
    0.1: lambda *given: GeneralizedJSD(0.1, *given),
    0.5: lambda *given: GeneralizedJSD(0.5, *given),
    0.9: lambda *given: GeneralizedJSD(0.9, *given),
    1.0: ReverseKL,
}
TOLERANCE = 1e-5
"""Of the largest number that is compared."""


@pytest.fixture
def batch():
    return make_batch((5, 3, 4), ("dataset",) * 3, range(3), VOCAB)


@pytest.fixture
def models(batch):
    """Hidden states `[N, D]` and heads of a student and a teacher."""
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(batch.num_tokens, width, generator=generator) for width in WIDTHS]
    heads = [nn.Linear(width, VOCAB, bias=False) for width in WIDTHS]
    for head in heads:
        nn.init.normal_(head.weight, generator=generator)
    return hidden, heads


def gradients(value, hidden, head):
    return value.detach(), *torch.autograd.grad(value, (hidden, head.weight))


def ours(loss, models, batch):
    (student, teacher), heads = models
    leaf = student.clone().requires_grad_()
    output = loss(Scores(leaf, heads[0], VOCAB), Scores(teacher, heads[1], VOCAB), batch)
    return gradients((output.total / output.units).sum(), leaf, heads[0])


def theirs(liger, models, batch, hard=0.0, **settings):
    (student, teacher), heads = models
    leaf = student.clone().requires_grad_()
    loss = liger.LigerFusedLinearJSDLoss(weight_hard_loss=hard, weight_soft_loss=1.0 - hard, compiled=False, **settings)
    return gradients(loss(leaf, heads[0].weight, teacher, heads[1].weight, batch.targets), leaf, heads[0])


def assert_same(found, expected):
    for own, other in zip(found, expected, strict=True):
        scale = float(other.abs().max())
        assert scale > 0
        torch.testing.assert_close(own.float(), other, rtol=0.0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", LOSSES)
def test_the_loss_is_ligers_with_the_same_beta_and_no_squared_temperature(liger, models, batch, beta, temperature):
    found = ours(LOSSES[beta]("token_mean", temperature), models, batch)
    assert_same(found, theirs(liger, models, batch, beta=beta, temperature=temperature))


def test_its_hard_loss_is_cross_entropy_in_a_weighted_sum(liger, models, batch):
    loss = WeightedSum([CrossEntropy("token_mean"), GeneralizedJSD(0.5, "token_mean")], [0.3, 0.7])
    assert_same(ours(loss, models, batch), theirs(liger, models, batch, hard=0.3, beta=0.5))


@pytest.mark.parametrize(("beta", "figure"), [(0.0, 0.208), (0.5, 0.0672), (1.0, 4.83)])
def test_a_teacher_with_100_padded_tokens_costs_its_equal_something_there_and_nothing_here(
    liger, models, batch, beta, figure
):
    (hidden, _), (head, _) = models
    wide = nn.Linear(WIDTHS[0], VOCAB + 100).requires_grad_(False)
    wide.weight[:VOCAB], wide.weight[VOCAB:] = head.weight.detach(), 0.0
    wide.bias[:VOCAB], wide.bias[VOCAB:] = 0.0, -30.0
    loss = liger.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    found = loss(hidden, head.weight, hidden, wide.weight, batch.targets, None, wide.bias)
    assert float(found.detach()) == pytest.approx(figure, rel=0.01)
    scores = [Scores(hidden, OutputHead(own, VOCAB), VOCAB) for own in (head, wide)]
    assert float(LOSSES[beta]("token_mean")(*scores, batch).total.detach()) == pytest.approx(0.0, abs=TOLERANCE)
