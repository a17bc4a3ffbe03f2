"""`distillkit compare --config compare.yaml`: compares methods at equal cost and writes a report."""

import argparse
import itertools
import shlex
import shutil
import sys
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distillkit.comparison.results import Results


def run(argv: list[str]) -> int:
    """Runs a comparison, or continues one that was stopped.

    Args:
        argv: The arguments after `distillkit compare`.

    Returns:
        The exit status: 0 if every run is done, else 1.

    Raises:
        ConfigError: If the comparison or a method's configuration is invalid; nothing has been run then.
    """
    arguments = _parser().parse_args(argv)
    from distillkit.comparison import compare  # takes seconds, which --help need not wait for
    from distillkit.comparison.plan import read

    command = shlex.join(["distillkit", "compare", *(word for word in argv if word != "--report")])
    plan = read(arguments.config, arguments.out, arguments.slots, arguments.baseline, arguments.method)
    done = compare(plan, arguments.retry, arguments.report, partial(print, flush=True), command)
    print(_table(done.results))
    print(f"The report is {done.folder / 'report.html'}.")
    return 0 if done.is_complete else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit compare",
        description="Trains several methods with several seeds at equal cost, evaluates their students, and writes a "
        "report. A comparison that was stopped continues where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        "-c",
        required=True,
        metavar="FILE",
        help="YAML file with methods, seeds and budget; see docs/compare.md",
    )
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME",
        help="compare this method as well, one of `distillkit methods`; may be repeated",
    )
    parser.add_argument("--out", metavar="FOLDER", help="folder of the comparison (overrides the file)")
    parser.add_argument("--slots", type=int, metavar="N", help="number of simultaneous runs (overrides the file)")
    parser.add_argument("--baseline", metavar="METHOD", help="method to compare with (overrides the file)")
    parser.add_argument("--retry", action="store_true", help="start failed runs again")
    parser.add_argument("--report", action="store_true", help="run nothing, only write the report of the existing runs")
    return parser


def _table(results: "Results") -> str:
    """The metrics of each method as aligned columns; on a narrow terminal, a row for each metric."""
    from distillkit.comparison import markdown

    names = results["metrics"]
    rows = [["method", *map(markdown.heading, names)]]
    for method in results["methods"]:
        metrics = method["metrics"]
        cells = [markdown.value(metrics[name]) if name in metrics else "" for name in names]
        rows.append([method["name"], *(cells if any(cells) else [markdown.status(method)])])
    lines = _aligned(rows)
    if sys.stdout.isatty() and max(map(len, lines)) > shutil.get_terminal_size().columns:
        lines = _aligned([list(row) for row in itertools.zip_longest(*rows, fillvalue="")])
    return "\n".join(lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines of aligned columns; a row may have fewer cells than the first."""
    widths = [max(len(row[column]) for row in rows if len(row) > column) for column in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
