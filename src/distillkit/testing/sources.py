"""Contract tests of sources of prompts: `check_source` for a single one, `SourceContract` for pytest."""

import random

import torch

from distillkit.interfaces import PromptSource
from distillkit.testing.contract import broken, run_tests
from distillkit.types import Record


def check_source(source: PromptSource) -> None:
    """Runs all tests of `SourceContract`.

    Args:
        source: The source under test.

    Raises:
        AssertionError: If a promise is broken; the message says which one.
    """
    contract = SourceContract()
    run_tests(contract, lambda: source)


class SourceContract:
    """The contract of every `PromptSource` as tests. Subclass it as `Test…` and implement `make`; pytest does the rest.

    Few prompts are enough: each test reads all of them.
    """

    def make(self) -> PromptSource:
        """The source under test."""
        raise NotImplementedError("write make(): it returns the source under test")

    def test_has_a_name_for_messages(self) -> None:
        """`path` is a text that is not empty, before anything is read."""
        path = self.make().path
        self._require(isinstance(path, str) and bool(path), f"path must be a text, got {path!r}")

    def test_each_record_is_a_conversation(self) -> None:
        """An optional system turn, then user and assistant in turn, none of them empty; and at least one record."""
        records = self._records()
        self._require(len(records) > 0, "records must not be empty")
        for record in records:
            roles = [message["role"] for message in record.messages]
            turns = roles[1:] if roles[:1] == ["system"] else roles
            expected = [("user", "assistant")[index % 2] for index in range(len(turns))]
            self._require(
                len(turns) > 0 and turns == expected, f"user and assistant must alternate, got {', '.join(roles)}"
            )
            texts = [message["content"] for message in record.messages if message["role"] != "system"]
            self._require(
                all(isinstance(text, str) and bool(text.strip()) for text in texts), "a turn must not be empty"
            )

    def test_each_record_says_where_it_comes_from(self) -> None:
        """`origin` tells the records apart in error messages."""
        origins = [record.origin for record in self._records()]
        self._require(all(origins) and len(set(origins)) == len(origins), f"origins must differ, got {origins}")

    def test_is_deterministic(self) -> None:
        """Two sources with the same settings give the same records, whatever the global random state."""
        runs = []
        for seed in range(2):
            random.seed(seed)
            torch.manual_seed(seed)
            runs.append([record.messages for record in self._records()])
        self._require(runs[0] == runs[1], "a resumed run must read the same records in the same order")

    def _records(self) -> list[Record]:
        source = self.make()
        source.check()
        return source.records()

    def _require(self, condition: bool, promise: str) -> None:
        if not condition:
            raise broken(self.make(), promise)
