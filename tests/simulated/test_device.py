"""The simulated GPU itself: what it computes, and which mistakes it sees."""

import pytest

from helpers import simulated_runs as runs
from helpers.simulated_gpu import in_child
from helpers.simulated_streams import HostTensorError, RaceError


def test_gradients_are_those_of_the_cpu_and_nothing_waits():
    on_device, on_cpu, waits = in_child(runs.differentiated)
    assert len(on_device) == 4
    for ours, theirs in zip(on_device, on_cpu, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert waits == 0


def test_tensors_of_host_and_device_do_not_mix():
    with pytest.raises(HostTensorError, match="aten::add got tensors of the device and of the host"):
        in_child(runs.mixed)


def test_a_stream_that_does_not_wait_is_a_race():
    assert in_child(runs.raced, True) == 6.0
    with pytest.raises(RaceError, match="uses what another stream writes"):
        in_child(runs.raced, False)


@pytest.mark.parametrize("how", ["waited", "recorded"])
def test_memory_may_be_used_again_after_a_wait_or_a_record(how):
    in_child(runs.reused, how)


def test_memory_that_is_used_again_too_early_is_a_race():
    with pytest.raises(RaceError, match="memory that another stream still uses"):
        in_child(runs.reused, "neither")


def test_an_error_of_the_child_is_raised_with_its_traceback():
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        in_child(runs.divided_by_zero)
