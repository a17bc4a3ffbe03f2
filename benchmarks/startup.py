"""Processor time of the command before it does what it is asked for: help, lists, and a fit of one tiny step.

Each command runs several times in a process of its own; the median of user and system time is compared with a limit.
The models of the fit have two layers of width 32, and it takes one optimizer step, so nearly all of its time is what
any fit spends outside its steps: imports, parsing, loading, the export and its check, the curves.

    python benchmarks/startup.py
    python benchmarks/startup.py --repeats 5
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from results import add_output_options, table, write_json

LIMITS = {"--help": 0.3, "--version": 0.2, "plugins": 0.7, "methods": 0.7, "fit --help": 2.0}
"""Seconds that each command may take."""

FIT = "fit, one tiny step"
FIT_LIMIT = 6.0


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each command")
    parser.add_argument("--skip-fit", action="store_true", help="measure help and lists alone")
    add_output_options(parser, "startup.json")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for command, limit in LIMITS.items():
            seconds = [cpu_seconds(command.split(), folder) for _ in range(options.repeats)]
            rows.append({"command": command, "seconds": median(seconds), "limit": limit})
        if not options.skip_fit:
            write_inputs(Path(folder))
            seconds = [cpu_seconds(fit_arguments(index), folder) for index in range(options.repeats)]
            rows.append({"command": FIT, "seconds": median(seconds), "limit": FIT_LIMIT})
    write_json(options.json, rows, vars(options))
    cells = [[row["command"], f"{row['seconds']:.2f}", f"{row['limit']:.1f}"] for row in rows]
    print(table(("command", "CPU s", "limit"), cells, options.markdown))


def cpu_seconds(arguments: list[str], folder: str) -> float:
    """User and system time of the command in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "distillkit", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def fit_arguments(index: int) -> list[str]:
    """Arguments of a fit with the callbacks of `base.yaml`, into a folder of its own."""
    return [
        "fit",
        "--config=distillkit:base.yaml",
        "--method=kd",
        "--model.teacher=TransformersTeacher",
        "--model.teacher.source=teacher",
        "--model.student.source=student",
        "--data.train=prompts.jsonl",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
        f"--trainer.default_root_dir=run-{index}",
    ]


def write_inputs(folder: Path) -> None:
    """Writes two tiny models and two prompts with responses."""
    from distillkit.testing import tiny_model, tiny_tokenizer

    for name, seed in (("teacher", 0), ("student", 1)):
        tiny_model(seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"Name day {day}.", "response": f"It is day {day}."} for day in range(2)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
