"""`distillkit plugins [KIND]`: the installed parts, from metadata and source alone; none of them is imported."""

import argparse
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence

from distillkit.registry import KINDS, Entry, entries, summary

HEADER = ("NAME", "KIND", "DISTRIBUTION", "VERSION", "SUMMARY")


def run(argv: list[str]) -> int:
    """Prints the installed parts and marks names that two of them share.

    Args:
        argv: The arguments after `distillkit plugins`.

    Returns:
        The exit status, 0.

    Raises:
        PluginError: If there is no such kind.
    """
    arguments = _parser().parse_args(argv)
    found = entries(arguments.kind)
    rivals = _rivals(found)
    if arguments.json:
        print(json.dumps([_record(entry, rivals[entry]) for entry in found], indent=2, ensure_ascii=False))
    elif found:
        print("\n".join(_table(found, rivals) + _notes(rivals)))
    else:
        print(f"No {arguments.kind or 'part'} is installed.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit plugins",
        description="Lists the installed parts: distillkit's own and those that plugins bring. Imports none of them.",
        allow_abbrev=False,
    )
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"only the parts of one kind: {', '.join(KINDS)}")
    parser.add_argument("--json", action="store_true", help="print JSON for programs instead of a table")
    return parser


def _rivals(found: Sequence[Entry]) -> dict[Entry, list[Entry]]:
    """For each part, all parts of its kind and name, itself included."""
    named = defaultdict(list)
    for entry in found:
        named[entry.kind, entry.name].append(entry)
    return {entry: named[entry.kind, entry.name] for entry in found}


def _record(entry: Entry, rivals: Sequence[Entry]) -> dict[str, str | list[str]]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "distribution": entry.distribution,
        "version": entry.version,
        "target": entry.target,
        "summary": summary(entry),
        "also_from": [rival.origin for rival in rivals if rival != entry],
    }


def _table(found: Sequence[Entry], rivals: dict[Entry, list[Entry]]) -> list[str]:
    """Lines of aligned columns, cut to the terminal's width if there is a terminal."""
    rows = [HEADER]
    for entry in found:
        mark = " *" if len(rivals[entry]) > 1 else ""
        rows.append((entry.name + mark, entry.kind, entry.distribution, entry.version, summary(entry)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if not sys.stdout.isatty():
        return lines
    width = shutil.get_terminal_size().columns
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]


def _notes(rivals: dict[Entry, list[Entry]]) -> list[str]:
    """A line for each name that several parts share."""
    shared = {(parts[0].kind, parts[0].name): parts for parts in rivals.values() if len(parts) > 1}
    return [
        f"* The {kind} {name} comes from {' and '.join(part.origin for part in parts)}: "
        "using this name is an error until all but one are uninstalled; their full paths can be used."
        for (kind, name), parts in shared.items()
    ]
