"""Time saved in a training step by packing rows, and by sharing the prefix of the rows of a prompt.

The step is that of `step.py`, with its processes in turn; the three variants differ in `DistillData.layout` alone. Body
tokens are those that pass through the layers of both models, padding included. No speed is printed before the first
step's losses agree with the padded layout's.

    python benchmarks/layouts.py
    python benchmarks/layouts.py --lengths prompt --rows 8 --steps 6 --repeats 3
"""

import argparse
import sys
import tempfile
from pathlib import Path

from measure import Job
from results import table, write_json
from step import (
    AGREEMENT,
    add_step_options,
    deviations,
    make_setup,
    response_tokens,
    run_variants,
    step_options,
    summary,
)
from steps.trainers import LAYOUTS
from steps.with_distillkit import as_row
from steps.workload import LENGTHS, SHAPES, Setup, step_examples

from distillkit.data import Layout, collate
from distillkit.errors import DistillKitError

ALLOWED = AGREEMENT | {"32-true": 1e-5}
"""Largest relative deviation of the first step's loss from that of the padded layout."""


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", default=tuple(LENGTHS), choices=tuple(LENGTHS), help="rows' lengths")
    add_step_options(parser, "layouts.json")
    parser.set_defaults(rows=4, steps=2, warmup=1, repeats=2)
    options = step_options(parser)
    rows: list[Job] = []
    with tempfile.TemporaryDirectory() as folder:
        SHAPES[options.shape].save(Path(folder))
        for lengths in options.lengths:
            rows += measure(make_setup(options, folder, lengths), options.warmup, options.repeats)
            write_json(options.json, rows, vars(options))
    print(as_table(rows, options.markdown))


def measure(setup: Setup, warmup: int, repeats: int) -> list[Job]:
    """The rows of one distribution of lengths, the padded layout first.

    Raises:
        SystemExit: If a layout fails, or its first loss is not that of the padded one.
    """
    runs, errors = run_variants(setup, list(LAYOUTS.values()), repeats, with_memory=False)
    if errors:
        sys.exit(1)
    rows: list[Job] = []
    for layout, name in LAYOUTS.items():
        deviation = deviations(runs)[name][0]
        if not deviation <= ALLOWED[setup.precision]:
            sys.exit(f"{name} differs from the padded layout by {deviation:.1e} on {setup.lengths}: no speed is given.")
        tokens = body_tokens(setup, layout)[warmup:]
        row: Job = {"lengths": setup.lengths, "layout": layout, "body_tokens": sum(tokens) / len(tokens)}
        row |= {"deviation": deviation, **summary(runs[name], response_tokens(setup), warmup)}
        rows.append(row | {"runs": runs[name]})
    for row in rows:
        row["saved"] = 1 - row["body_tokens"] / rows[0]["body_tokens"]
        row["time_ratio"] = row["step_ms"] / rows[0]["step_ms"]
    return rows


def body_tokens(setup: Setup, layout: Layout) -> list[int]:
    """Tokens of each step that pass through the layers."""
    batches = [collate([as_row(row) for row in step], pad_id=0, layout=layout) for step in step_examples(setup)]
    return [(batch if batch.packed is None else batch.packed).input_ids.numel() for batch in batches]


def as_table(rows: list[Job], markdown: bool) -> str:
    """The rows."""
    lines = []
    for row in rows:
        tokens = [f"{row['body_tokens']:.0f}", f"{row['saved']:.0%}"]
        times = [f"{row['step_ms']:.0f}", f"{row['step_cpu_ms']:.0f}", f"{row['time_ratio']:.2f}"]
        lines.append([row["lengths"], row["layout"], *tokens, *times, f"{row['deviation']:.1e}"])
    header = ("lengths", "layout", "body tokens", "saved", "ms/step", "cpu ms", "time/padded", "step-1 loss deviation")
    return table(header, lines, markdown)


if __name__ == "__main__":
    try:
        main()
    except DistillKitError as error:
        sys.exit(str(error))
