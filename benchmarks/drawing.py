"""Share of writing that goes into drawing tokens, for a flat and a peaked model, and writing before and after.

SmolLM2-135M answers the quickstart's held-out prompts in bfloat16, 64 at once. `peaked` is the model as it is; `flat`
has 12 of its 30 layers, untrained, and gives no token much. *draw* is the share of processor time in which tokens are
drawn from logits; *log-probability* that of computing how likely they were.

    python benchmarks/drawing.py
    git worktree add /tmp/earlier e93e854^ && python benchmarks/drawing.py --earlier /tmp/earlier/src

With `--earlier`, each line is written by that version of the package as well, in turn with this one.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
import transformers
from generation import quickstart_prompts
from measure import Job, child_job, report, run_child
from results import add_output_options, table, write_json
from steps.workload import quickstart_pair

from distillkit.generators import TransformersGenerator
from distillkit.models import Student
from distillkit.types import Sampling

LAYERS: dict[str, list[int] | None] = {"flat": [0, 1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 29], "peaked": None}
SAMPLINGS = {
    "default (0.8, top-p 0.95)": Sampling(),
    "top-p 0.9": Sampling(temperature=1.0, top_p=0.9),
    "top-p 0.95": Sampling(temperature=1.0, top_p=0.95),
    "top-p 0.99": Sampling(temperature=1.0, top_p=0.99),
    "top-k 50": Sampling(temperature=1.0, top_p=1.0, top_k=50),
    "all tokens": Sampling(temperature=1.0, top_p=1.0),
    "greedy": Sampling(temperature=0.0),
}


def main() -> None:
    """The table and the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=tuple(LAYERS), choices=tuple(LAYERS))
    parser.add_argument("--samplings", nargs="+", default=tuple(SAMPLINGS), choices=tuple(SAMPLINGS))
    parser.add_argument("--tokens", type=int, default=48, help="longest response")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--repeats", type=int, default=3, help="processes that each median is taken over")
    parser.add_argument("--earlier", help="source folder of another version of the package, written with in turn")
    add_output_options(parser, "drawing.json")
    options = parser.parse_args()
    Student(quickstart_pair()[0]).prepare()
    rows: list[Job] = []
    for model in options.models:
        for name in options.samplings:
            job = {"model": model, "sampling": name, "tokens": options.tokens, "threads": options.threads}
            now, before = [], []
            for _ in range(options.repeats):
                print(f"{model} {name}", file=sys.stderr)
                now.append(run_child(__file__, job))
                if options.earlier:
                    before.append(from_folder(options.earlier, job))
            row = job | {key: median(run[key] for run in now) for key in now[0]}
            if before:
                row["earlier_cpu_rate"] = median(run["cpu_rate"] for run in before)
                row["ratio"] = row["cpu_rate"] / row["earlier_cpu_rate"]
            rows.append(row)
    write_json(options.json, rows, vars(options))
    header = ["model", "sampling", "tokens", "tokens/s", "tokens per CPU second", "draw", "log-probability"]
    header += ["earlier", "ratio"] if options.earlier else []
    print(table(header, [cells(row) for row in rows], options.markdown))


def cells(row: Job) -> list[str]:
    """A line of the table."""
    line = [row["model"], row["sampling"], str(row["new_tokens"]), f"{row['rate']:.0f}", f"{row['cpu_rate']:.0f}"]
    line += [f"{row['draw']:.1%}", f"{row['log_prob']:.1%}"]
    return line + ([f"{row['earlier_cpu_rate']:.0f}", f"{row['ratio']:.2f}"] if "ratio" in row else [])


def from_folder(source: str, job: Job) -> Job:
    """A child process that imports another version of the package."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = source
    try:
        return run_child(__file__, job)
    finally:
        os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)


def child(job: Job) -> None:
    """One model and sampling, once."""
    torch.set_num_threads(job["threads"])
    transformers.utils.logging.disable_progress_bar()
    student = Student(quickstart_pair()[0], LAYERS[job["model"]], dtype="bfloat16")
    model, tokenizer = student.load().eval().requires_grad_(False), student.tokenizer()
    prompts = quickstart_prompts(tokenizer, model, 64)
    generator = TransformersGenerator(batch_size=64, dtype="bfloat16", progress=False)
    generator.refresh(model, tokenizer)
    settings = asdict(SAMPLINGS[job["sampling"]])
    generator.generate(prompts, Sampling(**{**settings, "max_new_tokens": 4}))
    writing = sys.modules[TransformersGenerator.__module__]
    seconds = {"sample_tokens": 0.0, "token_log_probs": 0.0}
    for name in seconds:
        setattr(writing, name, timed(getattr(writing, name), seconds, name))
    wall, cpu = time.perf_counter(), time.process_time()
    responses = generator.generate(prompts, Sampling(**{**settings, "max_new_tokens": job["tokens"]}))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    count = sum(len(response.token_ids) for response in responses)
    shares = {"draw": seconds["sample_tokens"] / cpu, "log_prob": seconds["token_log_probs"] / cpu}
    report({"new_tokens": count, "rate": count / wall, "cpu_rate": count / cpu, **shares})


def timed(function: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    """The function, whose processor time is added to `seconds[name]`."""

    def call(*args: Any) -> Any:
        start = time.process_time()
        result = function(*args)
        seconds[name] += time.process_time() - start
        return result

    return call


if __name__ == "__main__":
    work = child_job()
    main() if work is None else child(work)
