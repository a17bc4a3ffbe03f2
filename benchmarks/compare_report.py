"""Cost of a comparison's report, for comparisons of several sizes.

The folders of the runs are written as `distillkit compare` leaves them, and the report is written as with `--report`:
once for the time, and the runs are few or many. While runs end, the command writes reports for at most a twentieth of
the time that has passed, so that this is what the last report costs, and all others together at most that share.

    python benchmarks/compare_report.py
    python benchmarks/compare_report.py --methods 10 50 --seeds 5
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import yaml
from results import add_output_options, table, write_json

from distillkit.comparison import compare

METRICS = ("kl", "nll", "acceptance", "rouge_l", "distinct_2")


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=int, nargs="+", default=[5, 10, 20], help="methods of each comparison")
    parser.add_argument("--seeds", type=int, default=5, help="runs of a method")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    parser.add_argument("--steps", type=int, default=300, help="logged steps of a run")
    add_output_options(parser, "compare_report.json")
    options = parser.parse_args()
    rows = []
    for methods in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(Path(folder), methods, options))
        print(f"{methods} methods: {rows[-1]['seconds']:.1f} s", file=sys.stderr)
    write_json(options.json, rows, vars(options))
    header = ("methods", "runs", "seconds", "CPU s", "CPU s a run", "MB")
    cells = []
    for row in rows:
        figures = (row["seconds"], row["cpu"], row["cpu"] / row["runs"], row["megabytes"])
        cells.append([str(row["methods"]), str(row["runs"]), *(f"{figure:.2f}" for figure in figures)])
    print(table(header, cells, options.markdown))


def measured(out: Path, methods: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time of one report."""
    names, seeds = [f"method-{number}" for number in range(methods)], list(range(options.seeds))
    content = {"out": str(out / "out"), "seeds": seeds, "budget": {"steps": options.steps}}
    content |= {"common": {"model": {"student": {"source": "small"}}}, "methods": {name: {} for name in names}}
    (out / "compare.yaml").write_text(yaml.safe_dump(content))
    for name in names:
        for seed in seeds:
            write_run(out / "out" / "runs" / name / f"seed-{seed}", f"{name}/{seed}", options)
    start, cpu = time.perf_counter(), time.process_time()
    done = compare(out / "compare.yaml", only_report=True)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert done.is_complete, "every run is done"
    size = sum(path.stat().st_size for path in done.folder.iterdir() if path.is_file()) / 1e6
    return {"methods": methods, "runs": methods * len(seeds), "seconds": seconds, "cpu": cpu, "megabytes": size}


def write_run(folder: Path, name: str, options: argparse.Namespace) -> None:
    """A run as the command leaves it."""
    generator = Random(name)
    answers = [answer(number, generator) for number in range(options.prompts)]
    metrics = {metric: sum(one["metrics"][metric] for one in answers) / len(answers) for metric in METRICS}
    evaluation = {"metrics": metrics, "num_prompts": len(answers), "teacher": "large", "versions": {}}
    logs = folder / "csv" / "version_0"
    logs.mkdir(parents=True)
    (folder / "evaluation").mkdir()
    lines = [json.dumps(one) + "\n" for one in answers]
    (folder / "evaluation" / "answers.jsonl").write_text("".join(lines))
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "usage.json").write_text(json.dumps({"spent_tokens": 1000, "spent_seconds": 2.0}))
    (folder / "fitted.json").write_text(json.dumps({"wall_seconds": 3.0}))
    columns = ("train/loss", "train/spent_tokens", "train/spent_seconds", "val/kl")
    rows = [["epoch", "step", *columns]]
    rows += [["0", str(step), *(f"{generator.random():.6f}" for _ in columns)] for step in range(options.steps)]
    (logs / "metrics.csv").write_text("".join(",".join(row) + "\n" for row in rows))


def answer(number: int, generator: Random) -> dict[str, Any]:
    """An answer to a held-out prompt with random metrics."""
    text = {"prompt": f"What is {number}?", "reference": "It is so. " * 10, "student": "It is not so. " * 10}
    counts = {"prompt_id": f"{number:032x}", "finish": "stop", "tokens": 40, "positions": 30}
    return text | counts | {"metrics": {name: generator.random() for name in METRICS}}


if __name__ == "__main__":
    main()
