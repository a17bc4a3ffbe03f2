"""What a step of distillkit saves by laying rows end to end, and by sharing what the rows of a prompt begin with.

The step is that of `step.py`, with its processes in turn; the three variants differ in `DistillData.layout` alone. Body
tokens are those that pass through the layers of both models, padding included. No speed is printed before the first
step's losses agree with the padded layout's.

    python benchmarks/layouts.py
    python benchmarks/layouts.py --lengths prompt --rows 16 --steps 6 --repeats 3
"""

import argparse
import sys
import tempfile
from pathlib import Path

from measure import Job
from results import table, write_json
from step import AGREEMENT, add_step_options, deviations, make_setup, run_variants, step_options, summary
from step_distillkit import as_row
from step_trainers import LAYOUTS
from step_workload import LENGTHS, SHAPES, Setup, examples

from distillkit.data.collate import Layout, collate
from distillkit.errors import DistillKitError

ALLOWED = AGREEMENT | {"32-true": 1e-5}
"""Largest relative deviation of the first step's loss from that of the padded layout."""


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", default=tuple(LENGTHS), choices=tuple(LENGTHS), help="rows' lengths")
    add_step_options(parser, "layouts.json")
    parser.set_defaults(steps=3, warmup=1, repeats=2)
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
    differ, rows = deviations(runs), []
    responses = [sum(len(row.response) for row in step) for step in _steps(setup)]
    for layout, name in LAYOUTS.items():
        deviation = differ[name][0]
        if not deviation <= ALLOWED[setup.precision]:
            sys.exit(
                f"{name} differs by {deviation:.1e} from the padded layout on {setup.lengths}: no speed is compared."
            )
        tokens = body_tokens(setup, layout)[warmup:]
        figures = {"lengths": setup.lengths, "layout": layout, "body_tokens": sum(tokens) / len(tokens)}
        figures |= {"deviation": deviation, **summary(runs[name], responses, warmup), "runs": runs[name]}
        padded = rows[0] if rows else figures
        rows.append(figures | {"saved": 1 - figures["body_tokens"] / padded["body_tokens"],
                               "time_ratio": figures["step_ms"] / padded["step_ms"]})  # fmt: skip
    return rows


def body_tokens(setup: Setup, layout: Layout) -> list[int]:
    """Tokens of each step that pass through the layers."""
    batches = [collate([as_row(row) for row in step], pad_id=0, layout=layout) for step in _steps(setup)]
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


def _steps(setup: Setup) -> list:
    rows = examples(setup)
    return [rows[start : start + setup.rows] for start in range(0, len(rows), setup.rows)]


if __name__ == "__main__":
    try:
        main()
    except DistillKitError as error:
        sys.exit(str(error))
