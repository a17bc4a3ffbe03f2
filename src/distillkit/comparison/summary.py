"""Summary of a comparison: all runs as one nested mapping, which every report shows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distillkit.comparison.outcome import Outcome
from distillkit.comparison.results import About, AnswerRow, MetricDifference, MetricResult, Results
from distillkit.comparison.statistics import Difference, mean_and_deviation, paired_difference

SCHEMA = 1
"""Version of `results.json`."""

FIRST = ("kl", "nll", "acceptance", "rouge_l", "gold_nll", "gold_rouge_l")
LOWER_IS_BETTER = ("kl", "nll", "gold_nll")
INCOMPARABLE = ("loss",)
"""Metrics that are another quantity for each method."""

WITHOUT_DIRECTION = ("length", "finished")
SHOWN_ANSWERS = 8
"""Number of prompts whose answers are shown side by side."""


def summarise(outcomes: Sequence[Outcome], baseline: str, about: About) -> Results:
    """Returns the content of every report.

    Args:
        outcomes: Every run.
        baseline: Name of the method that all other methods are compared with.
        about: Facts that do not come from the runs, such as title and date.
    """
    methods: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        methods.setdefault(outcome.method, []).append(outcome)
    done = {name: [run for run in runs if run.status == "done"] for name, runs in methods.items()}
    logged = dict.fromkeys(name for outcome in outcomes for name in outcome.metrics)
    names = [name for name in (*FIRST, *logged) if name in logged and name not in INCOMPARABLE]
    names = list(dict.fromkeys(names))
    metrics = {name: _metric_results(name, done, baseline) for name in names}
    evaluation = next((outcome.evaluation for outcome in outcomes if outcome.evaluation), None)
    return {
        "schema": SCHEMA,
        **about,
        "baseline": baseline,
        "num_prompts": evaluation["num_prompts"] if evaluation else 0,
        "teacher": evaluation["teacher"] if evaluation else None,
        "versions": evaluation["versions"] if evaluation else {},
        "metrics": names,
        "start": _initial_metrics(outcomes, names),
        "methods": [
            {
                "name": name,
                "runs": {run.seed: run.status for run in runs},
                "errors": {run.seed: run.error for run in runs if run.error},
                "metrics": {metric: by_method[name] for metric, by_method in metrics.items() if name in by_method},
                "cost": _mean_cost([run.usage for run in done[name]]),
            }
            for name, runs in methods.items()
        ],
        "answers": _answers(done),
    }


def _initial_metrics(outcomes: Sequence[Outcome], names: Sequence[str]) -> dict[str, float]:
    """Metrics of the student before training, for each metric in which all runs start from the same value."""
    initial = {}
    for name in names:
        points = [outcome.curve(f"val/{name}")[0] for outcome in outcomes if outcome.curve(f"val/{name}")]
        values = [value for step, _, _, value in points if step == 0]
        if values and max(values) - min(values) <= 1e-3 * max(map(abs, values)):
            initial[name] = sum(values) / len(values)
    return initial


def _metric_results(metric: str, done: Mapping[str, Sequence[Outcome]], baseline: str) -> dict[str, MetricResult]:
    """One metric of every method that has it, and whether the best method is significantly the best."""
    results: dict[str, MetricResult] = {}
    for name, runs in done.items():
        values = np.array([run.metrics[metric] for run in runs if metric in run.metrics])
        if len(values):
            mean, deviation = mean_and_deviation(values)
            results[name] = {"mean": mean, "deviation": deviation, "values": values.tolist(), "best": False}
            difference = None if name == baseline else difference_between(metric, runs, done.get(baseline, []))
            if difference is not None:
                results[name]["difference"] = _as_mapping(difference)
    order = sorted(results, key=lambda name: results[name]["mean"], reverse=metric not in LOWER_IS_BETTER)
    if metric not in WITHOUT_DIRECTION and len(order) > 1 and not math.isnan(results[order[0]]["mean"]):
        differences = [difference_between(metric, done[order[0]], done[name]) for name in order[1:]]
        results[order[0]]["best"] = all(difference is not None and difference.is_sure for difference in differences)
    return results


def _as_mapping(difference: Difference) -> MetricDifference:
    return {"mean": difference.mean, "low": difference.low, "high": difference.high, "sure": difference.is_sure}


def difference_between(metric: str, runs: Sequence[Outcome], baseline_runs: Sequence[Outcome]) -> Difference | None:
    """The paired difference over the prompts and seeds that both methods have; None if they share none."""
    method, baseline = ({run.seed: run.by_prompt(metric) for run in side} for side in (runs, baseline_runs))
    seeds = [seed for seed in method if seed in baseline]
    if not seeds:
        return None
    shared_ids = [method[seed].keys() & baseline[seed].keys() for seed in seeds]
    prompts = [prompt for prompt in method[seeds[0]] if all(prompt in ids for ids in shared_ids)]
    if not prompts:
        return None
    values = [
        np.array([[side[seed][prompt][0] for prompt in prompts] for seed in seeds]) for side in (method, baseline)
    ]
    weights = np.array([method[seeds[0]][prompt][1] for prompt in prompts], dtype=np.float64)
    return paired_difference(values[0], values[1], weights)


def _mean_cost(usages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the seeds; token counts by writer become one entry per writer."""
    flat: dict[str, list[float]] = {}
    for usage in usages:
        for name, value in usage.items():
            for key, amount in {name: value}.items() if not isinstance(value, Mapping) else _by_writer(name, value):
                flat.setdefault(key, []).append(float(amount))
    return {name: sum(values) / len(usages) for name, values in flat.items()}


def _by_writer(name: str, amounts: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(f"{name}/{writer}", amount) for writer, amount in amounts.items()]


def _answers(done: Mapping[str, Sequence[Outcome]]) -> list[AnswerRow]:
    """The answers to the first prompts, by the first seed of each method."""
    first_seed = {name: runs[0].answers for name, runs in done.items() if runs}
    rows: list[AnswerRow] = []
    for prompt in next(iter(first_seed.values()), [])[:SHOWN_ANSWERS]:
        by_method = {
            name: answer["student"]
            for name, answers in first_seed.items()
            for answer in answers
            if answer["prompt_id"] == prompt["prompt_id"]
        }
        rows.append(
            {
                "earlier": prompt.get("earlier", []),
                "prompt": prompt["prompt"],
                "reference": prompt["reference"],
                "gold": prompt.get("gold", ""),
                "answers": by_method,
            }
        )
    return rows
