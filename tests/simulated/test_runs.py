"""Whole runs on a simulated GPU: what is computed, where, in which order, and when the host waits."""

import pytest
import torch

from helpers import simulated_runs
from helpers.simulated_gpu import in_child

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("distillm2", "kd, packed", "kd, padded", "accumulation", "on-policy", "cached", "top-k")


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_the_cpu(kind):
    on_device, on_cpu = in_child(simulated_runs.trained, kind)
    assert [step for step, _ in on_device] == [step for step, _ in on_cpu]
    assert sum("train/loss" in row for _, row in on_device) >= 2
    for (_, ours), (_, theirs) in zip(on_device, on_cpu, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("kind", ["distillm2", "kd, packed", "accumulation", "cached", "top-k"])
def test_a_step_never_waits_for_the_device(kind):
    # Padded rows are left out: transformers asks the device whether a mask is needed.
    steps = in_child(simulated_runs.waits, kind)
    assert steps
    assert steps == [{}] * len(steps)


def test_a_round_is_written_on_a_stream_of_its_own_without_a_race():
    losses = in_child(simulated_runs.overlapped)
    assert len(losses) == 6
    assert all(torch.tensor(losses).isfinite())


def test_the_teacher_and_the_writer_have_a_stream_each():
    # All rounds use one stream: the allocator keeps freed memory for the stream that it was allocated on.
    assert len([count for count in in_child(simulated_runs.streams_used, "kd") if count > 100]) == 2
    assert len([count for count in in_child(simulated_runs.streams_used, "overlapped") if count > 100]) == 3


def test_models_that_run_as_graphs_share_a_stream():
    assert len([count for count in in_child(simulated_runs.streams_used, "kd", True) if count > 0]) == 1


def test_a_resumed_run_draws_the_devices_numbers_where_the_saved_one_stood():
    whole, resumed = in_child(simulated_runs.resumed)
    assert len(whole) == 2
    assert resumed == whole


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_generator_writes_the_cpus_tokens(temperature):
    on_device, on_cpu = in_child(simulated_runs.generated, temperature)
    assert [tokens for tokens, _ in on_device] == [tokens for tokens, _ in on_cpu]
    for (_, ours), (_, theirs) in zip(on_device, on_cpu, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_time_is_taken_by_events_that_have_happened():
    figures = in_child(simulated_runs.timed)
    assert figures["waits"][0] >= 4  # a budget of seconds counts what the device has done
    for name in ("train/tokens_per_s", "train/mfu", "train/spent_seconds"):
        assert len(figures[name]) >= 4
        assert all(value > 0 for value in figures[name]), name
