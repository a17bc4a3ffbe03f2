"""Contract tests of schedules: `check_schedule` for a single one, `ScheduleContract` for pytest."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distillkit.interfaces import Schedule
from distillkit.testing.contract import broken, run_tests
from distillkit.types import Progress, Summary

NUM_STEPS = 20


def check_schedule(schedule: Schedule) -> None:
    """Runs all tests of `ScheduleContract`.

    Args:
        schedule: The schedule, before its first step; it is copied, not changed.

    Raises:
        AssertionError: If a promise is broken; the message says which one.
    """
    contract = ScheduleContract()
    run_tests(contract, lambda: schedule)


class ScheduleContract:
    """The contract of every `Schedule` as tests. Subclass it as `Test…` and implement `make`; pytest does the rest."""

    def make(self) -> Schedule:
        """The schedule under test, before its first step."""
        raise NotImplementedError("write make(): it returns the schedule under test")

    def metrics(self, step: int) -> Mapping[str, Summary]:
        """Metrics that the loss reports in a step; override it for a schedule that reads others than `gap`."""
        gap = torch.tensor(0.1 + 0.01 * step)
        return {"gap": Summary(gap, gap - 0.05, gap + 0.05, torch.tensor(4.0 + step % 3))}

    def test_is_a_finite_number_without_gradient(self) -> None:
        """`value` is 0-dim, finite and detached, from the start to beyond the last step."""
        schedule = self._schedule()
        self._require_number(schedule, "as constructed")
        for step in range(NUM_STEPS + 2):
            self._move(schedule, step)
            self._require_number(schedule, f"after step {step} of {NUM_STEPS}")
        schedule.update(Progress(0, 0), {})
        self._require_number(schedule, "in a run of no steps")

    def test_for_rows_is_finite_and_without_gradient(self) -> None:
        """`for_rows` returns one finite, detached value per row in the gaps' dtype, also for an empty batch."""
        schedule = self._schedule()
        for step in range(NUM_STEPS + 1):
            self._move(schedule, step)
            for gap in (torch.tensor([-1.0, -0.1, 0.0, 1e-6, 0.2, 1.0], requires_grad=True), torch.zeros(0).double()):
                rows = schedule.for_rows(gap)
                _require(rows.shape == gap.shape, schedule, f"for_rows must return {list(gap.shape)}, got {rows.shape}")
                _require(rows.dtype == gap.dtype, schedule, f"for_rows must return {gap.dtype}, got {rows.dtype}")
                _require(not rows.requires_grad, schedule, "for_rows must carry no gradient")
                _require(bool(rows.isfinite().all()), schedule, f"for_rows must be finite, got {rows}")

    def test_does_not_move_between_steps(self) -> None:
        """Reading it changes nothing, nor does a second update with the same progress."""
        schedule = self._schedule()
        for step in range(4):
            self._move(schedule, step)
        before = _read(schedule)
        _require(_same(before, _read(schedule)), schedule, "reading it must not change it")
        schedule.update(Progress(3, NUM_STEPS), {})
        _require(_same(before, _read(schedule)), schedule, "a second update with the same progress must not change it")

    def test_resumes_from_a_checkpoint(self) -> None:
        """A new schedule that loads its state continues like the original."""
        for stop in (0, 3, NUM_STEPS - 1):
            schedule, resumed = self._schedule(), self._schedule()
            for step in range(stop + 1):
                self._move(schedule, step)
            resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
            _require(
                _same(_read(schedule), _read(resumed)), schedule, f"its buffers must contain its state of step {stop}"
            )
            for step in range(stop + 1, NUM_STEPS + 1):
                self._move(schedule, step)
                self._move(resumed, step)
            _require(
                _same(_read(schedule), _read(resumed)),
                schedule,
                f"resumed at step {stop} it must end at the same value",
            )

    def test_keeps_its_precision_in_a_half_precision_run(self) -> None:
        """Casting a module that contains it does not change its buffers."""
        schedule = self._schedule()
        for step in range(4):
            self._move(schedule, step)
        before = copy.deepcopy(schedule.state_dict())
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            after = nn.ModuleList([copy.deepcopy(schedule)]).to(dtype)[0].state_dict()
            same = all(after[name].dtype == old.dtype and torch.equal(after[name], old) for name, old in before.items())
            _require(same, schedule, f"a cast to {dtype} must not change its buffers")

    def _schedule(self) -> Schedule:
        return copy.deepcopy(self.make())

    def _move(self, schedule: Schedule, step: int) -> None:
        schedule.update(Progress(step, NUM_STEPS), self.metrics(step) if step else {})

    def _require_number(self, schedule: Schedule, when: str) -> None:
        value = schedule.value
        _require(value.dim() == 0, schedule, f"value must be 0-dim, got {list(value.shape)} {when}")
        _require(not value.requires_grad, schedule, f"value must carry no gradient {when}")
        _require(bool(value.isfinite()), schedule, f"value must be finite, got {value} {when}")


def _require(condition: bool, schedule: Schedule, promise: str) -> None:
    if not condition:
        raise broken(schedule, promise)


def _read(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Copies of the value and of the values of a few rows."""
    gap = torch.tensor([-0.3, 0.0, 0.1, 0.2, 0.9])
    return schedule.value.clone(), schedule.for_rows(gap).clone()


def _same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))
