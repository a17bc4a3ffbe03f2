"""Comparisons that `kills.py` kills."""

import argparse
import csv
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import yaml
from compare_report import write_run

from distillkit.__main__ import end_with
from distillkit.cli.main import main
from distillkit.comparison import runner
from kill_parts.runs import Case, common_model, damaged, export_faults, part, remove, responses


def report(root: Path) -> Case:
    """The report of a comparison whose runs are done."""
    out, file = root / "compared", root / "compare.yaml"
    model = {"student": {"source": str(root / "student")}}
    content = {"out": str(out), "seeds": [0, 1], "budget": {"steps": 5}, "common": {"model": model}}
    file.write_text(yaml.safe_dump(content | {"methods": {"kd": {}, "sft": {}}}))
    sizes = argparse.Namespace(prompts=3, steps=5)
    pages = ("report.html", "report.md", "results.json", "results.csv", "curves.csv")

    def reset() -> None:
        remove(out)
        for method in ("kd", "sft"):
            for seed in (0, 1):
                write_run(out / "runs" / method / f"seed-{seed}", f"{method}/{seed}", sizes)

    return Case(
        root / "report.log",
        lambda: ["compare", "--config", str(file), "--report"],
        reset,
        lambda: damaged(out),
        lambda: [(out / name).exists() for name in pages],
    )


class Forked:
    """A process of a comparison, forked from it instead of started anew; ends with it, as the real one does.

    Args:
        command: The command, `[python, "-P", "-m", "distillkit", *arguments]`.
        stdout: Where it prints.
        env: Its environment.
        options: Other arguments of `subprocess.Popen`, which change nothing here.
    """

    def __init__(self, command: list[str], stdout: Any, env: dict[str, str], **options: Any) -> None:
        parent = os.getpid()
        self.pid, self.status = os.fork(), None
        if self.pid == 0:
            status = 1
            try:
                for signum in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(signum, signal.SIG_DFL)
                os.setsid()
                end_with(parent)
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
                status = main(command[4:])
            finally:
                os._exit(status)

    def kill(self) -> None:
        """Kills it."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Waits for its end; its exit status, minus a signal that killed it."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status


def compare(root: Path) -> Case:
    """A comparison of two methods, from the responses that both need to the report."""
    out, file = root / "comparison", root / "comparison.yaml"
    trainer = {"enable_model_summary": False, "accelerator": "cpu"}
    curator = part("TeacherCurator")
    content = {
        "out": str(out),
        "seeds": [0],
        "budget": {"steps": 3},
        "sampling": {"max_new_tokens": 8},
        "common": {
            "trainer": trainer,
            "model": {key: value for key, value in common_model(root).items() if key not in ("loss", "curator")},
            "data": {"train": str(root / "train.jsonl"), "val": str(root / "val.jsonl"), "batch_size": 2},
        },
        "methods": {
            name: {"model": {"loss": loss, "curator": curator}}
            for name, loss in (("kd", "ForwardKL"), ("rkl", "ReverseKL"))
        },
    }
    file.write_text(yaml.safe_dump(content))

    def run(arguments: list[str]) -> int:
        forking = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
        with mock.patch.object(runner, "subprocess", forking):
            return main(arguments)

    def faults() -> list[str]:
        result = damaged(out)
        for folder in (out / "runs").glob("*/*"):
            if (folder / "failed.json").exists():
                result.append(f"{folder}: a run that was stopped is called failed")
            result += export_faults(folder / "export")
        return result

    def values() -> object:
        with (out / "results.csv").open(newline="") as lines:
            rows = [
                {key: row[key] for key in ("method", "seed", "status", "kl", "nll")} for row in csv.DictReader(lines)
            ]
        lines = [path.read_text().splitlines() for path in sorted(out.glob("runs/*/*/evaluation/answers.jsonl"))]
        return rows, [sorted(each) for each in lines], responses(out / "responses")

    return Case(
        root / "compare.log", lambda: ["compare", "--config", str(file)], lambda: remove(out), faults, values, run
    )
