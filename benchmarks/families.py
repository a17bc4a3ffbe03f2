"""Every causal language model type of the installed transformers, tiny and random, against a plain loop.

    python benchmarks/families.py --table docs/families.md
    python benchmarks/families.py --types llama gpt2 mamba2

Each type runs in a process of its own with a time limit: rows packed, padded and with shared prompts, generation,
pruning, adapters, saving and reading. The exit status is 0 if nothing differs and nothing ends in an error that is not
ours. With `--table` the tables of that page are replaced.
"""

import argparse
import multiprocessing
import os
import sys
import warnings
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

from distillkit.testing import FamilyReport, check_family, family_names

RIGHT = "right"  # of a check in a FamilyReport
BEGIN, END = "<!-- made by benchmarks/families.py -->", "<!-- end -->"


def main() -> int:
    """Runs the checks; the exit status."""
    options = parse()
    names = options.types or family_names()
    # The server imports everything once, and each process begins with what it has.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distillkit.testing", "transformers", "peft"])
    reports = []
    for name in names:
        reports.append(run(context, name, options.seconds))
        print(line(reports[-1]), flush=True)
    faults = [f"{report.name}: {fault}" for report in reports for fault in report.faults]
    print("\n".join(["", *faults, f"{len(reports)} types, {len(faults)} faults"]))
    if options.table is not None:
        write(options.table, reports)
    return 1 if faults else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="model types and variants; all of them by default")
    parser.add_argument("--seconds", type=float, default=120.0, help="limit for each type")
    parser.add_argument("--table", type=Path, help="page whose tables are replaced")
    return parser.parse_args()


def run(context: multiprocessing.context.BaseContext, name: str, seconds: float) -> FamilyReport:
    """Checks one type in a process of its own."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=check, args=(sender, name), daemon=True)  # type: ignore[attr-defined]
    process.start()
    sender.close()
    try:
        report = receiver.recv() if receiver.poll(seconds) else None
    except EOFError:
        report = None
        process.join()  # it has ended, or is about to
    if report is None:
        fault = f"no result in {seconds:g} s" if process.is_alive() else f"the process ended with {process.exitcode}"
        process.kill()
        report = FamilyReport(name, scores=f"raises: {fault}")
    process.join()
    return report


def check(sender: Connection, name: str) -> None:
    """Sends the report of one type."""
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    sender.send(check_family(name))


def line(report: FamilyReport) -> str:
    """One line of the terminal."""
    values = {key: value for key, value in asdict(report).items() if key not in ("name", "built") and value}
    shown = ", ".join(f"{key} {value}" for key, value in values.items() if value != RIGHT)
    return f"{report.name}: {shown if report.built in (RIGHT, '') else report.built}"


def write(page: Path, reports: list[FamilyReport]) -> None:
    """Replaces the tables of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{tables(reports)}\n\n{END}{after}")


def tables(reports: list[FamilyReport]) -> str:
    """The tables in Markdown: what runs, what is refused, what was not built."""
    refused = [report for report in reports if report.scores.startswith("refused")]
    absent = [report for report in reports if report.built not in (RIGHT, "")]
    used = [report for report in reports if report not in refused and report not in absent]
    rows = [
        "| type | rows | generation | `keep_layers` | LoRA | saved and read | why not packed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(cells(report))} |" for report in used),
    ]
    parts = [
        f"transformers {version('transformers')}: {len(used)} types and variants run, {len(refused)} are refused, "
        f"{len(absent)} could not be made tiny.",
        "\n".join(rows),
        "Refused:",
        "\n".join(["| type | message |", "| --- | --- |", *(row(report.name, report.scores) for report in refused)]),
        "Not tried:",
        "\n".join(["| type | why |", "| --- | --- |", *(row(report.name, report.built) for report in absent)]),
    ]
    return "\n\n".join(parts)


def cells(report: FamilyReport) -> list[str]:
    """Cells of a type that runs."""
    caches = {"padded": "cache", "equal": "cache, equal lengths", "none": "no cache"}
    generation = caches.get(report.cache, "") if report.generation == RIGHT else short(report.generation)
    layout = report.layout if report.scores == RIGHT else short(report.scores)
    results = [short(value) for value in (report.pruning, report.lora, report.export)]
    return [f"`{report.name}`", layout, generation, *results, clean(report.reason)]


def short(result: str) -> str:
    """The first word of a result."""
    return {RIGHT: "yes"}.get(result, result.partition(":")[0])


def row(name: str, message: str) -> str:
    """A row with the message of a type."""
    return f"| `{name}` | {clean(message.partition(': ')[2])} |"


def clean(text: str) -> str:
    """Text that Markdown shows as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
