"""Files of a run: the single definition of every file name, and a reader for the logged metrics."""

import csv
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "ANSWERS",
    "CONFIG",
    "EVALUATION",
    "EXPORT",
    "METRICS",
    "RESPONSES",
    "USAGE",
    "last_checkpoint",
    "metrics_file",
    "read_metrics",
]
CONFIG = "config.yaml"
"""The resolved configuration of the run."""

SCHEDULES = "schedules.json"
"""Names of the schedules that the run logs, after `train/`."""

CHECKPOINTS = "checkpoints"
"""Folder of checkpoints."""

LAST_CHECKPOINT = "last.ckpt"
"""The newest checkpoint, in `CHECKPOINTS`."""

CSV_LOGS, TENSORBOARD_LOGS = "csv", "tensorboard"
"""Folders of the CSV and TensorBoard loggers."""

RESPONSES = "responses"
"""Folder of the response store, in a run or a comparison."""

ANSWERS = "answers.jsonl"
"""Answers to the held-out prompts, in a run or an evaluation."""

RUN_LOG = "run.log"
"""The log of the run, with the rows that were left out."""

USAGE = "usage.json"
"""Tokens and seconds that the run has used."""

RUN_NAME = "run-name.txt"
"""Random name under which the response store counts what a run has generated."""

EXPORT = "export"
"""Folder of the exported student."""

CURVES = "curves.png"
"""Plot of the run's logged metrics."""

EVALUATION = "evaluation"
"""Folder of the output of `distillkit evaluate`."""

METRICS = "evaluation.json"
"""Metrics of an evaluation, in `EVALUATION`. It is written last, so its presence means that the rest is complete."""

# Files of a run in a comparison

RUN_CONFIG = "run.yaml"
"""The configuration that the run is started with."""

LOG = "log.txt"
"""Output of the run's processes."""

FITTED = "fitted.json"
"""Marks a run whose training is complete: `fit` writes it last, and removes it when it starts."""

FAILED = "failed.json"
"""Marks a failed run and holds its error."""

RUN_VALUES = frozenset({"loss", "grad_norm", "tokens_per_s", "body_tokens_per_s", "mfu", "peak_memory_gb"})
"""Values that every run logs in its steps, after `train/`, besides learning rates and what it has spent."""

Series = dict[str, list[tuple[int, float]]]
"""Logged metrics: name to (step, value)."""


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return run / CHECKPOINTS / LAST_CHECKPOINT


def metrics_file(run: Path) -> Path:
    """The path of a run's `evaluation.json`."""
    return run / EVALUATION / METRICS


def reported_names(series: Series, schedules: Iterable[str]) -> list[str]:
    """The names, after `train/`, of what a loss or a callback reports besides the values that every run logs.

    Args:
        series: The logged metrics of a run.
        schedules: Names of its schedules, which are shown on their own, with the smallest and the largest of a step.
    """
    names = [name.removeprefix("train/") for name in series if name.startswith("train/")]
    shown = {f"{name}{end}" for name in schedules for end in ("", "_min", "_max")} | RUN_VALUES
    return [name for name in names if name not in shown and name.partition("/")[0] != "lr" and name[:6] != "spent_"]


def read_metrics(run: Path) -> Series:
    """Reads all metrics from the CSV logs of a run: name to (step, value), by step. Logs of resumed runs are joined.

    A last line without an end, which a killed run may leave, is not read: the resumed run has logged that step again.
    """
    points: dict[str, dict[int, float]] = {}
    for path in sorted(run.glob(f"{CSV_LOGS}/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:])):
        with path.open(newline="") as file:
            for row in csv.DictReader(line for line in file if line.endswith("\n")):
                for name, value in row.items():
                    if value and name not in ("epoch", "step"):
                        points.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(values.items()) for name, values in points.items()}
