"""Our losses against those of the installed trl, on random logits: value and gradient."""

import pytest
import torch
from torch import nn

from distillkit.errors import ConfigError
from distillkit.losses import ForwardKL, GeneralizedJSD, ReverseKL
from distillkit.testing import make_batch
from distillkit.types import Scores

pytestmark = pytest.mark.conformance

LENGTHS, VOCAB = (5, 3, 4), 50
BETAS = [0.1, 0.5, 0.9]
ENDS = {0.0: ForwardKL, 1.0: ReverseKL}
TOLERANCE = 1e-5
"""Of the largest number that is compared."""


@pytest.fixture
def batch():
    return make_batch(LENGTHS, ("dataset",) * 3, range(3), VOCAB)


@pytest.fixture
def logits(batch):
    """Of a student and a teacher, `[N, V]` float32."""
    generator = torch.Generator().manual_seed(0)
    return [3.0 * torch.randn(batch.num_tokens, VOCAB, generator=generator) for _ in range(2)]


def mean_of(loss, student, teacher, batch):
    """The mean over positions and its gradient by the student's logits."""
    leaf = student.clone().requires_grad_()
    output = loss(Scores.from_logits(leaf), Scores.from_logits(teacher), batch)
    mean = (output.total / output.units).sum()
    return mean.detach(), torch.autograd.grad(mean, leaf)[0]


def padded(values, batch):
    """`[N, V]` of the positions -> `[B, T, V]`, as trl takes them, with labels that leave out the padding."""
    whole = torch.zeros(len(batch.lengths), max(batch.lengths), values.shape[-1])
    labels = torch.full(whole.shape[:2], -100)
    for row, part in enumerate(values.split(batch.lengths)):
        whole[row, : len(part)], labels[row, : len(part)] = part, 1
    return whole, labels


def trl_mean_of(gkd, student, teacher, batch, **settings):
    leaf = student.clone().requires_grad_()
    (ours, labels), (theirs, _) = padded(leaf, batch), padded(teacher, batch)
    mean = gkd.GKDTrainer.generalized_jsd_loss(ours, theirs, labels=labels, **settings)
    return mean.detach(), torch.autograd.grad(mean, leaf)[0]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.abs().max())
        assert scale > 0
        torch.testing.assert_close(ours.float(), theirs, rtol=0.0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd_is_trls_with_the_same_beta(gkd, batch, logits, beta, temperature):
    ours = mean_of(GeneralizedJSD(beta, "token_mean", temperature), *logits, batch)
    assert_same(ours, trl_mean_of(gkd, *logits, batch, beta=beta, temperature=temperature))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", ENDS)
def test_at_the_ends_of_beta_trl_has_the_kl_divergences(gkd, batch, logits, beta, temperature):
    ours = mean_of(ENDS[beta]("token_mean", temperature), *logits, batch)
    assert_same(ours, trl_mean_of(gkd, *logits, batch, beta=beta, temperature=temperature))


def test_the_other_beta_weighs_the_other_model(gkd, batch, logits):
    ours, _ = mean_of(GeneralizedJSD(0.1, "token_mean"), *logits, batch)
    swapped, _ = trl_mean_of(gkd, *logits[::-1], batch, beta=0.9)
    other, _ = trl_mean_of(gkd, *logits, batch, beta=0.9)
    assert float(ours) == pytest.approx(float(swapped), abs=TOLERANCE)
    assert float(ours) != pytest.approx(float(other), abs=100 * TOLERANCE)


def test_trl_jumps_at_the_ends_where_ours_refuses(gkd, batch, logits):
    near, at = (float(trl_mean_of(gkd, *logits, batch, beta=beta)[0]) for beta in (1e-4, 0.0))
    assert (near, at) == pytest.approx((6.18e-4, 6.828), rel=0.01)
    ours, _ = mean_of(GeneralizedJSD(1e-4, "token_mean"), *logits, batch)
    assert float(ours) == pytest.approx(near, abs=TOLERANCE)
    with pytest.raises(ConfigError, match="use ForwardKL or ReverseKL there"):
        GeneralizedJSD(0.0)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_trl_never_multiplies_by_the_squared_temperature(gkd, batch, logits, temperature):
    plain = trl_mean_of(gkd, *logits, batch, beta=0.5, temperature=temperature)
    ours = mean_of(GeneralizedJSD(0.5, "token_mean", temperature, rescale=True), *logits, batch)
    assert_same(ours, [temperature**2 * value for value in plain])


def test_without_labels_trl_divides_by_rows_and_not_by_positions(gkd, logits):
    student, teacher = (own[None] for own in logits)  # [1, N, V]
    found = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.5)
    expected = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.5, reduction="sum")
    assert float(found) == pytest.approx(float(expected))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [*ENDS, *BETAS])
def test_the_chunked_divergence_is_ours_by_hidden_states_and_heads(chunked, batch, beta, temperature):
    generator = torch.Generator().manual_seed(1)
    student_hidden, teacher_hidden = (torch.randn(batch.num_tokens, width, generator=generator) for width in (8, 6))
    heads = [nn.Linear(width, VOCAB, bias=False) for width in (8, 6)]
    for head in heads:
        nn.init.normal_(head.weight, generator=generator)
    hidden = student_hidden.clone().requires_grad_()
    given = (hidden, heads[0].weight, None, teacher_hidden, heads[1].weight.detach(), None, beta, temperature)
    theirs = chunked(*given)[0].mean()
    expected = (theirs.detach(), *torch.autograd.grad(theirs, (hidden, heads[0].weight)))

    loss = ENDS[beta] if beta in ENDS else lambda *given: GeneralizedJSD(beta, *given)
    scores = [Scores(hidden, heads[0], VOCAB), Scores(teacher_hidden, heads[1], VOCAB)]
    output = loss("token_mean", temperature)(*scores, batch)
    ours = (output.total / output.units).sum()
    assert_same((ours.detach(), *torch.autograd.grad(ours, (hidden, heads[0].weight))), expected)
