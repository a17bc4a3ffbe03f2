"""`distillkit methods [NAME]`: lists the methods that can be run, or prints the file of one."""

import argparse
import shutil
import sys

from distillkit.config import methods
from distillkit.config.methods import Method

HEADER = ("NAME", "LOSS", "RESPONSES", "PAPER")
USE = """
RESPONSES says who writes them, and how often anew if not once.
`distillkit methods NAME` prints a method's file, which says more. To run one:
`distillkit fit --config FILE --method NAME`, where FILE names models and data."""


def run(argv: list[str]) -> int:
    """Prints a table of all methods, or the file of one.

    Args:
        argv: Command-line arguments after `distillkit methods`.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: If there is no such method.
    """
    arguments = _parser().parse_args(argv)
    if arguments.name is not None:
        print(methods.find(arguments.name).text, end="")
        return 0
    print("\n".join(_table(methods.methods())))
    print(USE)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit methods",
        description="Lists the methods that can be run, those of plugins included, or prints the file of one.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="print the file of this method")
    return parser


def _table(rows: list[Method]) -> list[str]:
    """Lines of aligned columns; on a narrow terminal the papers are abbreviated, and the lines cut."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    lines = _aligned([HEADER, *((*_cells(row), row.paper) for row in rows)])
    if max(map(len, lines)) > width:
        lines = _aligned([HEADER, *((*_cells(row), row.short_paper) for row in rows)])
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]


def _cells(row: Method) -> tuple[str, str, str]:
    return row.name, row.loss, ", ".join(row.responses)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
