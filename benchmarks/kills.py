"""Kills runs at random moments, and counts what is lost, doubled, half-written or called done.

Each verb works on tiny models in a process that is forked from this one, which has imported everything, and is killed
after a random part of the time that it takes undisturbed: by SIGKILL, or by SIGTERM, after which the exit status must
be 143 (128 + 15). After each kill every file under its final name must be whole. The same command then goes on, is
killed again, and at the end, undisturbed, must leave what a run that was never killed leaves.

    python benchmarks/kills.py
    python benchmarks/kills.py --verbs fit merge --kills 20 --terms 5

`TMPDIR` is on another file system than the runs where there is one (/dev/shm).
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from kill_parts import verbs
from kill_parts.runs import Case, prepare
from results import add_output_options, table, write_json

PRELOADED = (
    "distillkit.workflows.launch",
    "distillkit.workflows.curation",
    "distillkit.workflows.evaluation",
    "distillkit.workflows.student_export",
    "distillkit.comparison.report",
    "peft",
    "pandas",
    "torch.utils.tensorboard",
    "transformers.trainer_utils",
    "transformers.models.llama.modeling_llama",
)
KILLS = {"fit": 60, "curate": 50, "evaluate": 35, "merge": 45, "export": 30, "compare": 20}
TERMS = {"fit": 25, "curate": 18, "evaluate": 13, "merge": 4, "export": 4, "compare": 10}
ROUND = 8
"""Kills between two undisturbed ends."""
LATE = 1.0
"""Seconds from a signal within which a process may end as if there had been none: its work was done."""


@dataclass
class Counts:
    """Results of the kills of one verb by one signal.

    Args:
        kills: Signals that reached the process while it worked.
        late: Signals that came after its end, which are not counted.
        faults: What was found wrong.
        statuses: How the processes ended.
        delays: Seconds from a signal to the end of the process.
    """

    kills: int = 0
    late: int = 0
    faults: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    delays: list[float] = field(default_factory=list)


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbs", nargs="+", choices=KILLS, default=list(KILLS), help="which verbs")
    parser.add_argument("--kills", type=int, help="SIGKILLs of each verb, instead of its share of 240")
    parser.add_argument("--terms", type=int, help="SIGTERMs of each verb, instead of its share of 74")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--folder", help="where the runs are; a temporary folder is removed")
    add_output_options(parser, "kills.json")
    options = parser.parse_args()
    for module in PRELOADED:
        __import__(module)
    torch.set_num_threads(1)
    shared = Path("/dev/shm")
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as temporary,
    ):
        os.environ["TMPDIR"] = tempfile.tempdir = temporary
        prepare(Path(folder))
        for name in options.verbs:
            numbers = {signal.SIGKILL: options.kills, signal.SIGTERM: options.terms}
            numbers = {signal.SIGKILL: KILLS[name], signal.SIGTERM: TERMS[name]} | {
                key: value for key, value in numbers.items() if value is not None
            }
            rows += attacked(name, verbs.CASES[name](Path(folder)), numbers, options.seed)
    write_json(options.json, rows, vars(options))
    header = ("verb", "signal", "kills", "after the end", "statuses", "median s", "longest s", "faults")
    print(table(header, [cells(row) for row in rows], options.markdown))
    sys.exit(any(row["faults"] for row in rows))


def attacked(name: str, case: Case, numbers: dict[signal.Signals, int], seed: int) -> list[dict[str, Any]]:
    """Kills a verb as often as is numbers by each signal."""
    for _ in range(2):  # the first time some files are made that stay
        case.reset()
        start = time.monotonic()
        status, log = ended(case, None)[0], case.log.read_text()
        assert status == 0, log[-3000:]
    took, expected = time.monotonic() - start, case.content()
    rows = []
    for signum, number in numbers.items():
        counts, rng = Counts(), Random(f"{seed}/{name}/{signum}")
        while counts.kills < number and counts.late < 3 * number + 20:
            one_round(case, signum, min(ROUND, number - counts.kills), took, expected, counts, rng)
        print(f"{name} {signum.name}: {counts.kills} kills, {len(counts.faults)} faults", file=sys.stderr)
        for fault in counts.faults:
            print(f"  {fault}", file=sys.stderr)
        delays = sorted(counts.delays) or [0.0]
        rows.append(
            {
                "verb": name,
                "signal": signum.name,
                "kills": counts.kills,
                "late": counts.late,
                "statuses": dict(counts.statuses),
                "median": delays[len(delays) // 2],
                "longest": delays[-1],
                "faults": counts.faults,
            }
        )
    return rows


def one_round(
    case: Case, signum: signal.Signals, number: int, took: float, expected: object, counts: Counts, rng: Random
) -> None:
    """Kills a run several times, then lets it come to its end, which must be that of a run that was left alone."""
    case.reset()
    left = number
    while left:
        status, delay = ended(case, (signum, rng.uniform(0, took) if rng.random() < 0.8 else rng.uniform(0, took / 5)))
        if delay is None:
            counts.late += 1
            check_end(case, status, expected, counts)
            return
        left -= 1
        counts.kills += 1
        counts.statuses[status] += 1
        counts.delays.append(delay)
        # Before the command has its handlers, a signal ends the process as that of any program: 128 + 15 in a shell.
        allowed = {-signum} if signum == signal.SIGKILL else {128 + signum, -signum}
        if status not in allowed:
            counts.faults.append(f"status {status} after {signum.name}: {case.log.read_text()[-300:]}")
        counts.faults += case.faults()
    check_end(case, ended(case, None)[0], expected, counts)


def check_end(case: Case, status: int, expected: object, counts: Counts) -> None:
    """Compares what an undisturbed end has left with what it must be."""
    if status:
        counts.faults.append(f"status {status} at the end: {case.log.read_text()[-300:]}")
    elif case.content() != expected:
        counts.faults.append("the end differs from that of a run that was left alone")


def ended(case: Case, attack: tuple[signal.Signals, float] | None) -> tuple[int, float | None]:
    """Runs a verb in a fork, and attacks it.

    Args:
        case: The verb.
        attack: A signal, and the seconds after which it is sent; None sends none.

    Returns:
        The exit status, minus a signal that killed it; and the seconds from the signal to the end, None if the process
        had ended by itself before.
    """
    arguments = case.arguments()
    child = os.fork()
    if child == 0:
        forked(case.run, arguments, case.log)
    sent = None
    if attack is not None:
        end = time.monotonic() + attack[1]
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), None
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, attack[0])
        sent = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    delay = None if sent is None else time.monotonic() - sent
    if status == 0 and delay is not None and delay < LATE:
        return status, None  # it had ended when the signal came
    return status, delay


def forked(run: Callable[[list[str]], int], arguments: list[str], log: Path) -> None:
    """Runs a verb in this process, which is a fork; never returns."""
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["distillkit", *arguments]
        status = run(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(row["statuses"].items()))
    seconds = [f"{row[name]:.2f}" for name in ("median", "longest")]
    return [
        row["verb"],
        row["signal"],
        str(row["kills"]),
        str(row["late"]),
        statuses,
        *seconds,
        str(len(row["faults"])),
    ]


if __name__ == "__main__":
    main()
