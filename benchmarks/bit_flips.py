"""Flips bits of stored files, one at a time, and counts how often the damage is noticed.

A small file of each kind is written, one random bit is flipped, and it is read again as a run reads it. A flip is
*noticed* if it is an error of one line, *harmless* if what is read is what was written (as in the white space of a
manifest), and *silent* if other data is read or the process fails in another way; there must be none of those.

    python benchmarks/bit_flips.py
    python benchmarks/bit_flips.py --flips 100 --kinds responses scores
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from results import add_output_options, table, write_json

from distillkit.errors import DistillKitError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers.stored_files import KINDS, Kind


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000, help="flips of each kind of file")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which kinds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the places")
    add_output_options(parser, "bit_flips.json")
    options = parser.parse_args()
    rows = []
    for name in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(flipped(KINDS[name], Path(folder), options.flips, Random(f"{options.seed}/{name}")))
        print(" | ".join(cells(rows[-1])), file=sys.stderr)
    write_json(options.json, rows, vars(options))
    print(table(("file", "bytes", "flips", "noticed", "harmless", "silent"), list(map(cells, rows)), options.markdown))
    sys.exit(any(row["silent"] for row in rows))


def flipped(kind: Kind, folder: Path, number: int, rng: Random) -> dict[str, Any]:
    """Flips bits of one kind of file."""
    path = kind.write(folder)
    expected, whole = kind.read(folder), path.read_bytes()
    counts: Counter[str] = Counter()
    for _ in range(number):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        counts[outcome(kind, folder, expected)] += 1
    path.write_bytes(whole)
    assert kind.read(folder) == expected, "the file is whole again"
    return {"file": kind.name, "bytes": len(whole), "flips": number, **{name: counts[name] for name in OUTCOMES}}


OUTCOMES = ("noticed", "harmless", "silent")


def outcome(kind: Kind, folder: Path, expected: object) -> str:
    """The outcome of reading a changed file."""
    try:
        return "harmless" if kind.read(folder) == expected else "silent"
    except DistillKitError as error:
        return "noticed" if str(error).isprintable() else "silent"
    except Exception as error:
        print(f"{kind.name}: {error!r}", file=sys.stderr)
        return "silent"


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [row["file"], *(str(row[name]) for name in ("bytes", "flips", *OUTCOMES))]


if __name__ == "__main__":
    main()
