from importlib import resources

import numpy as np
import pytest
import torch
import yaml
from distillkit_taid.loss import TAID
from distillkit_taid.schedule import Interpolation
from scipy.special import expit, rel_entr, softmax

from distillkit import registry
from distillkit.errors import ConfigError
from distillkit.losses import ForwardKL
from distillkit.testing import check_loss, check_schedule
from distillkit.types import Progress, Summary


def random_logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(30, 9, generator=generator, dtype=torch.float64) for _ in range(2)]


def summary(mean):
    value = torch.tensor(mean, dtype=torch.float64)
    return Summary(value, value, value, torch.tensor(1.0))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, None])
def test_it_keeps_the_contract_of_a_loss(t):
    # The student is detached in the target.
    check_loss(TAID(t), exact_gradient=t == 1.0)


def test_its_schedule_keeps_the_contract_of_a_schedule():
    check_schedule(Interpolation())


@pytest.mark.parametrize("t", [0.0, 0.25, 0.7, 1.0])
def test_it_is_the_divergence_from_the_distribution_between(t):
    teacher, student = random_logits()
    values = TAID(t).divergence(teacher.log_softmax(-1), student.log_softmax(-1))
    between = softmax((1 - t) * student.numpy() + t * teacher.numpy(), axis=-1)
    expected = rel_entr(between, softmax(student.numpy(), axis=-1)).sum(-1)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-10, atol=1e-14)


def test_at_the_teacher_it_is_forward_kl():
    logp, logq = (logits.log_softmax(-1) for logits in random_logits())
    torch.testing.assert_close(TAID(1.0).divergence(logp, logq), ForwardKL().divergence(logp, logq))


def test_its_gradient_is_the_students_less_the_target():
    teacher, student = random_logits()
    leaf = student.clone().requires_grad_()
    TAID(0.4).divergence(teacher.log_softmax(-1), leaf.log_softmax(-1)).sum().backward()
    expected = softmax(student.numpy(), axis=-1) - softmax(0.6 * student.numpy() + 0.4 * teacher.numpy(), axis=-1)
    np.testing.assert_allclose(leaf.grad.numpy(), expected, atol=1e-12)


def test_t_follows_the_papers_algorithm():
    losses = [2.0, 1.5, 1.6, 0.9, 0.9, 0.3]
    schedule = Interpolation(start=0.2, end=1.0, alpha=0.9, beta=0.5)
    schedule.update(Progress(0, 20), {})
    t, momentum, before = 0.2, 0.0, None
    for step, loss in enumerate(losses, start=1):
        line = 0.2 + 0.8 * step / 20
        adapted = t
        if before is not None:
            momentum = 0.5 * momentum + 0.5 * (before - loss) / before
            adapted = t + 0.9 * expit(momentum) * (1 - t)
        t, before = min(1.0, max(line, adapted)), loss
        schedule.update(Progress(step, 20), {"divergence": summary(loss)})
        assert float(schedule.value) == pytest.approx(t, rel=1e-12)
    assert t > line, "it has run ahead of the line"


def test_without_a_loss_it_is_the_line():
    schedule = Interpolation(start=0.4, end=1.0)
    for step, expected in ((0, 0.4), (5, 0.7), (10, 1.0)):
        schedule.update(Progress(step, 10), {})
        assert float(schedule.value) == pytest.approx(expected)


def test_the_loss_hands_its_divergence_to_the_schedule():
    loss = TAID(Interpolation(alpha=1.0))
    for step, value in ((1, 1.0), (2, 0.5)):
        loss.update(Progress(step, 1000), {"divergence": summary(value)})
    assert float(loss.schedule.value) > 0.6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TAID(1.5), r"TAID\.t must lie in \[0, 1\], got 1\.5"),
        (lambda: Interpolation(start=1.0), r"Interpolation needs 0 <= start < end <= 1, got start 1\.0 and end 1\.0"),
        (lambda: Interpolation(alpha=2.0), r"Interpolation\.alpha must lie in \[0, 1\], got 2\.0"),
        (lambda: Interpolation(beta=1.0), r"Interpolation\.beta must lie in \[0, 1\), got 1\.0"),
    ],
)
def test_numbers_outside_their_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_configuration_names_installed_parts():
    config = yaml.safe_load(resources.files("distillkit_taid").joinpath("taid.yaml").read_text())
    loss = config["model"]["loss"]
    assert registry.get("loss", loss["class_path"]) is TAID
    assert registry.get("schedule", loss["init_args"]["t"]["class_path"]) is Interpolation
    Interpolation(**loss["init_args"]["t"]["init_args"])
