"""Cost of encoding the data: rows per second and memory, at the first and at the second start.

Each phase is a process of its own. `one at a time` encodes record by record; `all` encodes in batches and holds every
prompt; `first start` is what a run does, which keeps the result on disk; `second start` reads it again; `use` makes
each prompt of it once. From 20,000 rows on a machine of four cores or more, processes encode.

    python benchmarks/encoding.py
    python benchmarks/encoding.py --rows 1000000 --phases "first start" "second start" use

CPU time is that of all threads and processes. Memory is what the process holds for itself (RssAnon), sampled, less what
it held before the phase, in which it had the records.
"""

import argparse
import os
import sys
import tempfile
import time
from random import Random
from typing import Any

from measure import Job, child_job, report, run_child
from results import add_output_options, table, write_json
from store import PrivateMemory

from distillkit.data import encode
from distillkit.testing import tiny_tokenizer
from distillkit.types import Record

WORDS = ("What", "is", "the", "capital", "of", "France?", "Paris,", "a", "city", "on", "the", "river", "Seine.")
PHASES = ("one at a time", "all", "first start", "second start", "use")


def main() -> None:
    """Runs and prints."""
    job = child_job()
    if job is not None:
        report(measured(job))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="how many")
    parser.add_argument("--words", type=int, default=60, help="words of a response; a prompt has a quarter of them")
    parser.add_argument("--tokenizer", help="folder of a tokenizer with a chat template; by default a tiny one")
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES, help="which phases, in this order")
    add_output_options(parser, "encoding.json")
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("rows", "words", "tokenizer")}
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for phase in options.phases:
            rows.append(run_child(__file__, {"phase": phase, "folder": folder, **settings}))
            print(" | ".join(cells(rows[-1])), file=sys.stderr)
    write_json(options.json, rows, vars(options))
    header = ("phase", "rows", "seconds", "rows/s", "CPU s", "rows/CPU s", "memory MiB", "bytes each")
    print(table(header, [cells(row) for row in rows], options.markdown))


def measured(job: Job) -> Job:
    """Time and memory of one phase."""
    os.environ["DISTILLKIT_CACHE"] = job["folder"]
    tokenizer, records = load(job["tokenizer"]), [record(index, job["words"]) for index in range(job["rows"])]
    encode(records[0], tokenizer, (tokenizer.eos_token_id,), True)
    prompts = None
    if job["phase"] == "use":
        prompts = split(records, tokenizer)
    with PrivateMemory() as memory:
        start, cpu = time.perf_counter(), cpu_seconds()
        count = run(job["phase"], records, tokenizer, prompts)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    assert count == len(records), "every row is encoded"
    return {"phase": job["phase"], "count": count, "seconds": seconds, "cpu": cpu, "memory": memory.peak}


def run(phase: str, records: list[Record], tokenizer: Any, prompts: Any) -> int:
    """Does the phase; the number of rows that it handled."""
    if phase == "one at a time":
        return len([encode(one, tokenizer, (tokenizer.eos_token_id,), True) for one in records])
    if phase == "all":
        from distillkit.data import encode_all

        return len(encode_all(records, tokenizer, (tokenizer.eos_token_id,), True, None, 10**6, "error", "all")[0])
    if phase == "use":
        return sum(bool(prompt.reference_ids) for prompt in prompts)
    return len(split(records, tokenizer))


def split(records: list[Record], tokenizer: Any) -> Any:
    """The prompts of a run's split."""
    from distillkit.training import encode_split

    ends = (tokenizer.eos_token_id,)
    return encode_split(records, tokenizer, ends, True, None, 10**6, "error", "all", "stop")[0]


def load(folder: str | None) -> Any:
    """The tokenizer."""
    if folder is None:
        return tiny_tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def record(index: int, words: int) -> Record:
    """A conversation whose content depends on its number alone."""
    random = Random(index)
    question, answer = (" ".join(random.choices(WORDS, k=count)) for count in (max(1, words // 4), words))
    turns = ({"role": "user", "content": f"{index} {question}"}, {"role": "assistant", "content": answer})
    return Record(turns, f"rows.jsonl line {index + 1}")


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has ended."""
    return sum(os.times()[:4])


def cells(row: Job) -> list[str]:
    """A row of the table."""
    count = row["count"]
    return [
        row["phase"],
        f"{count}",
        f"{row['seconds']:.2f}",
        f"{count / row['seconds']:.0f}",
        f"{row['cpu']:.2f}",
        f"{count / row['cpu']:.0f}",
        f"{row['memory'] / 2**20:.1f}",
        f"{row['memory'] / count:.0f}",
    ]


if __name__ == "__main__":
    main()
