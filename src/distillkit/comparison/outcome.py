"""Outcome of one run of a comparison, read from its folder."""

import csv
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from distillkit.comparison.checked import evaluation_fault, usage_fault
from distillkit.errors import StoreError
from distillkit.run_folder import (
    ANSWERS,
    EVALUATION,
    FAILED,
    FITTED,
    SCHEDULES,
    USAGE,
    Series,
    metrics_file,
    read_metrics,
)
from distillkit.storage.atomic import atomic_path, read_json, read_json_lines, read_json_list

_COUNTED = {"kl": "positions", "nll": "positions", "acceptance": "positions", "gold_nll": "gold_positions"}
"""Metrics that have one value per token of a response; a prompt's weight is its number of tokens, under this key."""

_REMEDY = "run the comparison again, which repeats what the file belongs to"


@dataclass(frozen=True)
class Outcome:
    """The metrics, costs and curves of a run.

    Args:
        method: Name of the method.
        seed: Random seed of the run.
        status: `done`, `failed`, `unfinished`, or `damaged` if one of its files is.
        error: Reason for a failure, or which file is damaged; empty otherwise.
        evaluation: Content of `evaluation.json`; empty unless the run is done.
        answers: Rows of `answers.jsonl`.
        usage: Tokens, seconds and memory that the run used.
        series: Logged metrics, name to (step, value).
        schedules: Names of the schedules that the run logs, after `train/`.
    """

    method: str
    seed: int
    status: str
    error: str = ""
    evaluation: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    series: Series = field(default_factory=dict)
    schedules: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """Held-out metrics by name; empty unless the run is done."""
        metrics: dict[str, float] = self.evaluation.get("metrics", {})
        return metrics

    def by_prompt(self, metric: str) -> dict[str, tuple[float, float]]:
        """The value of a metric and its weight in the mean, by prompt id; prompts without the metric are left out."""
        values = {}
        for answer in self.answers:
            metrics = {"length": float(answer["tokens"]), "finished": float(answer["finish"] == "stop")}
            metrics |= answer["metrics"]
            if metric in metrics:
                weight = answer.get(_COUNTED[metric], 0) if metric in _COUNTED else 1.0
                values[answer["prompt_id"]] = (metrics[metric], weight)
        return values

    def curve(self, name: str) -> list[tuple[int, float, float, float]]:
        """A logged metric as (optimizer steps done, tokens spent, seconds spent, value).

        Lightning logs the state after n steps under n − 1; validation before training is logged under 0.
        """
        tokens, seconds = (self.series.get(f"train/spent_{unit}", []) for unit in ("tokens", "seconds"))
        points = []
        for step, value in self.series.get(name, []):
            if step == 0 and name.startswith("val/"):
                points.append((0, 0.0, 0.0, value))
            else:
                points.append((step + 1, _spent_at(tokens, step), _spent_at(seconds, step), value))
        return points


def _spent_at(spent: Sequence[tuple[int, float]], step: int) -> float:
    """The amount spent up to `step`; `spent` is sorted by step."""
    index = bisect_right(spent, step, key=lambda point: point[0])
    return spent[index - 1][1] if index else 0.0


def read(folder: Path, method: str, seed: int) -> Outcome:
    """The outcome of the run in `folder`."""
    status, error = "unfinished", ""
    evaluation: dict[str, Any] = {}
    answers: list[dict[str, Any]] = []
    usage: dict[str, Any] = {}
    series, problem = _read_series(folder)
    damaged = damage(folder)
    for path in (folder / USAGE, folder / FITTED):
        usage |= read_json(path, _REMEDY) if path.exists() and path not in damaged else {}
    peaks = [value for _, value in series.get("train/peak_memory_gb", [])]
    if peaks:
        usage["peak_memory_gb"] = max(peaks)
    if damaged:
        status, error = "damaged", next(iter(damaged.values()))
    elif metrics_file(folder).exists():
        status, (evaluation, answers) = "done", _read_evaluation(folder)
    elif (folder / FAILED).exists():
        status, error = "failed", str(read_json(folder / FAILED, _REMEDY).get("error"))
    return Outcome(method, seed, status, error or problem, evaluation, answers, usage, series, _schedules(folder))


def _schedules(folder: Path) -> tuple[str, ...]:
    """The names of the schedules that a run logs, which are written when training starts."""
    try:
        names = read_json_list(folder / SCHEDULES, _REMEDY)
    except StoreError:  # not started, or damaged: only the curves of the schedules are missing
        return ()
    return tuple(name for name in names if isinstance(name, str))


def _read_series(folder: Path) -> tuple[Series, str]:
    """The logged metrics of a run, and what is wrong with its logs, if anything."""
    try:
        return read_metrics(folder), ""
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        return {}, f"The logs in {folder} are damaged ({error}), so this run has no curves."


def is_done(folder: Path) -> bool:
    """Returns True if a run has been trained and evaluated, and all its files are whole."""
    return metrics_file(folder).exists() and not damage(folder)


def damage(folder: Path) -> dict[Path, str]:
    """The damaged files of a run, such as empty ones, each with a sentence that says what is wrong and what to do."""
    damaged = {}
    for path in (folder / USAGE, folder / FITTED, folder / FAILED, metrics_file(folder)):
        try:
            if path.exists():
                _read_evaluation(folder) if path == metrics_file(folder) else _read_figures(path)
        except StoreError as error:
            damaged[path] = str(error)
    return damaged


def _read_figures(path: Path) -> dict[str, Any]:
    """The content of `usage.json`, `fitted.json` or `failed.json`."""
    content = read_json(path, _REMEDY)
    fault = "" if path.name == FAILED else usage_fault(content)
    if fault:
        raise StoreError(f"{path} is damaged ({fault}): {_REMEDY}.")
    return content


def _read_evaluation(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The content of `evaluation.json`, and the rows of `answers.jsonl` beside it."""
    path = folder / EVALUATION / ANSWERS
    evaluation, answers = read_json(metrics_file(folder), _REMEDY), read_json_lines(path, _REMEDY)
    if len(answers) != evaluation.get("num_prompts"):
        raise StoreError(
            f"{path} is damaged (it has {len(answers)} lines for {evaluation.get('num_prompts')} prompts): {_REMEDY}."
        )
    fault = evaluation_fault(evaluation, answers)
    if fault:
        raise StoreError(f"{path.parent} is damaged ({fault}): {_REMEDY}.")
    return evaluation, answers


def write_tables(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes `results.csv`, one row per run, and `curves.csv`, one row per logged metric and step."""
    metrics = list(dict.fromkeys(name for run in outcomes for name in run.metrics))
    usage_names = dict.fromkeys(name for run in outcomes for name in run.usage)
    costs = [name for name in usage_names if not any(isinstance(run.usage.get(name), dict) for run in outcomes)]
    rows: list[list[Any]] = [["method", "seed", "status", "error", *metrics, *costs]]
    for run in outcomes:
        values = [run.metrics.get(name, "") for name in metrics] + [run.usage.get(name, "") for name in costs]
        rows.append([run.method, run.seed, run.status, run.error, *values])
    points = (
        [run.method, run.seed, name, *point]
        for run in outcomes
        for name in sorted(run.series)
        for point in run.curve(name)
    )
    _write_csv(folder / "results.csv", rows)
    _write_csv(folder / "curves.csv", chain([["method", "seed", "name", "step", "tokens", "seconds", "value"]], points))


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
