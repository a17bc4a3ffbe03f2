import copy
import math

import pytest
import torch
from torch import nn

from distillkit.errors import ConfigError
from distillkit.schedules import AdaptiveAlpha
from distillkit.types import Progress, Summary


def gap(mean, count):
    mean = torch.tensor(mean)
    return {"gap": Summary(mean, mean, mean, torch.tensor(float(count)))}


def adapted():
    """Behind a warm-up of two steps: m = (1/2·1 + 1/6·3) / 4 = 1/4, α₀ = 1/4, α in [1/8, 3/4]."""
    schedule = AdaptiveAlpha(initial=0.25, min=0.125, max=0.75, warmup_steps=2)
    schedule.update(Progress(0, 10), {})
    schedule.update(Progress(1, 10), gap(1 / 2, 1))
    schedule.update(Progress(2, 10), gap(1 / 6, 3))
    return schedule


def test_the_reference_gap_is_the_mean_over_rows_and_not_over_steps():
    assert adapted().reference_gap.item() == pytest.approx(1 / 4)


def test_the_reference_gap_is_zero_before_the_first_step():
    assert AdaptiveAlpha().reference_gap.item() == 0


def test_alpha_is_its_initial_value_during_the_warm_up():
    schedule = AdaptiveAlpha(initial=0.25, min=0.0, max=0.9, warmup_steps=2)
    gaps = torch.tensor([-0.5, 0.0, 0.1, 0.9])
    schedule.update(Progress(0, 10), {})  # before the first step: this is none
    assert schedule.for_rows(gaps).tolist() == [0.25] * 4
    schedule.update(Progress(1, 10), gap(0.1, 4))
    assert schedule.for_rows(gaps).tolist() == [0.25] * 4
    schedule.update(Progress(2, 10), gap(0.1, 4))
    assert schedule.for_rows(gaps).tolist() != [0.25] * 4


def test_alpha_follows_the_closed_form_within_its_bounds():
    # 1 − 3/16/g:   g = 1/2 → 5/8   1/4 → 1/4   3/8 → 1/2   1/5 → 1/16, clipped   7/8 → 11/14, clipped   g ≤ 0 → α_min
    gaps = torch.tensor([1 / 2, 1 / 4, 3 / 8, 1 / 5, 7 / 8, 0.0, -1 / 4, -1.0], dtype=torch.float64)
    expected = [5 / 8, 1 / 4, 1 / 2, 1 / 8, 3 / 4, 1 / 8, 1 / 8, 1 / 8]
    assert adapted().for_rows(gaps).tolist() == pytest.approx(expected, rel=1e-6)  # the reported means are float32


def test_a_harder_row_never_gets_a_smaller_alpha():
    alphas = adapted().for_rows(torch.linspace(-1, 1, 201))
    assert (alphas.diff() >= 0).all()
    assert alphas.min() == 0.125
    assert alphas.max() == 0.75


def test_a_negative_reference_gap_counts_every_row_with_a_gap_as_hard():
    schedule = AdaptiveAlpha(warmup_steps=1)
    schedule.update(Progress(1, 10), gap(-0.2, 4))
    assert schedule.for_rows(torch.tensor([0.1, 0.0, -0.1])).tolist() == pytest.approx([0.1, 0.01, 0.01])


def test_the_reference_stays_after_the_warm_up():
    schedule = adapted()
    schedule.update(Progress(3, 10), gap(0.9, 100))
    assert schedule.reference_gap.item() == pytest.approx(1 / 4)


def test_alpha_carries_no_gradient():
    gaps = torch.tensor([0.3, 0.5], requires_grad=True)
    assert not adapted().for_rows(gaps).requires_grad


def test_a_step_without_rows_counts_for_nothing():
    schedule = AdaptiveAlpha(initial=0.25, min=0.125, max=0.75, warmup_steps=1)
    schedule.update(Progress(1, 10), gap(math.nan, 0))  # the mean of no row
    schedule.update(Progress(2, 10), {})
    assert schedule.for_rows(torch.tensor([0.5])).tolist() == [0.25], "the warm-up must not have begun"
    schedule.update(Progress(3, 10), gap(0.25, 4))
    schedule.update(Progress(4, 10), gap(math.nan, 0))
    assert schedule.reference_gap.item() == 0.25
    assert schedule.for_rows(torch.tensor([0.5])).tolist() == [5 / 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_run_keeps_its_state_exactly(dtype):
    schedule = adapted()
    before = copy.deepcopy(schedule.state_dict())
    after = nn.Sequential(schedule, nn.Linear(1, 1)).to(dtype)[0].state_dict()
    assert {name: value.dtype for name, value in after.items()} == {
        "_initial": torch.float32,
        "gap_sum": torch.float64,
        "gap_count": torch.float64,
        "steps": torch.int64,
    }
    assert all(torch.equal(after[name], value) for name, value in before.items())
    # Rows in half precision get skews of the same type.
    assert schedule.for_rows(torch.tensor([0.5], dtype=dtype)).dtype == dtype


def test_it_continues_from_its_state():
    schedule, resumed = (AdaptiveAlpha(warmup_steps=3) for _ in range(2))
    schedule.update(Progress(1, 10), gap(0.5, 2))
    resumed.load_state_dict(schedule.state_dict())
    for step in (2, 3, 4):
        for each in (schedule, resumed):
            each.update(Progress(step, 10), gap(0.1 * step, step))
    # (0.5·2 + 0.2·2 + 0.3·3) / 7; the fourth step is behind the warm-up
    assert resumed.reference_gap.item() == pytest.approx(2.3 / 7)
    assert torch.equal(schedule.reference_gap, resumed.reference_gap)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min": 0.2, "max": 0.1}, r"needs 0 <= min <= max < 1, got min 0\.2 and max 0\.1"),
        ({"min": -0.1}, r"needs 0 <= min <= max < 1, got min -0\.1"),
        ({"max": 1.0}, r"needs 0 <= min <= max < 1, got min 0\.01 and max 1\.0"),
        ({"initial": 1.0}, r"AdaptiveAlpha\.initial must lie in \[0, 1\), got 1\.0"),
        ({"initial": -0.1}, r"AdaptiveAlpha\.initial must lie in \[0, 1\), got -0\.1"),
        ({"warmup_steps": 0}, r"AdaptiveAlpha\.warmup_steps must be at least 1, got 0"),
    ],
)
def test_refuses_a_setting_outside_its_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdaptiveAlpha(**settings)


def test_a_fixed_skew_is_allowed_as_bounds():
    schedule = AdaptiveAlpha(initial=0.0, min=0.0, max=0.0, warmup_steps=1)
    schedule.update(Progress(1, 2), gap(0.2, 1))
    assert schedule.for_rows(torch.tensor([0.3, -0.3])).tolist() == [0.0, 0.0]
