from importlib import resources

import numpy as np
import pytest
import torch
import yaml
from distillkit_csd.loss import ConcreteScore

from distillkit import registry
from distillkit.errors import ConfigError
from distillkit.testing import check_loss

KINDS = ("teacher", "student", "uniform")


def random_pair(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(20, 9, generator=generator, dtype=torch.float64) for _ in range(2)]


def double_sum(teacher, student, first, second):
    """Equation 8 as it stands, from logits, pair by pair."""
    softmax = [np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in (teacher, student)]
    weights = {"teacher": softmax[0], "student": softmax[1], "uniform": np.full(len(teacher), 1 / len(teacher))}
    total = 0.0
    for y in range(len(teacher)):
        for x in range(len(teacher)):
            gap = student[x] - student[y] - teacher[x] + teacher[y]
            total += 0.5 * weights[first][y] * weights[second][x] * gap**2
    return total


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_it_keeps_the_contract_of_a_loss(first, second):
    # The weights are detached in the gradient.
    check_loss(ConcreteScore(first, second), exact_gradient=first == second == "teacher")


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_it_is_the_double_sum_of_the_paper(first, second):
    teacher, student = random_pair()
    values = ConcreteScore(first, second).divergence(teacher.log_softmax(-1), student.log_softmax(-1))
    rows = zip(teacher.numpy(), student.numpy(), strict=True)
    np.testing.assert_allclose(values.numpy(), [double_sum(*row, first, second) for row in rows], rtol=1e-10)


def test_a_number_added_to_all_logits_changes_nothing():
    teacher, _ = random_pair()
    value = ConcreteScore().divergence(teacher.log_softmax(-1), (teacher + 5.0).log_softmax(-1))
    assert float(value.abs().max()) < 1e-25


def test_a_worked_position():
    # The variance of two values with the weights 0.8 and 0.2: 0.8·0.2 times their squared distance.
    logp, logq = (torch.tensor([row], dtype=torch.float64).log() for row in ((0.5, 0.5), (0.8, 0.2)))
    gap = np.log(0.8 / 0.2)
    assert ConcreteScore().divergence(logp, logq).item() == pytest.approx(0.8 * 0.2 * gap**2)


def test_an_unknown_weight_is_refused():
    with pytest.raises(ConfigError, match=r"ConcreteScore\.second must be teacher, student or uniform, got 'data'"):
        ConcreteScore(second="data")


def test_the_configuration_names_an_installed_part():
    config = yaml.safe_load(resources.files("distillkit_csd").joinpath("csd.yaml").read_text())
    loss = config["model"]["loss"]
    assert registry.get("loss", loss["class_path"]) is ConcreteScore
    ConcreteScore(**loss["init_args"])
