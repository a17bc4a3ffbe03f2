"""`distillkit plugins [KIND]`: lists the installed parts from metadata and source code, without importing them."""

import argparse
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence

from distillkit.registry import KINDS, Entry, entries, summary

HEADER = ("NAME", "KIND", "DISTRIBUTION", "VERSION", "SUMMARY")


def run(argv: list[str]) -> int:
    """Prints the installed parts and marks names that several parts share.

    Args:
        argv: Command-line arguments after `distillkit plugins`.

    Returns:
        The exit status, 0.

    Raises:
        PluginError: If the kind does not exist.
    """
    arguments = _parser().parse_args(argv)
    parts = entries(arguments.kind)
    namesakes = _namesakes(parts)
    if arguments.json:
        print(json.dumps([_record(part, namesakes[part]) for part in parts], indent=2, ensure_ascii=False))
    elif parts:
        print("\n".join(_table(parts, namesakes) + _notes(namesakes)))
    else:
        print(f"No {arguments.kind or 'part'} is installed.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit plugins",
        description="Lists the installed parts: the built-in ones and those of plugins. Imports none of them.",
        allow_abbrev=False,
    )
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"list only one kind of part: {', '.join(KINDS)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _namesakes(parts: Sequence[Entry]) -> dict[Entry, list[Entry]]:
    """For each part, all parts with its kind and name, itself included."""
    by_name = defaultdict(list)
    for part in parts:
        by_name[part.kind, part.name].append(part)
    return {part: by_name[part.kind, part.name] for part in parts}


def _record(part: Entry, namesakes: Sequence[Entry]) -> dict[str, str | list[str]]:
    return {
        "name": part.name,
        "kind": part.kind,
        "distribution": part.distribution,
        "version": part.version,
        "target": part.target,
        "summary": summary(part),
        "also_from": [namesake.origin for namesake in namesakes if namesake != part],
    }


def _table(parts: Sequence[Entry], namesakes: dict[Entry, list[Entry]]) -> list[str]:
    """Lines of aligned columns, truncated to the terminal's width if the output is a terminal."""
    rows = [HEADER]
    for part in parts:
        mark = " *" if len(namesakes[part]) > 1 else ""
        rows.append((part.name + mark, part.kind, part.distribution, part.version, summary(part)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if not sys.stdout.isatty():
        return lines
    width = shutil.get_terminal_size().columns
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]


def _notes(namesakes: dict[Entry, list[Entry]]) -> list[str]:
    """One line for each name that several parts share."""
    shared = {(parts[0].kind, parts[0].name): parts for parts in namesakes.values() if len(parts) > 1}
    return [
        f"* The {kind} {name} comes from {' and '.join(part.origin for part in parts)}. "
        "This name is ambiguous: uninstall all but one, or use the full path of the class."
        for (kind, name), parts in shared.items()
    ]
