"""Output files: `results.json`, `tables.md`, `gpu.log`, and the last screen."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_parts.anchors import ANCHORS, anchor_text
from gpu_parts.cases import Outcome, Part, Row
from gpu_parts.tables import NOTES, part_table

WIDTH = 120
SHOWN = 6
"""Failed tests that the last screen names."""
PACKAGES = (
    "distillkit",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "pyarrow",
    "triton",
    "datasets",
    "trl",
    "liger-kernel",
    "vllm",
)
MARKS = {"passed": "passed", "failed": "FAILED", "not run": "not run", "left out": "left out"}


def gather_facts(device: str, settings: dict[str, Any]) -> Row:
    """Date, versions and machine."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "cpu": f"{_processor()}, {os.cpu_count()} cores",
        "card": _card() if device == "cuda" else {"name": "cpu"},
        "settings": settings,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _card() -> dict[str, str]:
    """Name, driver and memory of the first GPU, as its driver names them."""
    names = ("name", "driver_version", "memory.total", "power.limit", "compute_cap")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"name": "unknown", "error": str(error)}
    if result.returncode:
        return {"name": "unknown", "error": result.stderr.strip()[:200]}
    values = result.stdout.strip().splitlines()[0].split(", ")
    return dict(zip(names, values, strict=False))


class Report:
    """Writes all files anew after each part.

    Args:
        out: Folder of the files.
        facts: Date, versions and machine.
        parts: All parts.
    """

    def __init__(self, out: Path, facts: Row, parts: Sequence[Part]) -> None:
        self.out, self.facts, self.parts = out, facts, parts

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Writes `results.json`, `tables.md` and `gpu.log`."""
        anchors = {key: asdict(anchor) for key, anchor in ANCHORS.items()}
        whole = self.facts | {"anchors": anchors, "outcomes": [asdict(outcome) for outcome in outcomes]}
        texts = {
            "results.json": json.dumps(finite(whole), indent=1) + "\n",
            "tables.md": self._tables(outcomes),
            "gpu.log": self._log(outcomes),
        }
        for name, text in texts.items():
            partial = self.out / f"{name}.partial"  # a reader, or a kill, never meets half a file
            partial.write_text(text)
            partial.replace(self.out / name)

    def _heading(self) -> str:
        card, versions = self.facts["card"], self.facts["versions"]
        details = [card.get(name, "") for name in ("name", "memory.total", "driver_version")]
        software = (f"{name} {versions[name]}" for name in PACKAGES if versions.get(name))
        return f"{self.facts['date'][:16]}, {', '.join(filter(None, details))}; {', '.join(software)}"

    def _tables(self, outcomes: Sequence[Outcome]) -> str:
        sections = [f"# {self._heading()}"]
        for part in self.parts:
            results = [outcome for outcome in outcomes if outcome.part == part.name]
            if results:
                sections += [f"## {part.title}", NOTES.get(part.name, ""), part_table(part.name, results)]
                sources = dict.fromkeys(outcome.anchor for outcome in results if outcome.anchor in ANCHORS)
                sections += [f"To compare: {ANCHORS[key].source}: {ANCHORS[key].text}." for key in sources]
        return "\n\n".join(filter(None, sections)) + "\n"

    def _log(self, outcomes: Sequence[Outcome]) -> str:
        lines = [self._heading(), json.dumps(self.facts)]
        for outcome in outcomes:
            lines.append(f"\n== {outcome.part} / {outcome.case}: {outcome.status} ({outcome.seconds:.1f} s)")
            lines += filter(None, [outcome.reason, outcome.detail])
            for row in outcome.rows:
                lines.append(json.dumps(finite({key: value for key, value in row.items() if key != "detail"})))
                lines += filter(None, [row.get("detail")])
        return "\n".join(lines) + "\n"

    def screen(self, outcomes: Sequence[Outcome]) -> str:
        """A line for each case: what became of it, its main figure, and the anchor."""
        lines = [self._heading()[:WIDTH]]
        part, width = "", 0
        for outcome in outcomes:
            if outcome.part != part:
                part = outcome.part
                width = max(len(other.case) for other in outcomes if other.part == part)
                lines.append(f"{part} ".ljust(WIDTH - 20, "─"))
            text = outcome.figure if outcome.status == "passed" else outcome.reason
            anchor = anchor_text(outcome.anchor) if outcome.status == "passed" else ""
            line = f"  {MARKS[outcome.status]:<8} {outcome.case:<{width}}  {text}"
            lines.append((f"{line}  | {anchor}" if anchor else line)[:WIDTH])
            lines += failed_tests(outcome)
        counts = Counter(outcome.status for outcome in outcomes)
        total = ", ".join(f"{counts[status]} {status}" for status in MARKS if counts[status])
        lines.append(f"{total}; results.json, tables.md and gpu.log are in {self.out}")
        return "\n".join(lines)


def failed_tests(outcome: Outcome) -> list[str]:
    """A line for each of the first tests that failed."""
    failed = [row for row in outcome.rows if "test" in row and row["status"] == "failed"]
    lines = [f"             {row['test']}: {row.get('reason', '')}"[:WIDTH] for row in failed[:SHOWN]]
    return lines + ([f"             and {len(failed) - SHOWN} more"] if len(failed) > SHOWN else [])


def finite(value: Any) -> Any:
    """A value as JSON has it: null in the place of what is no number."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_line(text: str) -> None:
    """Shows a line at once, without more than a terminal's width."""
    print(text[:WIDTH], file=sys.stderr, flush=True)
