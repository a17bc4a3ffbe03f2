import pytest
import torch

from distillkit.errors import ConfigError
from distillkit.losses import DPKD, CrossEntropy, DistiLLM2, ForwardKL, TotalVariation, WeightedSum
from distillkit.schedules import AdaptiveAlpha
from distillkit.testing import make_batch
from distillkit.types import Progress, Scores, Summary

V = 5
BATCH = make_batch((2, 1, 3, 2), ("teacher", "student") * 2, (0, 0, 1, 1), V)


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(8, V, generator=generator, dtype=torch.float64) for _ in range(2)]
    return Scores.from_logits(logits[0].requires_grad_()), Scores.from_logits(logits[1])


def mean_of(output):
    """What training takes: each component over its own units, added."""
    return (output.total / output.units).sum()


def test_the_mean_is_the_weighted_sum_of_the_parts_means(models):
    parts = [ForwardKL(), CrossEntropy("token_mean"), DPKD()]
    output = WeightedSum(parts, [0.5, 2.0, 0.0])(*models, BATCH)
    means = [mean_of(part(*models, BATCH)) for part in parts]
    assert output.units.tolist() == [4, 8, 2]
    torch.testing.assert_close(mean_of(output), 0.5 * means[0] + 2.0 * means[1])
    grads = [
        torch.autograd.grad(value, models[0].hidden)[0] for value in (mean_of(output), means[0] / 2 + 2 * means[1])
    ]
    torch.testing.assert_close(*grads)


def test_a_part_with_two_components_keeps_both(models):
    loss = WeightedSum([TotalVariation(), DistiLLM2()], [1.0, 3.0])
    output = loss(*models, BATCH)
    inner = DistiLLM2()(*models, BATCH)
    assert loss.units(BATCH).tolist() == output.units.tolist() == [4, 2, 2]
    torch.testing.assert_close(output.total[1:], 3.0 * inner.total)


def test_metrics_carry_the_parts_place_and_name(models):
    metrics = WeightedSum([CrossEntropy(), ForwardKL(), ForwardKL("token_mean")], [1.0, 1.0, 1.0])(
        *models, BATCH
    ).metrics
    assert set(metrics) == {"0_CrossEntropy/nll", "1_ForwardKL/divergence", "2_ForwardKL/divergence"}


def test_a_teacher_is_needed_if_a_part_needs_one(models):
    student = models[0]
    alone = WeightedSum([CrossEntropy(), CrossEntropy()], [0.5, 0.5])
    assert not alone.needs_teacher
    assert WeightedSum([CrossEntropy(), ForwardKL()], [0.5, 0.5]).needs_teacher
    torch.testing.assert_close(mean_of(alone(student, None, BATCH)), mean_of(CrossEntropy()(student, None, BATCH)))


def test_each_part_is_updated_with_its_own_metrics(models):
    parts = [DistiLLM2(alpha=AdaptiveAlpha(warmup_steps=1)) for _ in range(2)]
    loss = WeightedSum(parts, [1.0, 1.0])
    gaps = {"0_DistiLLM2/gap_teacher": 0.25, "1_DistiLLM2/gap_teacher": 0.5, "gap_teacher": 0.75}
    summaries = {name: Summary(*[torch.tensor(gap)] * 3, torch.tensor(2.0)) for name, gap in gaps.items()}
    loss.update(Progress(1, 2), summaries)
    assert [part.alpha_teacher.reference_gap.item() for part in parts] == [0.25, 0.5]
    assert [part.beta.value.item() for part in parts] == [0.75, 0.75]


def test_its_parts_are_in_its_state():
    loss = WeightedSum([ForwardKL(), DistiLLM2()], [1.0, 1.0])
    assert "losses.1.alpha_teacher.gap_sum" in loss.state_dict()


@pytest.mark.parametrize(("losses", "weights"), [([], []), ([ForwardKL()], []), ([ForwardKL()], [1.0, 2.0])])
def test_refuses_anything_but_one_weight_for_each_loss(losses, weights):
    message = rf"needs one weight for each loss, got {len(losses)} losses and {len(weights)} weights"
    with pytest.raises(ConfigError, match=message):
        WeightedSum(losses, weights)


def test_the_schedules_of_a_part_are_named_as_its_metrics_are(models):
    loss = WeightedSum([TotalVariation(), DistiLLM2()], [1.0, 3.0])
    assert set(loss.schedules()) == {f"1_DistiLLM2/{name}" for name in ("alpha_teacher", "alpha_student", "beta")}
    assert set(loss.schedules()) <= loss(*models, BATCH).metrics.keys()
    assert loss.schedules()["1_DistiLLM2/beta"] is loss.losses[1].beta
