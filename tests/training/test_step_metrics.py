import math

import numpy as np
import pytest
import torch

from distillkit.schedules import AdaptiveAlpha, Constant, Linear
from distillkit.training.step_metrics import StepMeter, current_values, flatten
from distillkit.types import Progress, Summary
from helpers.gloo import run_ranks


def numbers(summary):
    return tuple(float(value) for value in (summary.mean, summary.min, summary.max, summary.count))


def test_values_are_reduced_over_the_micro_batches_of_a_step():
    meter, parts = StepMeter(), [[1.0, 2.0, 6.0], [-4.0], [0.5, 0.25]]
    for part in parts:
        meter.add({"gap": torch.tensor(part)}, loss=torch.tensor(0.1))
    values = np.concatenate(parts)
    assert numbers(meter.reduce()["gap"]) == pytest.approx((values.mean(), -4.0, 6.0, 6))


def test_a_mean_weighs_values_and_not_batches():
    meter = StepMeter()
    meter.add({"kl": torch.tensor([1.0, 1.0, 1.0])}, loss=torch.tensor(0.0))
    meter.add({"kl": torch.tensor(5.0)}, loss=torch.tensor(0.0))
    assert float(meter.reduce()["kl"].mean) == pytest.approx(8 / 4)


def test_the_loss_is_the_sum_of_its_shares():
    meter = StepMeter()
    for share in (0.5, 0.25, -0.125):
        meter.add({}, loss=torch.tensor(share, requires_grad=True))
    assert numbers(meter.reduce()["loss"]) == (0.625, 0.625, 0.625, 1.0)


def test_a_step_starts_anew():
    meter = StepMeter()
    assert meter.reduce() == {}
    meter.add({"gap": torch.tensor([9.0])}, loss=torch.tensor(1.0))
    meter.reduce()
    assert meter.reduce() == {}
    meter.add({"gap": torch.tensor([2.0])}, loss=torch.tensor(1.0))
    assert numbers(meter.reduce()["gap"]) == (2.0, 2.0, 2.0, 1.0)


def test_a_metric_without_values_counts_none_and_hides_no_other():
    meter = StepMeter()
    meter.add({"gap": torch.zeros(0)}, loss=torch.tensor(1.0))
    assert numbers(meter.reduce()["gap"]) == (0.0, math.inf, -math.inf, 0.0)
    meter.add({"gap": torch.zeros(0)}, loss=torch.tensor(1.0))
    meter.add({"gap": torch.tensor([3.0, 5.0])}, loss=torch.tensor(1.0))
    assert numbers(meter.reduce()["gap"]) == (4.0, 3.0, 5.0, 2.0)


def test_a_nan_shows_in_every_figure():
    meter = StepMeter()
    meter.add({"gap": torch.tensor([1.0, math.nan])}, loss=torch.tensor(1.0))
    assert all(math.isnan(value) for value in numbers(meter.reduce()["gap"])[:3])


def test_many_small_values_keep_their_precision():
    meter = StepMeter()
    for _ in range(20):
        meter.add({"kl": torch.full((100_000,), 0.1)}, loss=torch.tensor(0.0))
    assert float(meter.reduce()["kl"].mean) == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_of_schedules_that_vary_by_row_the_ends_are_logged_too():
    summary = Summary(*(torch.tensor(value, dtype=torch.float64) for value in (0.5, 0.1, 0.9, 4.0)))
    schedules = {
        "skew": AdaptiveAlpha(),
        "0/skew": AdaptiveAlpha(),
        "beta": Constant(0.5),
        "elsewhere": AdaptiveAlpha(),
    }
    names = ("kl", "skew", "0/skew", "beta")
    found = flatten(dict.fromkeys(names, summary), schedules)
    assert found.keys() == {*names, *(f"{name}_{end}" for name in ("skew", "0/skew") for end in ("min", "max"))}
    assert float(found["0/skew_min"]) == pytest.approx(0.1)
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_the_values_of_schedules_are_copies_without_those_that_the_loss_reports():
    moving, reported = Linear(1.0, 3.0), Constant(2.0)
    adaptive = AdaptiveAlpha(initial=0.05)
    values = current_values({"q": moving, "beta": reported, "a": adaptive}, {"beta", "kl"})
    moving.update(Progress(1, 2), {})
    assert {name: float(value) for name, value in values.items()} == pytest.approx(
        {"q": 1.0, "a": 0.05, "a/reference_gap": 0.0}
    )


def test_ranks_agree_on_the_figures_of_all(tmp_path):
    script = """
import torch
from distillkit.training.step_metrics import StepMeter
meter = StepMeter()
values = torch.tensor([1.0, 4.0, 7.0]) if rank == 0 else torch.zeros(0)
meter.add({"gap": values, "beta": torch.tensor(0.5 + rank)}, loss=torch.tensor(2.0 + 2 * rank))
found = {k: [float(x) for x in (v.mean, v.min, v.max, v.count)] for k, v in meter.reduce().items()}
"""
    expected = {"gap": [4.0, 1.0, 7.0, 3.0], "beta": [1.0, 0.5, 1.5, 2.0], "loss": [3.0, 2.0, 4.0, 2.0]}
    assert run_ranks(script, tmp_path) == [expected] * 2
