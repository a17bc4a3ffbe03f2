"""Comparing methods at equal cost: checks, trains and evaluates them, and writes a report."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distillkit.comparison import plan as plans
from distillkit.comparison.outcome import is_done
from distillkit.comparison.plan import Plan
from distillkit.comparison.report import Reporter
from distillkit.comparison.results import Results
from distillkit.comparison.runner import Runner, write_configs
from distillkit.config.files import MergedConfig
from distillkit.errors import ConfigError, DistillKitError
from distillkit.storage.locks import FolderLock


@dataclass(frozen=True)
class Comparison:
    """Outcome of a comparison.

    Args:
        folder: Folder of the report.
        results: Content of `results.json` without the single runs and their configurations.
        is_complete: Whether every run is done.
    """

    folder: Path
    results: Results
    is_complete: bool


def compare(
    plan: Plan | str | Path,
    retry: bool = False,
    only_report: bool = False,
    on_message: Callable[[str], None] = lambda message: None,
    command: str = "",
) -> Comparison:
    """Trains several methods with several seeds at equal cost, evaluates their students, and writes a report.

    A comparison that was stopped continues where it stopped.

    Args:
        plan: The comparison, or the YAML file that describes it.
        retry: Whether failed runs are started again.
        only_report: Whether to run nothing and only write the report of the existing runs.
        on_message: Called with each progress message, one line of text.
        command: Shell command to quote in the report.

    Raises:
        ConfigError: If the comparison or a method's configuration is invalid; nothing has been run then.
        TrainingError: If the warm start fails.
    """
    if not isinstance(plan, Plan):
        command = command or f"distillkit compare --config {plan}"
        plan = plans.read(str(plan))
    reporter = Reporter(plan, command)
    if not only_report:
        check(plan)
        write_configs(plan)
        with FolderLock(plan.out):
            on_message(f"{plan.title}: {len(plan.runs)} runs into {plan.out}")
            Runner(plan, on_message, reporter.update).run_all(retry)
    results = reporter.write()
    return Comparison(plan.out, results, all(is_done(run.folder) for run in plan.runs))


def check(plan: Plan) -> None:
    """Parses the configuration of each method and builds its parts, so that errors appear before the first run.

    Raises:
        ConfigError: If a configuration is invalid; the message begins with the method's name.
    """
    from distillkit.workflows.check import check as check_config  # imports Lightning, which takes seconds

    with _quiet("lightning.pytorch", "lightning.fabric"):
        for run in (*filter(None, [plan.warm_start]), *plan.runs):
            if run.seed == plan.seeds[0]:
                try:
                    check_config(MergedConfig(run.config, run.files))
                except DistillKitError as error:
                    raise ConfigError(f"Method {run.method}: {error}") from error


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Hides what loggers say below warnings, such as several lines per trainer, and restores their levels."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
