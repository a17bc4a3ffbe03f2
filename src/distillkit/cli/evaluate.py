"""The verb `evaluate`: measures a trained student on held-out prompts and writes the metrics to a file."""

import shutil
import sys

from distillkit.errors import ConfigError
from distillkit.evaluation import report
from distillkit.workflows.evaluation import evaluate


def run(arguments: list[str]) -> int:
    """Runs `distillkit evaluate`.

    Args:
        arguments: Command-line arguments after `evaluate`: those of `fit`, and two more. `--run FOLDER` evaluates the
            last checkpoint of a run with the run's configuration; `--student FOLDER` replaces the configured student.

    Raises:
        ConfigError: If a config file or argument is invalid; no model has been loaded then.
    """
    run_folder, rest = _pop_flag(arguments, "--run")
    student, rest = _pop_flag(rest, "--student")
    done = evaluate(run=run_folder, student=student, arguments=rest)
    subject = f"{done.results['student']}, {done.results['num_prompts']} prompts of data.{done.results['split']}"
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    print(f"{subject}\n{report.table(done.metrics, width)}\n{done.folder}")
    return 0


def _pop_flag(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Returns the value of a flag, the last one if it is repeated, and the remaining arguments."""
    value, rest = None, []
    items = iter(arguments)
    for argument in items:
        if argument == flag:
            value = next(items, None)
            if value is None:
                raise ConfigError(f"{flag} needs the path of a folder as its value.")
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
        else:
            rest.append(argument)
    return value, rest
