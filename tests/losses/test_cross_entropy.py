import pytest
import torch
from torch.nn.functional import cross_entropy

from distillkit.losses import CrossEntropy
from distillkit.testing import make_batch
from distillkit.types import Scores

V = 6
BATCH = make_batch((2, 0, 3), ("dataset",) * 3, (0, 1, 2), V)


@pytest.fixture
def logits():
    return torch.randn(5, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)


def test_token_mean_is_torchs_cross_entropy(logits):
    output = CrossEntropy("token_mean")(Scores.from_logits(logits), None, BATCH)
    mean = output.total / output.units
    torch.testing.assert_close(mean, cross_entropy(logits, BATCH.targets))
    grads = [torch.autograd.grad(value, logits)[0] for value in (mean, cross_entropy(logits, BATCH.targets))]
    torch.testing.assert_close(*grads)


def test_sequence_mean_is_the_mean_of_torchs_cross_entropy_of_each_response(logits):
    output = CrossEntropy()(Scores.from_logits(logits), None, BATCH)
    first, second = (cross_entropy(logits[part], BATCH.targets[part]) for part in (slice(0, 2), slice(2, 5)))
    torch.testing.assert_close(output.total / output.units, (first + second) / 2)


def test_it_reads_no_teacher(logits):
    assert not CrossEntropy.needs_teacher
    student = Scores.from_logits(logits)
    totals = [CrossEntropy()(student, teacher, BATCH).total for teacher in (None, student)]
    assert torch.equal(*totals)


def test_the_metric_is_the_negative_log_likelihood_of_each_target(logits):
    metrics = CrossEntropy()(Scores.from_logits(logits), None, BATCH).metrics
    assert metrics.keys() == {"nll"}
    torch.testing.assert_close(metrics["nll"], cross_entropy(logits, BATCH.targets, reduction="none").detach())
