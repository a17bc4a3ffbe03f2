"""Report of a comparison: HTML, Markdown, JSON and CSV tables."""

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from distillkit.comparison import html, markdown, outcome, plots, summary
from distillkit.comparison.outcome import Outcome
from distillkit.comparison.plan import Plan, Run
from distillkit.comparison.results import About, Results
from distillkit.storage.atomic import write_atomically

REPORT_SHARE = 0.05
"""Largest share of a comparison's time that is spent on reports of the runs so far."""

COST_NOTE = (
    "Means over the seeds. Distinct tokens are the tokens of the different responses that a run was trained on, by the "
    "model that generated them. They count whether the run generated them or read them from the store: responses that "
    "several methods need are generated once, before the runs. Tokens scored by the teacher include prompts."
)
COST_NOTE_SECONDS = (
    "Means over the seeds. Each run generated its own responses, because all runs have the same time budget."
)


class Reporter:
    """Writes the report of a comparison: while its runs end, and when all have.

    Each finished run is read once, and a report is written only after its share of the time has passed, so that the
    cost grows with the number of runs and not with its square.

    Args:
        plan: The comparison.
        command: Shell command to quote in the report.
    """

    def __init__(self, plan: Plan, command: str) -> None:
        self.plan, self.command = plan, command
        self._finished: dict[Path, Outcome] = {}
        self._end, self._seconds = -math.inf, 0.0  # of the last report

    def update(self) -> None:
        """Writes the report unless the last one was written a short time ago."""
        if time.monotonic() - self._end > self._seconds / REPORT_SHARE:
            self.write()

    def write(self) -> Results:
        """Writes `report.html`, `report.md`, `results.json`, `results.csv` and `curves.csv` from all runs so far.

        Returns:
            The content of `results.json` without the single runs and their configurations.
        """
        start = time.monotonic()
        results = _write(self.plan, self.command, [self._outcome(run) for run in self.plan.runs])
        self._end = time.monotonic()
        self._seconds = self._end - start
        return results

    def _outcome(self, run: Run) -> Outcome:
        if run.folder not in self._finished:
            result = outcome.read(run.folder, run.method, run.seed)
            if result.status != "done":
                return result
            self._finished[run.folder] = result
        return self._finished[run.folder]


def _write(plan: Plan, command: str, outcomes: Sequence[Outcome]) -> Results:
    results = summary.summarise(outcomes, plan.baseline, _about(plan, command))
    curves = {
        "Learning curves": plots.learning_curves(outcomes),
        "Schedules": plots.schedule_curves(outcomes),
        "Reported by the losses": plots.reported_curves(outcomes),
    }
    configs = {run.method: yaml.safe_dump(run.config, sort_keys=False) for run in reversed(plan.runs)}
    plan.out.mkdir(parents=True, exist_ok=True)
    runs = [
        {"method": run.method, "seed": run.seed, "status": run.status, "metrics": run.metrics, "usage": run.usage}
        for run in outcomes
    ]
    document = json_safe({**results, "runs": runs, "configs": configs})
    texts = {
        "report.html": html.page(results, curves, dict(reversed(configs.items()))),
        "report.md": markdown.markdown(results),
        "results.json": json.dumps(document, indent=2, ensure_ascii=False) + "\n",
    }
    for name, content in texts.items():
        write_atomically(plan.out / name, content)
    outcome.write_tables(plan.out, outcomes)
    return results


def _about(plan: Plan, command: str) -> About:
    return {
        "title": plan.title,
        "budget": dict(plan.budget),
        "seeds": list(plan.seeds),
        "split": plan.split,
        "student": _describe_student(plan),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": _commit(),
        "command": command,
        "cost_note": COST_NOTE if plan.shares_responses else COST_NOTE_SECONDS,
    }


def json_safe(value: object) -> object:
    """A copy of nested mappings and lists with string keys, and null in place of NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe_student(plan: Plan) -> str:
    """The student that all methods share, with its warm start; or a note that the methods have different students."""
    students = {json.dumps(run.config["model"].get("student"), sort_keys=True) for run in plan.runs}
    if len(students) > 1:
        return "differs between methods"
    warm_start = plan.warm_start
    student = (warm_start or plan.runs[0]).config["model"].get("student") or {}
    layers = student.get("keep_layers")
    description = f"{student.get('source')}" + (f", {len(layers)} layers kept" if layers else "")
    if warm_start is None:
        return description
    callbacks = warm_start.config["trainer"]["callbacks"]
    budget = next(callback for callback in callbacks if callback["class_path"] == "Budget")
    spent = ", ".join(f"{amount:,} {unit}" for unit, amount in budget["init_args"].items())
    return f"{description}; trained before by a warm start of {spent}"


def _commit() -> str:
    """The commit of the current folder's repository; empty outside a repository."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
        )
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
