import copy

import pytest
import torch
from distillkit_opd.loss import SampledReverseKL

from distillkit import registry
from distillkit.data import collate
from distillkit.errors import ConfigError
from distillkit.losses import ReverseKL
from distillkit.testing import check_loss
from distillkit.types import Row, Scores

VOCAB = 6


def row_of(token):
    return Row((1, token), (False, True), "student", "p")


def one_position(token):
    return collate([row_of(token)], pad_id=0)


def gradient(loss, logits, teacher, batch):
    leaf = logits.clone().requires_grad_()
    output = loss(Scores.from_logits(leaf), Scores.from_logits(teacher), batch)
    return float(output.total.detach()), torch.autograd.grad(output.total, leaf)[0]


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_it_keeps_the_contract_of_a_loss(reduction):
    # The gradient is that of an expectation, not of the value.
    check_loss(SampledReverseKL(reduction), exact_gradient=False)


def test_its_mean_over_all_tokens_is_the_exact_gradient_and_value():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    q = student.softmax(-1)[0]
    mean_value, mean_gradient = 0.0, torch.zeros_like(student)
    for token in range(VOCAB):
        value, grad = gradient(SampledReverseKL(), student, teacher, one_position(token))
        mean_value += float(q[token]) * value
        mean_gradient += q[token] * grad
    value, grad = gradient(ReverseKL("token_mean"), student, teacher, one_position(0))
    assert mean_value == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(mean_gradient, grad, rtol=1e-12, atol=1e-14)


def test_a_worked_token():
    # q = (½, ½), p = (¼, ¾), the token 0: log 2, and log 2·(1 − ½, −½) by the logits.
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    value, grad = gradient(SampledReverseKL(), student, teacher, one_position(0))
    log2 = torch.tensor(2.0, dtype=torch.float64).log()
    assert value == pytest.approx(float(log2))
    torch.testing.assert_close(grad, torch.stack([log2 / 2, -log2 / 2])[None])


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ConfigError, match=r"SampledReverseKL\.reduction must be sequence_mean or token_mean"):
        SampledReverseKL("sum")


def test_it_is_found_by_its_name_and_may_be_copied():
    assert registry.get("loss", "SampledReverseKL") is SampledReverseKL
    assert copy.deepcopy(SampledReverseKL()).reduction == "token_mean"
