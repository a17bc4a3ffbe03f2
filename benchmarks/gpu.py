"""Everything that is to be tried and measured on a GPU, by one command within a few minutes.

    python benchmarks/gpu.py --out results
    python benchmarks/gpu.py --out results --real SmolLM2-135M-Instruct.Q4_1.gguf --minutes 12
    python benchmarks/gpu.py --out results --device cpu --tiny

Parts, in order: the tests that need a GPU, the loss with both heads, a whole optimizer step, generation, the
quickstart's run, a comparison of methods. Each has a share of the time, and what it leaves goes to those after it. The
cases of all parts run in a process that is replaced when it dies or hangs; what has been measured by then counts. After
each part `results.json`, `tables.md` and `gpu.log` in the folder are whole; the last screen has a line for each case.

The exit status is 0 if nothing failed. What there was no time for, or what is not installed, is shown and is no
failure. docs/gpu.md says what has to be installed.
"""

import argparse
import importlib.util
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from gpu_parts.cases import Settings
from gpu_parts.plan import make_parts
from gpu_parts.report import Report, gather_facts, print_line
from gpu_parts.runner import Runner, StopError

RESERVE = 5.0
"""Seconds for the report."""
STOPS = (signal.SIGINT, signal.SIGTERM)
WRITTEN = ("results.json", "tables.md", "gpu.log", "parts", "real", "compare", "scratch")
"""Files and folders of a run, which the next run into the same folder replaces."""


def main() -> int:
    """Runs and reports; the exit status."""
    start = time.monotonic()
    options = parse()
    for number in STOPS:
        signal.signal(number, _interrupt)
    clear(options.out)
    parts = make_parts(options.device, options.tiny, options.real)
    parts = [part for part in parts if options.parts is None or part.name in options.parts]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report = Report(options.out, gather_facts(options.device, settings), parts)
    faults = {name: kind for kind in ("fail", "crash", "hang") for name in getattr(options, kind)}
    seconds = 60 * options.minutes - RESERVE - (time.monotonic() - start)
    runner = Runner(
        Settings(str(options.out), options.device, options.tiny, options.real),
        seconds,
        faults,
        options.limit,
        announce=print_line,
    )
    runner.run(parts, report.write)
    shutil.rmtree(options.out / "scratch", ignore_errors=True)
    print(report.screen(runner.outcomes))
    print(f"{time.monotonic() - start:.0f} s of {60 * options.minutes:.0f}")
    if runner.interrupted:
        return 128 + runner.interrupted
    return int(any(outcome.status == "failed" for outcome in runner.outcomes))


def clear(folder: Path) -> None:
    """Makes the folder of the results, and removes those of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in WRITTEN):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_environment(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command before any time is spent if something that all of it needs is missing."""
    if importlib.util.find_spec("distillkit") is None:
        parser.error("distillkit is not installed. Install it, or set PYTHONPATH as docs/gpu.md says.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("There is no CUDA device. To try the command without one, add --device cpu --tiny.")
    if options.real is not None and options.real.endswith(".gguf") and not Path(options.real).exists():
        parser.error(f"--real {options.real} does not exist.")
    has_files = options.out.exists() and any(options.out.iterdir())
    if has_files and not any((options.out / name).exists() for name in ("gpu.log", "parts")):
        parser.error(f"--out {options.out} has files of something else. Name an empty folder or one of an earlier run.")
    if options.real is not None and options.out in Path(options.real).parents:
        parser.error("--real must not lie in --out, whose content is replaced.")


def parse() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time that the whole command keeps to")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing about speed, to try the command")
    parser.add_argument("--real", metavar="SOURCE", help="a real model for the last parts: a .gguf file or a folder")
    names = [part.name for part in make_parts("cpu", True, None)]
    parser.add_argument("--parts", nargs="+", choices=names, metavar="PART", help=f"some of {', '.join(names)}")
    parser.add_argument("--limit", type=float, metavar="S", help="overrides the time limit of every case (seconds)")
    for kind, effect in (("fail", "raises"), ("crash", "is killed"), ("hang", "never ends")):
        parser.add_argument(
            f"--{kind}", action="append", default=[], metavar="CASE", help=f"a case that {effect}, to try the report"
        )
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error("--minutes must be above 0.")
    cases = {case.name for part in make_parts(options.device, options.tiny, options.real) for case in part.cases}
    for name in (*options.fail, *options.crash, *options.hang):
        if name not in cases:
            parser.error("\n  ".join([f"There is no case {name!r}. The cases are:", *sorted(cases)]))
    options.out = options.out.resolve()
    if options.real is not None and Path(options.real).exists():  # commands run in other folders
        options.real = str(Path(options.real).resolve())
    check_environment(parser, options)
    return options


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    for stop in STOPS:  # the report is not interrupted
        signal.signal(stop, signal.SIG_IGN)
    raise StopError(number)


if __name__ == "__main__":
    sys.exit(main())
