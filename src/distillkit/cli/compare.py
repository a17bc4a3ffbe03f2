"""`distillkit compare --config compare.yaml`: methods side by side at equal cost, and a report of them."""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

from distillkit.errors import ConfigError, DistillKitError

COST_NOTE = (
    "Means over the seeds. Distinct tokens are those of the different responses that a run was trained on, by who "
    "wrote them, whether it wrote them itself or read them: responses that several methods need are written once, "
    "before the runs. Tokens through the teacher are those that it scored, prompts included."
)
COST_NOTE_SECONDS = (
    "Means over the seeds. Each run wrote its own responses, because time is what all have equally much of."
)


def run(argv: list[str]) -> int:
    """Runs a comparison, or goes on with it.

    Args:
        argv: The arguments after `distillkit compare`.

    Returns:
        The exit status: 0 if every run is done, else 1.

    Raises:
        ConfigError: If the comparison or a method's configuration is wrong; nothing was run then.
    """
    arguments = _parser().parse_args(argv)
    from distillkit.cli import compare_plan, compare_runs

    command = shlex.join(["distillkit", "compare", *(word for word in argv if word != "--report")])
    plan = compare_plan.read(arguments.config, arguments.out, arguments.slots, arguments.baseline)
    if not arguments.report:
        check(plan)
        compare_runs.write_configs(plan)
        lock = _locked(plan.out)
        with lock:
            print(f"{plan.title}: {len(plan.runs)} runs into {plan.out}", flush=True)
            runner = compare_runs.Runner(plan, partial(print, flush=True), partial(write_report, plan, command))
            try:
                runner.all(arguments.retry)
            except KeyboardInterrupt:
                print(f"Stopped; the same command goes on with {plan.out}.", flush=True)
                return 130
    found = write_report(plan, command)
    print(_table(found))
    print(f"The report is {plan.out / 'report.html'}.")
    return 0 if all(compare_runs.is_done(own) for own in plan.runs) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit compare",
        description="Trains several methods with several seeds at equal cost, measures their students, and writes a "
        "report. A comparison that was stopped goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", "-c", required=True, metavar="FILE", help="methods, seeds and budget; see docs/compare.md"
    )
    parser.add_argument("--out", metavar="FOLDER", help="folder in the place of the file's")
    parser.add_argument("--slots", type=int, metavar="N", help="runs at the same time in the place of the file's")
    parser.add_argument("--baseline", metavar="METHOD", help="method that others are compared with, not the file's")
    parser.add_argument("--retry", action="store_true", help="try runs that failed again")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    return parser


def _locked(folder: Path) -> Any:
    """A lock on the comparison's folder.

    Raises:
        ConfigError: If another process is at work there.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"Another process is at work on {folder}: wait for it, or name another folder.") from None
    return lock


def check(plan: Any) -> None:
    """Parses the configuration of each method, and makes its parts: whatever is wrong is said before the first run.

    Raises:
        ConfigError: If one is wrong; the message begins with the method's name.
    """
    import logging
    import tempfile

    import yaml

    from distillkit.cli import compare_check

    for name in ("lightning.pytorch", "lightning.fabric"):  # they would speak of each trainer that is made
        logging.getLogger(name).setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        for own in (*filter(None, [plan.warm_start]), *plan.runs):
            if own.seed == plan.seeds[0]:
                path = Path(folder) / f"{own.method}.yaml"
                path.write_text(yaml.safe_dump(own.config, sort_keys=False))
                try:
                    compare_check.check(str(path))
                except DistillKitError as error:
                    raise ConfigError(f"Method {own.method}: {error}") from error


def write_report(plan: Any, command: str) -> dict[str, Any]:
    """Writes what all runs so far came to: `report.html`, `report.md`, `results.json`, `results.csv`, `curves.csv`."""
    import yaml

    from distillkit.comparison import curves, outcome, page, summary, text

    outcomes = [outcome.read(own.folder, own.method, own.seed) for own in plan.runs]
    about = {
        "title": plan.title, "budget": dict(plan.budget), "seeds": list(plan.seeds), "split": plan.split,
        "student": _student(plan), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "commit": _commit(), "command": command,
        "cost_note": COST_NOTE if plan.shares_responses else COST_NOTE_SECONDS,
    }  # fmt: skip
    found = summary.summarise(outcomes, plan.baseline, about)
    pictures = {
        "Learning curves": curves.learning_curves(outcomes), "Schedules": curves.schedule_curves(outcomes),
    }  # fmt: skip
    shown = {own.method: yaml.safe_dump(own.config, sort_keys=False) for own in reversed(plan.runs)}
    plan.out.mkdir(parents=True, exist_ok=True)
    runs = [
        {"method": own.method, "seed": own.seed, "status": own.status, "figures": own.figures, "usage": own.usage}
        for own in outcomes
    ]
    texts = {
        "report.html": page.page(found, pictures, dict(reversed(shown.items()))),
        "report.md": text.markdown(found),
        "results.json": json.dumps(_plain(found | {"runs": runs, "configs": shown}), indent=2, ensure_ascii=False)
        + "\n",
    }
    for name, content in texts.items():
        (plan.out / name).write_text(content)
    outcome.write_tables(plan.out, outcomes)
    return found


def _plain(value: Any) -> Any:
    """A value as JSON has it: null in the place of what is no number."""
    if isinstance(value, dict):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _student(plan: Any) -> str:
    """The student that all methods share, or that there are several."""
    students = {json.dumps(own.config["model"].get("student"), sort_keys=True) for own in plan.runs}
    if len(students) > 1:
        return "differs between methods"
    warm = plan.warm_start
    student = (warm or plan.runs[0]).config["model"].get("student") or {}
    layers = student.get("keep_layers")
    told = f"{student.get('source')}" + (f", {len(layers)} layers kept" if layers else "")
    if warm is None:
        return told
    budget = next(each for each in warm.config["trainer"]["callbacks"] if each["class_path"] == "Budget")
    spent = ", ".join(f"{amount:,} {unit}" for unit, amount in budget["init_args"].items())
    return f"{told}; trained before by a warm start of {spent}"


def _commit() -> str:
    """The commit of the folder that the comparison runs in; empty outside of a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
        )
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _table(found: dict[str, Any]) -> str:
    """The figures for the terminal."""
    from distillkit.comparison import text

    names = found["figures"]
    rows = [["method", *map(text.heading, names)]]
    for own in found["methods"]:
        figures = [text.value(own["figures"][name]) if name in own["figures"] else "" for name in names]
        rows.append([own["name"], *figures] if any(figures) else [own["name"], text.status(own)])
    widths = [max(len(row[place]) for row in rows if len(row) > place) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )
