import math

import pytest
import torch
from torch import nn

from distillkit.errors import ConfigError
from distillkit.schedules import Constant, Cosine, Linear, Piecewise
from distillkit.types import Progress

EVERY = [Constant(0.3), Linear(0.5, 0.75, 0.5), Cosine(1.0, 0.0), Piecewise([(0.0, 0.1), (1.0, 0.7)])]


def values(schedule, steps, total):
    seen = []
    for step in steps:
        schedule.update(Progress(step, total), {})
        seen.append(schedule.value.item())
    return seen


def test_constant_does_not_move():
    assert Constant(0.25).value.item() == 0.25
    assert values(Constant(0.25), (0, 1, 5, 10), 10) == [0.25] * 4


def test_linear_goes_straight_to_its_end_and_stays():
    # β of DistiLLM-2: 0.5 to 0.75 over the first half. 1/8 of training is a quarter of the way.
    assert values(Linear(0.5, 0.75, until=0.5), (0, 1, 2, 4, 6, 8), 8) == [0.5, 0.5625, 0.625, 0.75, 0.75, 0.75]
    assert values(Linear(1.0, -1.0), (0, 1, 2, 3, 4), 4) == [1.0, 0.5, 0.0, -0.5, -1.0]


def test_cosine_follows_half_a_cosine_to_its_end_and_stays():
    # (1 + cos(π/3))/2 = 3/4, (1 + cos(2π/3))/2 = 1/4; half way is the middle.
    assert values(Cosine(1.0, 0.0), (0, 2, 3, 4, 6), 6) == pytest.approx([1, 3 / 4, 1 / 2, 1 / 4, 0])
    assert values(Cosine(2.0, 4.0, until=0.5), (0, 2, 3, 6, 12), 12) == pytest.approx([2, 2.5, 3, 4, 4])


def test_piecewise_joins_its_points_with_lines_and_is_constant_outside():
    points = [(0.25, 1.0), (0.5, 2.0), (0.75, 0.0)]
    assert values(Piecewise(points), range(9), 8) == [1.0, 1.0, 1.0, 1.5, 2.0, 1.0, 0.0, 0.0, 0.0]


def test_piecewise_jumps_to_the_second_of_two_points_of_one_share():
    points = [(0.0, 0.0), (0.5, 1.0), (0.5, 8.0), (1.0, 4.0)]
    assert values(Piecewise(points), (0, 1, 2, 3, 4), 4) == [0.0, 0.5, 8.0, 6.0, 4.0]
    assert values(Piecewise([(0.5, 3.0)]), (0, 2, 4), 4) == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("schedule", EVERY, ids=lambda value: type(value).__name__)
def test_has_its_first_value_before_any_step(schedule):
    fresh = schedule.value.item()
    assert values(schedule, (0,), 10) == [fresh]


@pytest.mark.parametrize("schedule", EVERY, ids=lambda value: type(value).__name__)
def test_its_clock_is_the_share_of_the_optimizer_steps(schedule):
    assert values(schedule, (1, 3, 4), 4) == values(schedule, (100, 300, 400), 400)
    # It is told where training stands and counts nothing itself: a run that resumes at step 3 has the same value.
    assert values(schedule, (3,), 4) == values(schedule, (3, 3), 4)[1:]
    # Beyond its end, and in a run of no steps, it stays in its range.
    assert values(schedule, (5,), 4) == values(schedule, (4,), 4)
    assert values(schedule, (0,), 0) == values(schedule, (0,), 4)


def test_every_row_has_the_value_of_the_step():
    schedule = Linear(0.0, 1.0)
    schedule.update(Progress(1, 4), {})
    rows = schedule.for_rows(torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64))
    assert rows.tolist() == [0.25] * 3
    assert rows.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_run_keeps_the_value_in_float32(dtype):
    holder = nn.ModuleDict({"schedule": Constant(1 / 3), "layer": nn.Linear(1, 1)}).to(dtype)
    value = holder["schedule"].value
    assert holder["layer"].weight.dtype == dtype
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(1 / 3, rel=1e-7)  # bfloat16 would say 0.3340


def test_its_value_is_in_its_state():
    schedule, loaded = Linear(0.0, 1.0), Linear(0.0, 1.0)
    schedule.update(Progress(3, 4), {})
    loaded.load_state_dict(schedule.state_dict())
    assert loaded.value.item() == 0.75


@pytest.mark.parametrize("kind", [Linear, Cosine])
@pytest.mark.parametrize("until", [0.0, -0.5, 1.1, math.nan])
def test_refuses_an_end_outside_of_training(kind, until):
    with pytest.raises(ConfigError, match=rf"{kind.__name__}\.until must lie in \(0, 1\].*got {until}"):
        kind(0.0, 1.0, until=until)


@pytest.mark.parametrize("points", [[], [(0.5, 1.0), (0.25, 2.0)], [(-0.1, 1.0)], [(0.0, 1.0), (1.5, 2.0)]], ids=str)
def test_refuses_points_that_are_missing_unordered_or_outside_of_training(points):
    with pytest.raises(ConfigError, match=r"Piecewise\.points needs pairs \[share, value\] with ascending shares"):
        Piecewise(points)
