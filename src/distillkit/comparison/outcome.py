"""What one run of a comparison came to, as its folder says."""

import csv
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillkit.callbacks.budget import USAGE
from distillkit.callbacks.curves import Series, read_metrics

FAILED = "failed.json"
"""File in a run's folder that says why it failed."""

FITTED = "fitted.json"
"""File in a run's folder that says that it was trained to its end."""

EVALUATION = "evaluation"
"""Folder in a run's folder with what `distillkit evaluate` wrote."""

TEACHER_FORCED = ("kl", "nll", "acceptance")
"""Figures of which a prompt has as many as its reference has tokens."""


@dataclass(frozen=True)
class Outcome:
    """A run's figures, costs and curves.

    Args:
        method: Name of the method.
        seed: Its seed.
        status: `done`, `failed`, or `unfinished`.
        error: Why it failed.
        found: What its `evaluation.json` holds.
        answers: The lines of its `answers.jsonl`.
        usage: What it has cost.
        series: What it logged, name to (step, value).
    """

    method: str
    seed: int
    status: str
    error: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    series: Series = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """Its held-out figures; none of a run that is not done."""
        figures: dict[str, float] = self.found.get("figures", {})
        return figures

    def by_prompt(self, figure: str) -> dict[str, tuple[float, float]]:
        """Each prompt's figure and its weight in the mean, by the prompt's id; without those that have none."""
        found = {}
        for answer in self.answers:
            own = {"length": float(answer["tokens"]), "finished": float(answer["finish"] == "stop")} | answer["figures"]
            if figure in own:
                found[answer["prompt_id"]] = (own[figure], answer["positions"] if figure in TEACHER_FORCED else 1.0)
        return found

    def curve(self, name: str) -> list[tuple[int, float, float, float]]:
        """A logged figure as (optimizer steps taken, tokens spent, seconds spent, value).

        Lightning logs what it has after n steps under n − 1; figures of before training are logged under 0.
        """
        spent = [self.series.get(f"train/spent_{unit}", []) for unit in ("tokens", "seconds")]
        found = []
        for step, value in self.series.get(name, []):
            if step == 0 and name.startswith("val/"):
                found.append((0, 0.0, 0.0, value))
            else:
                found.append((step + 1, _at(spent[0], step), _at(spent[1], step), value))
        return found


def _at(spent: Sequence[tuple[int, float]], step: int) -> float:
    """What was spent when something was logged under `step`; `spent` is in the order of steps."""
    place = bisect_right(spent, step, key=lambda point: point[0])
    return spent[place - 1][1] if place else 0.0


def read(folder: Path, method: str, seed: int) -> Outcome:
    """The outcome of the run in `folder`."""
    evaluation = folder / EVALUATION / "evaluation.json"
    if evaluation.exists():
        status, error = "done", ""
    elif (folder / FAILED).exists():
        status, error = "failed", str(_json(folder / FAILED)["error"])
    else:
        status, error = "unfinished", ""
    is_done = status == "done"
    lines = (folder / EVALUATION / "answers.jsonl").read_text().splitlines() if is_done else []
    usage: dict[str, Any] = {}
    for path in (folder / USAGE, folder / FITTED):
        usage |= _json(path) if path.exists() else {}
    series = read_metrics(folder)
    peaks = [value for _, value in series.get("train/peak_memory_gb", [])]
    if peaks:
        usage["peak_memory_gb"] = max(peaks)
    found, answers = _json(evaluation) if is_done else {}, [json.loads(line) for line in lines]
    return Outcome(method, seed, status, error, found, answers, usage, series)


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write_tables(folder: Path, outcomes: list[Outcome]) -> None:
    """Writes `results.csv`, a line for each run, and `curves.csv`, a line for each logged figure of each step."""
    figures = list(dict.fromkeys(name for own in outcomes for name in own.figures))
    costs = [
        name for name in dict.fromkeys(name for own in outcomes for name in own.usage)
        if not any(isinstance(own.usage.get(name), dict) for own in outcomes)
    ]  # fmt: skip
    with (folder / "results.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "seed", "status", "error", *figures, *costs])
        for own in outcomes:
            values = [own.figures.get(name, "") for name in figures] + [own.usage.get(name, "") for name in costs]
            table.writerow([own.method, own.seed, own.status, own.error, *values])
    with (folder / "curves.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "seed", "name", "step", "tokens", "seconds", "value"])
        for own in outcomes:
            for name in sorted(own.series):
                table.writerows([own.method, own.seed, name, *point] for point in own.curve(name))
