"""Checks of the values in a run's files, so that a report only reads values of the right type."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

_TEXTS = ("prompt", "reference", "student", "prompt_id", "finish")
_COUNTS = ("tokens", "positions")


def usage_fault(usage: Mapping[str, Any]) -> str:
    """The fault in the content of `usage.json` or `fitted.json`; an empty string if there is none.

    Each value must be a number, or a mapping of names to numbers.
    """
    for name, value in usage.items():
        values = value.values() if isinstance(value, dict) else (value,)
        if not all(map(_is_number, values)):
            return f"its {name} is no number"
    return ""


def evaluation_fault(evaluation: Mapping[str, Any], answers: Iterable[Mapping[str, Any]]) -> str:
    """The fault in the content of `evaluation.json`, or in the rows of `answers.jsonl` beside it.

    Returns:
        The name of the file and the reason; an empty string if nothing is wrong.
    """
    if not _are_metrics(evaluation.get("metrics")):
        return "evaluation.json: its metrics are no mapping of names to numbers"
    for number, answer in enumerate(answers, start=1):
        fault = _answer_fault(answer)
        if fault:
            return f"answers.jsonl, line {number}: {fault}"
    return ""


def _answer_fault(answer: Mapping[str, Any]) -> str:
    for name in _TEXTS:
        if not isinstance(answer.get(name), str):
            return f"its {name} is no text"
    for name in _COUNTS:
        if not _is_count(answer.get(name)):
            return f"its {name} is no count"
    if not isinstance(answer.get("gold", ""), str) or not _is_count(answer.get("gold_positions", 0)):
        return "its gold answer is no text with a count"
    if not _are_turns(answer.get("earlier", [])):
        return "its earlier turns are no list of roles and texts"
    return "" if _are_metrics(answer.get("metrics")) else "its metrics are no mapping of names to numbers"


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_turns(turns: object) -> bool:
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )


def _are_metrics(metrics: object) -> bool:
    return isinstance(metrics, dict) and all(_is_number(value, finite=False) for value in metrics.values())


def _is_number(value: object, finite: bool = True) -> bool:
    if type(value) is int:
        return abs(value) < 2**63
    return isinstance(value, float) and (not finite or math.isfinite(value))
