"""The table that a comparison prints at its end."""

import math
import sys
from typing import Any

import pytest

from distillkit.cli import compare

METRICS = ["kl", "nll", "acceptance", "rouge_l", "gold_nll", "gold_rouge_l", "distinct_2", "length", "finished"]


@pytest.fixture
def results() -> Any:
    metrics = {name: {"mean": 1.234, "deviation": math.nan} for name in METRICS}
    done = [{"name": name, "metrics": metrics, "runs": {"0": "done"}} for name in ("kd", "gkd")]
    return {"metrics": METRICS, "methods": [*done, {"name": "broken", "metrics": {}, "runs": {"0": "failed"}}]}


@pytest.mark.parametrize("columns", [80, 140])
def test_the_table_fits_the_terminal(results: Any, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = compare._table(results).splitlines()
    assert max(map(len, lines)) <= columns
    assert len(lines) == (1 + len(METRICS) if columns == 80 else 4)
    assert lines[0].split()[0] == "method"
    assert "1 failed" in "\n".join(lines)
    assert "\n".join(lines).count("1.234") == 2 * len(METRICS)


def test_a_file_gets_a_row_for_each_method(results: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert [line.split()[0] for line in compare._table(results).splitlines()] == ["method", "kd", "gkd", "broken"]
