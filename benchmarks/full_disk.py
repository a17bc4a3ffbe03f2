"""Fills the disk at every place that writes: the command must end with one line, and go on once there is room.

A library that is loaded before the C library refuses each write below the run's folder from the n-th on, with the
error of a full disk. A run that is left alone tells which files are written; for each kind of file the disk is full at
its first write, in the middle and at its last. Then the same command, with room, must leave what the first one left.

    python benchmarks/full_disk.py
    python benchmarks/full_disk.py --verbs merge curate

It needs Linux and a C compiler.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from kill_parts import verbs
from kill_parts.runs import Case, prepare
from kills import PRELOADED, ended
from results import add_output_options, table, write_json

VERBS = ("fit", "curate", "evaluate", "merge", "export", "store export", "report")
SOURCE = Path(__file__).parent / "kill_parts" / "full.c"
_LOADED = "FULL_LOADED"


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS), help="which verbs")
    parser.add_argument("--tries", type=int, default=3, help="full disks of each kind of file")
    add_output_options(parser, "full_disk.json")
    options = parser.parse_args()
    if _LOADED not in os.environ:
        sys.exit(again_with_library())
    for module in PRELOADED:
        __import__(module)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        prepare(root)
        for verb in options.verbs:
            rows += filled(verb, verbs.CASES[verb](root), root, options.tries)
    write_json(options.json, rows, vars(options))
    print(table(("verb", "file", "writes", "tried", "faults"), [cells(row) for row in rows], options.markdown))
    print(f"{len(rows)} places, {sum(row['tried'] for row in rows)} full disks")
    sys.exit(any(row["faults"] for row in rows))


def again_with_library() -> int:
    """Compiles the library, and runs this script once more with it."""
    with tempfile.TemporaryDirectory() as folder:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            print("There is no C compiler: install one.", file=sys.stderr)
            return 1
        library = f"{folder}/full.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
        environment = os.environ | {"LD_PRELOAD": library, _LOADED: "1"}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


def filled(verb: str, case: Case, root: Path, tries: int) -> list[dict[str, Any]]:
    """Fills the disk at each place where a verb writes."""
    tally = root.parent / f"{root.name}.tally"
    for _ in range(2):  # the first time some files are made that stay
        case.reset()
        tally.unlink(missing_ok=True)
        status, log = limited(case, root, 0, tally)
        assert status == 0, log[-3000:]
    expected, writes = case.content(), defaultdict(list)
    for line in tally.read_text().splitlines():
        number, path = line.split(" ", 1)
        writes[kind_of(Path(path).relative_to(root))].append(int(number))
    tally.unlink()
    rows = []
    for name, numbers in writes.items():
        if name.endswith(".log"):  # what the process prints
            continue
        chosen = sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]})[:tries]
        faults = [fault for number in chosen for fault in full(case, root, number, expected)]
        rows.append({"verb": verb, "file": name, "writes": len(numbers), "tried": len(chosen), "faults": faults})
        print(" | ".join(cells(rows[-1])), file=sys.stderr)
        for fault in faults:
            print(f"{verb}, {name}: {fault}", file=sys.stderr)
    return rows


def kind_of(path: Path) -> str:
    """The kind of a file: its path without numbers and hashes."""
    return re.sub(r"[0-9a-f]*[0-9][0-9a-f]*", "#", str(path))


def full(case: Case, root: Path, number: int, expected: object) -> list[str]:
    """Faults of a command whose disk is full from a write on and has room again after that."""
    case.reset()
    status, log = limited(case, root, number)
    lines = [line for line in log.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    faults = case.faults()
    if status == 0:  # the write was none that matters, such as that of a log
        faults += [] if case.content() == expected else ["it is called done, and is not what it should be"]
    elif "Traceback" in log or len(errors) != 1 or status != 1:
        faults.append(f"write {number}: status {status}, {len(errors)} lines of error: {log[-900:]}")
    elif "space" not in errors[0]:
        faults.append(f"write {number}: the line does not say why: {errors[0]}")
    if status:
        status, log = limited(case, root, 0)
        if status:
            faults.append(f"write {number}: it does not go on: {log[-600:]}")
        elif case.content() != expected:
            faults.append(f"write {number}: the end differs")
    return faults


def limited(case: Case, root: Path, number: int, tally: Path | None = None) -> tuple[int, str]:
    """Runs a verb on a disk that is full from a write on; its exit status and what it printed."""
    os.environ |= {"FULL_FOLDER": str(root), "FULL_FROM": str(number)}
    if tally is not None:
        os.environ["FULL_TALLY"] = str(tally)
    try:
        status, _ = ended(case, None)
    finally:
        for name in ("FULL_FOLDER", "FULL_FROM", "FULL_TALLY"):
            os.environ.pop(name, None)
    return status, case.log.read_text()


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [row["verb"], row["file"], str(row["writes"]), str(row["tried"]), str(len(row["faults"]))]


if __name__ == "__main__":
    main()
