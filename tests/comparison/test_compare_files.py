"""The comparisons of the repository and of the page are whole."""

import re
from pathlib import Path

import pytest

from distillkit.comparison import plan as compare_plan
from distillkit.comparison.side_by_side import check
from helpers import workspace
from helpers.docs import ROOT


def test_the_quick_comparison_is_one(tmp_path: Path) -> None:
    plan = compare_plan.read(str(ROOT / "configs" / "compare-quick.yaml"), out=str(tmp_path))
    methods = dict.fromkeys(run.method for run in plan.runs)
    assert len(methods) >= 8
    assert len(plan.seeds) == 2
    assert plan.warm_start is not None
    assert [run.method for run in plan.curations()] == ["kd", "kd"], "every method reads what these write"
    assert {run.config["model"]["student"]["source"] for run in plan.runs} == {str(tmp_path / "warm-start" / "export")}


def test_the_comparison_of_the_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace.make(tmp_path / "workspace"))
    plan = compare_plan.read("compare.yaml")
    check(plan)
    assert len(plan.runs) == 8
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", (ROOT / "docs" / "compare.md").read_text(), re.MULTILINE)
    assert set(compare_plan.KEYS) <= {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_methods_named_on_the_command_line_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace.make(tmp_path / "workspace"))
    plan = compare_plan.read("compare.yaml", extra_methods=["gkd", "kd"])
    before = compare_plan.read("compare.yaml")
    assert plan.runs[: len(before.runs)] == before.runs
    assert plan.baseline == before.baseline
    assert {run.method for run in plan.runs[len(before.runs) :]} == {"gkd"}
    assert {run.config["model"]["loss"]["class_path"] for run in plan.runs if run.method == "gkd"} == {"GeneralizedJSD"}
