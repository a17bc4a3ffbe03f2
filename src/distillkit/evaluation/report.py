"""What an evaluation found, as files and as a table."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distillkit.evaluation.heldout import Answer

SCHEMA = 1
"""Version of `evaluation.json` and `answers.jsonl`."""

MEANING = {
    "kl": "KL(p‖q) to the teacher, nats per token of its responses",
    "nll": "−log q of the reference responses, nats per token",
    "acceptance": "expected acceptance of a drafted token, Σ min(p, q)",
    "drafted_acceptance": "measured acceptance of drafted tokens at temperature 1",
    "tokens_per_check": "tokens for each forward pass of the teacher when the student drafts",
    "rouge_l": "ROUGE-L of the student's answers against the reference, %",
    "distinct_2": "share of an answer's pairs of tokens that are new in it",
    "length": "tokens of an answer",
    "finished": "share of answers that end by themselves",
}


def of_answers(answers: Sequence[Answer]) -> dict[str, float]:
    """Mean length of answers in tokens, and the share that ended by themselves; NaN for none."""
    count = len(answers) or math.nan
    return {
        "length": sum(answer.tokens for answer in answers) / count,
        "finished": sum(answer.finish == "stop" for answer in answers) / count,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("distillkit", "torch", "transformers", "lightning"):
        found[package] = importlib.metadata.version(package)
    return found


def write(folder: Path, found: Mapping[str, Any], answers: Sequence[Answer]) -> None:
    """Writes `answers.jsonl`, a line for each prompt, then `evaluation.json`, which says that all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(answer), ensure_ascii=False) for answer in answers)
    (folder / "answers.jsonl").write_text("".join(f"{line}\n" for line in lines))
    whole = {"schema": SCHEMA, **found, "versions": versions()}
    (folder / "evaluation.json").write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def table(figures: Mapping[str, float]) -> str:
    """The figures, one in a line, each with what it is; those that are known come first."""
    figures = {name: figures[name] for name in (*MEANING, *figures) if name in figures}
    width = max(map(len, figures), default=0)
    return "\n".join(
        f"{name:<{width}}  {value:>10.4f}  {MEANING.get(name, '')}".rstrip() for name, value in figures.items()
    )
