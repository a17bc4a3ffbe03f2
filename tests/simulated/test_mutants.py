"""Each mistake on the way to a GPU, made on purpose, is seen without one."""

import pytest

from helpers import simulated_runs as runs
from helpers.simulated_gpu import in_child
from helpers.simulated_streams import HostMemoryError, HostTensorError, RaceError

pytestmark = pytest.mark.slow

SCORING, PACKING, STREAMS = (f"distillkit.{name}" for name in ("models.scoring", "models.packing", "devices.streams"))
TYPES, COLLATED = "distillkit.types.batch", "distillkit.training.datamodule"
IN_PROCESS, DISTILLM2 = "distillkit.generators.transformers", "distillkit.losses.distillm2"

STOPPED = {
    "the teacher does not wait for the batch": (
        RaceError,
        SCORING,
        "    side.wait_stream(main)\n",
        "    pass\n",
        runs.trained,
        "cached",
    ),
    "the loss does not wait for the teacher": (
        RaceError,
        SCORING,
        "    main.wait_stream(side)\n",
        "    pass\n",
        runs.trained,
        "kd, packed",
    ),
    "the student does not wait for the teacher's mask": (
        RaceError,
        PACKING,
        "    ready.wait()",
        "    pass",
        runs.trained,
        "kd, packed",
    ),
    "a round does not wait for the copied weights": (
        RaceError,
        STREAMS,
        "    stream.wait_stream(module.current_stream(device))",
        "    pass",
        runs.overlapped,
    ),
    "the mask's segments stay on the host": (
        HostTensorError,
        PACKING,
        "send(torch.repeat_interleave(torch.arange(len(lengths)), lengths), device)",
        "torch.repeat_interleave(torch.arange(len(lengths)), lengths)",
        runs.trained,
        "kd, packed",
    ),
    "the packed form of a batch stays on the host": (
        HostTensorError,
        TYPES,
        "self.packed.to(device, non_blocking)",
        "self.packed",
        runs.trained,
        "kd, packed",
    ),
    "one tensor of a batch stays on the host": (
        HostTensorError,
        TYPES,
        "non_blocking=non_blocking) for name in _TENSORS}",
        "non_blocking=non_blocking) for name in _TENSORS if name != 'positions'}",
        runs.trained,
        "kd, padded",
    ),
    "a side's positions stay on the host": (
        HostTensorError,
        DISTILLM2,
        "    return send(index, batch.rows.device)",
        "    return index",
        runs.trained,
        "distillm2",
    ),
    "the rows' weights stay on the host": (
        HostTensorError,
        "distillkit.losses.token",
        "dtype=dtype).to(batch.rows.device, non_blocking=True)",
        "dtype=dtype)",
        runs.trained,
        "distillm2",
    ),
    "cached scores stay on the host": (
        HostTensorError,
        "distillkit.storage.scores",
        "tensor.to(device, non_blocking=pin)",
        "tensor",
        runs.trained,
        "cached",
    ),
    "the writer's random numbers stay on the host": (
        HostTensorError,
        IN_PROCESS,
        "uniform.to(device, exact_dtype(device))",
        "uniform.to(exact_dtype(device))",
        runs.generated,
        0.8,
    ),
    "the writer's rows stay on the host": (
        HostTensorError,
        IN_PROCESS,
        "torch.arange(count, device=device)",
        "torch.arange(count)",
        runs.generated,
        0.0,
    ),
    "time is read off an event that may not have happened": (
        AssertionError,
        "distillkit.callbacks.throughput",
        "    marks[-1][1].synchronize()",
        "    pass",
        runs.timed,
    ),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_mistake_stops_the_run(name):
    error, module, old, new, run, *arguments = STOPPED[name]
    with pytest.raises(error) as caught:
        in_child(runs.mutated, (module, old, new), run, *arguments)
    assert caught.type is error
    assert "Error" in str(caught.value)


WRONG = {
    "keys of later tokens": ("(key <= query)", "(key <= query + 1)"),
    "another row of the line": ("(owner[key] == segment)", "(owner[key] >= 0)"),
    "no shared prompt": ("| in_prefix", "& ~in_prefix"),
}


def test_a_right_mask_is_taken():
    assert in_child(runs.packed)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_mask_is_refused_when_the_model_is_taken_up(name):
    assert not in_child(runs.mutated, (PACKING, *WRONG[name]), runs.packed)


def test_random_numbers_that_are_not_restored_change_the_losses():
    mutation = ("distillkit.training.resume", "module.set_rng_state(saved", "(saved")
    whole, resumed = in_child(runs.mutated, mutation, runs.resumed)
    assert resumed != whole


WAITING = {
    "cached scores are read into memory that is not pinned": (
        "distillkit.storage.scores",
        "tensor.to(device, non_blocking=pin)",
        "tensor.to(device)",
    ),
    "a batch is copied while the host waits": (
        COLLATED,
        "batch.pin_memory().to(device, non_blocking=True)",
        "batch.pin_memory().to(device)",
    ),
    "a count is copied while the host waits": (
        "distillkit.training.step_metrics",
        "values.new_full((), float(values.numel()))",
        "values.new_tensor(float(values.numel()))",
    ),
    "transformers looks for packed rows": (PACKING, "        attention_mask=unused_mask,\n", "\n"),
}


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_of_the_host_is_counted(name):
    kind = "cached" if "cached" in name else "kd, packed"
    steps = in_child(runs.mutated, WAITING[name], runs.waits, kind)
    assert steps
    assert all(sum(sites.values()) > 0 for sites in steps)


def test_a_budget_that_does_not_wait_counts_what_is_not_done():
    mutation = ("distillkit.callbacks.budget", "            synchronize(pl_module.device)", "            pass")
    assert in_child(runs.mutated, mutation, runs.timed)["waits"] == [0.0]


def test_pinned_memory_that_is_written_to_too_early_is_seen():
    with pytest.raises(HostMemoryError):
        in_child(runs.overwritten)
