"""A comparison as one nested mapping, which every report shows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distillkit.comparison.outcome import Outcome
from distillkit.comparison.statistics import Difference, mean_and_deviation, paired_difference

SCHEMA = 1
"""Version of `results.json`."""

FIRST = ("kl", "nll", "acceptance", "rouge_l")
LOWER_IS_BETTER = ("kl", "nll")
WITHOUT_DIRECTION = ("length", "finished")
SHOWN_ANSWERS = 8
"""Prompts whose answers are shown side by side."""


def summarise(outcomes: Sequence[Outcome], baseline: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """All that a report says.

    Args:
        outcomes: Every run.
        baseline: Name of the method that the others are compared with.
        about: What is known of the comparison beside its runs.
    """
    methods: dict[str, list[Outcome]] = {}
    for own in outcomes:
        methods.setdefault(own.method, []).append(own)
    done = {name: [own for own in runs if own.status == "done"] for name, runs in methods.items()}
    given = dict.fromkeys(name for own in outcomes for name in own.figures)
    names = [name for name in (*FIRST, *given) if name in given]
    names = list(dict.fromkeys(names))
    figures = {name: _figures(name, done, baseline) for name in names}
    first = next((own for own in outcomes if own.found), None)
    return {
        "schema": SCHEMA,
        **about,
        "baseline": baseline,
        "num_prompts": first.found["num_prompts"] if first else 0,
        "teacher": first.found["teacher"] if first else None,
        "versions": first.found["versions"] if first else {},
        "figures": names,
        "start": _start(outcomes, names),
        "methods": [
            {
                "name": name,
                "runs": {own.seed: own.status for own in runs},
                "errors": {own.seed: own.error for own in runs if own.error},
                "figures": {figure: of_methods[name] for figure, of_methods in figures.items() if name in of_methods},
                "cost": _cost([own.usage for own in done[name]]),
            }
            for name, runs in methods.items()
        ],
        "answers": _answers(done),
    }


def _start(outcomes: Sequence[Outcome], names: Sequence[str]) -> dict[str, float]:
    """Figures of the student before training, where all methods begin with the same."""
    found = {}
    for name in names:
        points = [own.curve(f"val/{name}")[0] for own in outcomes if own.curve(f"val/{name}")]
        values = [value for step, _, _, value in points if step == 0]
        if values and max(values) - min(values) <= 1e-3 * max(map(abs, values)):
            found[name] = sum(values) / len(values)
    return found


def _figures(figure: str, done: Mapping[str, Sequence[Outcome]], baseline: str) -> dict[str, dict[str, Any]]:
    """What each method came to in one figure; whether it is the best of all, and surely so."""
    found: dict[str, dict[str, Any]] = {}
    for name, runs in done.items():
        values = np.array([own.figures[figure] for own in runs if figure in own.figures])
        if len(values):
            mean, deviation = mean_and_deviation(values)
            found[name] = {"mean": mean, "deviation": deviation, "values": values.tolist(), "best": False}
            against = None if name == baseline else compared(figure, runs, done.get(baseline, []))
            if against is not None:
                found[name]["difference"] = vars(against) | {"sure": against.is_sure}
    order = sorted(found, key=lambda name: found[name]["mean"], reverse=figure not in LOWER_IS_BETTER)
    if figure not in WITHOUT_DIRECTION and len(order) > 1 and not math.isnan(found[order[0]]["mean"]):
        others = [compared(figure, done[order[0]], done[name]) for name in order[1:]]
        found[order[0]]["best"] = all(own is not None and own.is_sure for own in others)
    return found


def compared(figure: str, runs: Sequence[Outcome], others: Sequence[Outcome]) -> Difference | None:
    """The paired difference over the prompts and seeds that both have; None if there are none."""
    mine, theirs = ({own.seed: own.by_prompt(figure) for own in side} for side in (runs, others))
    seeds = [seed for seed in mine if seed in theirs]
    if not seeds:
        return None
    both = [mine[seed].keys() & theirs[seed].keys() for seed in seeds]
    prompts = [prompt for prompt in mine[seeds[0]] if all(prompt in keys for keys in both)]
    if not prompts:
        return None
    values = [np.array([[side[seed][prompt][0] for prompt in prompts] for seed in seeds]) for side in (mine, theirs)]
    weights = np.array([mine[seeds[0]][prompt][1] for prompt in prompts], dtype=np.float64)
    return paired_difference(values[0], values[1], weights)


def _cost(usages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the seeds; of tokens by writer, one number for each."""
    flat: dict[str, list[float]] = {}
    for usage in usages:
        for name, value in usage.items():
            for key, number in {name: value}.items() if not isinstance(value, Mapping) else _by_writer(name, value):
                flat.setdefault(key, []).append(float(number))
    return {name: sum(values) / len(usages) for name, values in flat.items()}


def _by_writer(name: str, value: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(f"{name}/{writer}", number) for writer, number in value.items()]


def _answers(done: Mapping[str, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """The answers of each method's first seed to the first prompts."""
    first = {name: runs[0].answers for name, runs in done.items() if runs}
    rows = []
    for prompt in next(iter(first.values()), [])[:SHOWN_ANSWERS]:
        own = {
            name: answer["student"]
            for name, answers in first.items()
            for answer in answers
            if answer["prompt_id"] == prompt["prompt_id"]
        }
        rows.append({"prompt": prompt["prompt"], "reference": prompt["reference"], "answers": own})
    return rows
