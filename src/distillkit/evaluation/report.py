"""Reports of an evaluation: result files and a table of the metrics."""

import importlib.metadata
import json
import math
import platform
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from distillkit.evaluation.heldout import Answer
from distillkit.run_folder import ANSWERS, METRICS
from distillkit.storage.atomic import write_atomically

SCHEMA = 1
"""Version of `evaluation.json` and `answers.jsonl`."""

MEANING = {
    "kl": "KL(p‖q) to the teacher, nats per token of its responses",
    "nll": "−log q of the reference responses, nats per token",
    "acceptance": "expected acceptance of a drafted token, Σ min(p, q)",
    "drafted_acceptance": "measured acceptance of drafted tokens at temperature 1",
    "tokens_per_check": "tokens per forward pass of the teacher when the student drafts",
    "rouge_l": "ROUGE-L of the student's answers against the reference, %",
    "gold_nll": "−log q of the data's own answers, nats per token",
    "gold_rouge_l": "ROUGE-L of the student's answers against the data's own, %",
    "loss": "the run's loss on the data's own answers",
    "distinct_2": "share of distinct token bigrams in an answer",
    "length": "tokens of an answer",
    "finished": "share of answers that end with an end-of-turn token",
}


def answer_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """Mean length of answers in tokens, and the share with an end of turn; NaN without answers."""
    count = len(answers) or math.nan
    return {
        "length": sum(answer.tokens for answer in answers) / count,
        "finished": sum(answer.finish == "stop" for answer in answers) / count,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the metrics depend on."""
    versions = {"python": platform.python_version()}
    for package in ("distillkit", "torch", "transformers", "lightning"):
        versions[package] = importlib.metadata.version(package)
    return versions


def write(folder: Path, results: Mapping[str, object], answers: Sequence[Answer]) -> None:
    """Writes `answers.jsonl`, one line per prompt, then `evaluation.json`, whose presence marks completion."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS).unlink(missing_ok=True)  # an earlier evaluation's, which is not of the new answers
    lines = (json.dumps(asdict(answer), ensure_ascii=False) for answer in answers)
    write_atomically(folder / ANSWERS, "".join(f"{line}\n" for line in lines))
    report = {"schema": SCHEMA, **results, "versions": versions()}
    write_atomically(folder / METRICS, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def table(metrics: Mapping[str, float], width: int = sys.maxsize) -> str:
    """The metrics, one per line with a description; distillkit's metrics come first.

    Args:
        metrics: Values by name.
        width: Columns of the terminal, at which descriptions are wrapped.
    """
    metrics = {name: metrics[name] for name in (*MEANING, *metrics) if name in metrics}
    column = max(map(len, metrics), default=0)
    indent = " " * (column + 14)
    lines = []
    for name, value in metrics.items():
        first, *more = textwrap.wrap(MEANING.get(name, ""), max(width - len(indent), 20)) or [""]
        lines += [f"{name:<{column}}  {value:>10.4f}  {first}".rstrip(), *(indent + line for line in more)]
    return "\n".join(lines)
