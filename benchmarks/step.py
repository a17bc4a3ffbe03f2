"""A whole training step of knowledge distillation, beside other trainers.

Measured is all from the end of one optimizer step to the end of the next: collation, both models, the divergence,
backward and AdamW, each in its own framework. Every variant runs in processes of its own, in turn, on the same weights,
token ids, masks, precision, threads and optimizer, with KL(p‖q) at temperature 1 and its mean over the response tokens.
No speed is printed before the first step's losses agree.

    pip install -e ".[benchmark]"
    python benchmarks/step.py --shape tiny
    python benchmarks/step.py --lengths prompt --json step.json
    python benchmarks/step.py --device cuda --shape random-7b-1.5b

Time is that of the steps after the warm-up. Memory on the CPU is taken in further processes that give freed memory
back at once, over the first steps; on a GPU it is what torch's allocator handed out. A variant that isn't installed is
left out. On a GPU the student's weights are in float32 under autocast to bfloat16, and the teacher's in bfloat16.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from measure import ChildError, Job, child_job, report, run_child
from results import add_output_options, table, write_json
from steps.clock import StepClock
from steps.trainers import LAYOUTS, VARIANTS
from steps.workload import LENGTHS, SHAPES, Setup, step_examples

from distillkit.errors import DistillKitError

BASELINE = "trl-gkd"
"""What the ratios compare to."""

AGREEMENT = {"32-true": 1e-4, "bf16-mixed": 5e-3}
"""Largest relative deviation of the first step's loss from the first variant's. In bfloat16 trl pads on the left and
distillkit selects positions before the head, so that products are rounded in another order."""

MEMORY_STEPS = 3
"""Steps of a process that takes memory: AdamW's state is there from the second on."""


DEFAULT_VARIANTS = [name for name in VARIANTS if name not in LAYOUTS.values() or name == LAYOUTS["shared"]]


def main() -> int:
    """Runs and prints; the exit status."""
    job = child_job()
    if job is not None:
        report(_measure(**job))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="even", choices=tuple(LENGTHS), help="what rows are longest in")
    parser.add_argument("--variants", nargs="+", default=DEFAULT_VARIANTS, choices=tuple(VARIANTS), metavar="NAME")
    add_step_options(parser, "step.json")
    options = step_options(parser)
    names = _installed(options.variants)
    with tempfile.TemporaryDirectory() as folder:
        SHAPES[options.shape].save(Path(folder))
        setup = make_setup(options, folder, options.lengths)
        runs, errors = run_variants(setup, names, options.repeats)
        tokens = response_tokens(setup)
    agree = _print_losses(runs, AGREEMENT[options.precision], options.markdown)
    lines = {name: summary(results, tokens, options.warmup) for name, results in runs.items()} if agree else {}
    if lines:
        _print_table(lines, options.markdown)
    rows = [{"variant": name, **lines.get(name, {}), "runs": results} for name, results in runs.items()]
    write_json(options.json, rows, vars(options) | {"errors": errors})
    return 0 if agree and not errors else 1


def add_step_options(parser: argparse.ArgumentParser, json_name: str) -> None:
    """The options of all benchmarks of a step."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", default="smollm2", choices=tuple(SHAPES), help="the pair of models")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step, two for each prompt")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each process")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, at least 1")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each variant")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads on the CPU")
    parser.add_argument("--precision", choices=tuple(AGREEMENT), help="32-true on the CPU, bf16-mixed on a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of the rows and of drawn weights")
    add_output_options(parser, json_name)


def step_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, checked; this process and its children get the threads that were asked for."""
    options = parser.parse_args()
    if options.rows < 2 or options.rows % 2:
        parser.error("--rows must be even and at least 2: rows come in pairs.")
    if min(options.steps, options.warmup, options.repeats) < 1:
        parser.error("--steps, --warmup and --repeats must be at least 1.")
    options.precision = options.precision or ("32-true" if options.device == "cpu" else "bf16-mixed")
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    return options


def make_setup(options: argparse.Namespace, folder: str, lengths: str) -> Setup:
    """Settings of the child processes; `folder` contains the models."""
    return Setup(
        folder=folder,
        shape=options.shape,
        lengths=lengths,
        rows=options.rows,
        steps=options.warmup + options.steps,
        device=options.device,
        precision=options.precision,
        threads=options.threads,
        seed=options.seed,
    )


def _installed(names: Sequence[str]) -> list[str]:
    """The variants whose module is there; says which are not."""
    missing = [name for name in names if (needs := VARIANTS[name].needs) and importlib.util.find_spec(needs) is None]
    for name in missing:
        print(f"{name} is left out: {VARIANTS[name].needs} is not installed.", file=sys.stderr)
    return [name for name in names if name not in missing]


def run_variants(
    setup: Setup, names: Sequence[str], repeats: int, with_memory: bool = True
) -> tuple[dict[str, list[Job]], dict[str, str]]:
    """Reports of each variant's processes, the one for memory last, and the errors of variants that failed."""
    runs: dict[str, list[Job]] = {name: [] for name in names}
    errors: dict[str, str] = {}
    plan = [(name, "fill") for name in names if VARIANTS[name].fills]
    plan += [(name, "time") for _ in range(repeats) for name in names]
    plan += [(name, "memory") for name in names] if setup.device == "cpu" and with_memory else []
    for index, (name, phase) in enumerate(plan, 1):
        if name in errors:
            continue
        print(f"\r{setup.lengths} {index}/{len(plan)} {phase} {name}".ljust(60), end="", file=sys.stderr, flush=True)
        steps = min(setup.steps, MEMORY_STEPS) if phase == "memory" else setup.steps
        job = {"name": name, "setup": asdict(replace(setup, steps=steps))}
        try:
            result = run_child(__file__, job, give_back=phase == "memory")
        except ChildError as error:
            errors[name] = str(error)
            continue
        if phase != "fill":
            runs[name].append(result | {"what": phase})
    print("\r".ljust(60), end="\r", file=sys.stderr)
    for name, reason in errors.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    return {name: results for name, results in runs.items() if name not in errors}, errors


def _measure(name: str, setup: dict[str, Any]) -> Job:
    """In a child: one run of one variant."""
    settings = Setup(**setup)
    torch.set_num_threads(settings.threads)
    clock = StepClock(settings.device)
    VARIANTS[name].run(settings, clock, **VARIANTS[name].options)
    return clock.result()


def response_tokens(setup: Setup) -> list[int]:
    """Response tokens of each step."""
    return [sum(len(row.response) for row in step) for step in step_examples(setup)]


def deviations(runs: dict[str, list[Job]]) -> dict[str, tuple[float, float]]:
    """Largest relative deviation of each variant's first and last loss from those of the first variant."""
    losses = {name: [run["losses"] for run in results if run["what"] == "time"] for name, results in runs.items()}
    largest = {}
    for name, variant_losses in losses.items():
        reference = next(iter(losses.values()))[0]
        first, last = (max(abs(run[step] / reference[step] - 1) for run in variant_losses) for step in (0, -1))
        largest[name] = first, last
    return largest


def _print_losses(runs: dict[str, list[Job]], allowed: float, markdown: bool) -> bool:
    """Prints the losses of the first and the last step; whether the first ones agree with the first variant's."""
    if not runs:
        return False
    rows, wrong, losses = [], [], []
    for name, (first, last) in deviations(runs).items():
        losses = runs[name][0]["losses"]
        rows.append([name, f"{losses[0]:.7f}", f"{first:.1e}", f"{losses[-1]:.7f}", f"{last:.1e}"])
        if not first <= allowed:
            wrong.append(name)
    header = ["variant", "step-1 loss", "deviation", f"step-{len(losses)} loss", "deviation"]
    print(table(header, rows, markdown), end="\n\n")
    if wrong:
        print(f"No speed is compared: {', '.join(wrong)} and {next(iter(runs))} differ by more than {allowed:g}.")
    return not wrong


def summary(runs: list[Job], tokens: list[int], warmup: int) -> dict[str, float]:
    """Metrics of one variant: medians over processes of each measured step, and peak memory."""
    timed = [run for run in runs if run["what"] == "time"]
    remembered = [run for run in runs if run["what"] == "memory"] or timed
    first = warmup - 1  # the clock has no time for the first step
    wall, cpu = (
        [median(step) for step in zip(*(run[kind][first:] for run in timed), strict=True)] for kind in ("wall", "cpu")
    )
    return {
        "loss": timed[0]["losses"][0],
        "step_ms": 1e3 * median(wall),
        "step_cpu_ms": 1e3 * median(cpu),
        "tokens_per_second": sum(tokens[warmup:]) / sum(wall),
        "peak": max(run["peak"] for run in remembered),
        "extra": max(run["extra"] for run in remembered),
    }


def _print_table(lines: dict[str, dict[str, float]], markdown: bool) -> None:
    baseline = lines.get(BASELINE)
    rows = []
    for name, line in lines.items():
        ratios = ["-"] * 3
        if baseline is not None:
            ratios = [f"{line[kind] / baseline[kind]:.2f}" for kind in ("tokens_per_second", "peak", "extra")]
        metrics = [f"{line['step_ms']:.0f}", f"{line['step_cpu_ms']:.0f}", f"{line['tokens_per_second']:.0f}"]
        peak, extra = (f"{line[kind] / 2**20:.0f}" for kind in ("peak", "extra"))
        rows.append([name, f"{line['loss']:.6f}", *metrics, ratios[0], peak, ratios[1], extra, ratios[2]])
    header = [
        "variant",
        "step-1 loss",
        "ms/step",
        "cpu ms",
        "response tok/s",
        "ratio",
        "peak MiB",
        "ratio",
        "extra MiB",
        "ratio",
    ]
    print(table(header, rows, markdown))
    print(f"\nRatios are to {BASELINE}; extra is the peak over what was in use before the first step.")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DistillKitError as error:
        sys.exit(str(error))
