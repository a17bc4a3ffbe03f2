"""Contract tests of response filters: `check_filter` for a single one, `FilterContract` for pytest."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from distillkit.interfaces import ResponseFilter
from distillkit.testing.batches import make_rows
from distillkit.testing.contract import broken, run_tests
from distillkit.types import Row


def check_filter(response_filter: ResponseFilter) -> None:
    """Runs all tests of `FilterContract`.

    Args:
        response_filter: The filter under test.

    Raises:
        AssertionError: If a promise is broken; the message says which one.
    """
    contract = FilterContract()
    run_tests(contract, lambda: response_filter)


class FilterContract:
    """The contract of every `ResponseFilter` as tests. Subclass it as `Test…` and implement `make`."""

    def make(self) -> ResponseFilter:
        """The filter under test."""
        raise NotImplementedError("write make(): it returns the filter under test")

    def rows(self) -> Sequence[Row]:
        """Rows to judge: short and long ones, one cut, one blank, one without a response; override it for others."""
        lengths = (8, 1, 0, 40, 8, 8)
        rows = make_rows(lengths, ["student"] * len(lengths), range(len(lengths)), vocab=50)
        rows[4] = replace(rows[4], ended=False)
        rows[5] = replace(rows[5], blank=True)
        return rows

    def test_has_a_word_for_the_log(self) -> None:
        """`reason` is a text that is not empty."""
        reason = self.make().reason
        self._require(isinstance(reason, str) and bool(reason.strip()), f"reason must be a text, got {reason!r}")

    def test_says_yes_or_no_to_any_row(self) -> None:
        """`refuses` returns True or False, also for a row without a response."""
        decisions = self._decisions(self.rows())
        self._require(
            all(type(decision) is bool for decision in decisions), f"refuses must return a bool, got {decisions}"
        )

    def test_judges_each_row_independently(self) -> None:
        """A decision depends neither on the rows before it nor on their order."""
        rows = self.rows()
        decisions = self._decisions(rows)
        self._require(
            [self._decisions([row])[0] for row in rows] == decisions, "a row must be judged the same when it is alone"
        )
        self._require(self._decisions(rows[::-1])[::-1] == decisions, "rows must be judged the same in any order")

    def test_is_deterministic(self) -> None:
        """Decisions depend neither on the global random state nor on earlier calls: every rank decides alike."""
        runs = []
        for seed in range(3):
            random.seed(seed)
            torch.manual_seed(seed)
            runs.append(self._decisions(self.rows()))
        self._require(runs[0] == runs[1] == runs[2], "a row must be judged the same when it is judged again")

    def _decisions(self, rows: Sequence[Row]) -> list[bool]:
        response_filter = self.make()
        return [response_filter.refuses(row) for row in rows]

    def _require(self, condition: bool, promise: str) -> None:
        if not condition:
            raise broken(self.make(), promise)
