"""Cost and accuracy of the teacher cache, on responses that the teacher generated.

The quickstart's pair: SmolLM2-135M greedily answers held-out prompts, and the student, 12 of its 30 layers without any
training unless `--student` names another, is compared with it by KL(p‖q) at temperature 1, the mean over the response
tokens. Each cache is written, then read by a `CachedTeacher` that never loads a model. Hidden states must come back bit
for bit, in the batch in which they were scored. What `top_k` lacks must be what the chain rule says: KL(p‖q) − KL of
the K+1 columns = p(tail) · KL(p in the tail ‖ q in the tail), at least 0 and at most p(tail) · max log ratio there.

    python benchmarks/teacher_cache.py
    python benchmarks/teacher_cache.py --prompts 100 --k 16 64 256 1024

The time of the live teacher is that of its body, that of a cache includes finding the rows; files are in memory by then
as far as the system keeps them there. The head, which makes log-probabilities of hidden states, is in neither.

Letters: N response tokens, V vocabulary, D hidden width, K tokens that are stored.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import transformers
import yaml
from measure import Job
from results import add_output_options, table, write_json
from steps.workload import QUICKSTART, quickstart_pair
from torch import Tensor

from distillkit.curators import TeacherCurator
from distillkit.data import Source, collate, encode_all
from distillkit.errors import DistillKitError
from distillkit.generators import TransformersGenerator
from distillkit.losses import ForwardKL
from distillkit.models import Student, eos_ids, score
from distillkit.teachers import CachedTeacher, TransformersTeacher
from distillkit.types import Batch, Prompts, Sampling, Scores

HALF = 2.0**-11
"""Largest relative error of a number in half precision."""
SLICE = 256
"""Positions whose distributions are held in float64 at once."""


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where the models live: cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the teacher")
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts of the quickstart")
    parser.add_argument("--tokens", type=int, default=64, help="longest response")
    parser.add_argument("--k", type=int, nargs="+", default=(16, 64, 256), help="tokens that top_k keeps")
    parser.add_argument("--student", help="a student that was trained, such as a run's `export` folder")
    parser.add_argument("--repeats", type=int, default=3, help="readings that each median is taken over")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads on the CPU")
    add_output_options(parser, "teacher_cache.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    device = torch.device(options.device)
    source, layers = quickstart_pair()
    teacher = TransformersTeacher(source, options.dtype)
    teacher.setup(device)
    batch = written_batch(teacher, options.prompts, options.tokens).to(device)
    loader = Student(source, keep_layers=layers) if options.student is None else Student(options.student)
    model = loader.load().to(device).eval().requires_grad_(False)
    with torch.no_grad():
        student = score(model, batch, teacher.vocab_size)
    kinds: list[tuple[Literal["hidden", "top_k"], int]] = [("hidden", 1), *(("top_k", k) for k in options.k)]
    with tempfile.TemporaryDirectory() as folder:
        readers, sizes = {}, {}
        for keep, k in kinds:
            name, cache = keep if keep == "hidden" else f"top {k}", Path(folder) / f"{keep}-{k}"
            readers[name] = written_cache(teacher, keep, k, cache, batch)
            sizes[name] = sum(file.stat().st_size for file in cache.rglob("0*.safetensors"))
        teachers = {"live": teacher, **readers}
        scores = {name: each.score(batch) for name, each in teachers.items()}
        times = timed({name: each.score for name, each in teachers.items()}, batch, options.repeats)
    rows = compared(student, scores, batch)
    for row in rows:
        row["microseconds"] = 1e6 * times[row["kept"]] / batch.num_tokens
        if row["kept"] != "live":
            row["disk_bytes"] = sizes[row["kept"]] / batch.num_tokens
            row["formula_bytes"] = formula(scores[row["kept"]], teacher.vocab_size)
    write_json(options.json, rows, vars(options) | {"rows": len(batch.lengths), "response_tokens": batch.num_tokens})
    print(f"{len(batch.lengths)} responses, {batch.num_tokens} tokens; bytes and µs are those of a token.", end="\n\n")
    print(as_table(rows, options.markdown))


def written_batch(teacher: TransformersTeacher, prompts: int, tokens: int) -> Batch:
    """The teacher's greedy answers to the first of the quickstart's held-out prompts."""
    data = yaml.safe_load(QUICKSTART.read_text())["data"]
    file = data["val"].replace("${config_dir}", str(QUICKSTART.parent))
    tokenizer = teacher.tokenizer()
    encoded, _ = encode_all(
        Source(file, limit=prompts).records(),
        tokenizer,
        eos_ids(tokenizer, teacher.model),
        chat=True,
        system=data["system"],
        max_length=2048,
        overlong="error",
    )
    generator = TransformersGenerator()
    assert teacher.model is not None, "the teacher is set up"
    generator.refresh(teacher.model, tokenizer)
    curator = TeacherCurator(Sampling(temperature=0.0, max_new_tokens=tokens))
    rows = curator.curate(Prompts(tuple(encoded)), {"teacher": generator})
    return collate(rows, tokenizer.pad_token_id)


def written_cache(
    teacher: TransformersTeacher, keep: Literal["hidden", "top_k"], k: int, folder: Path, batch: Batch
) -> CachedTeacher:
    """Writes a batch to a new cache; a teacher that reads it, and has no model."""
    writer = CachedTeacher(teacher, keep, k, str(folder))
    writer.setup(batch.input_ids.device)
    writer.score(batch)
    unloaded = TransformersTeacher(teacher.source, teacher.dtype)
    reader = CachedTeacher(unloaded, keep, k, str(folder))
    reader.setup(batch.input_ids.device)
    reader.score(batch)
    assert unloaded.model is None, "the model was loaded for what is on disk"
    return reader


def timed(works: Mapping[str, Callable[[Batch], Scores]], batch: Batch, repeats: int) -> dict[str, float]:
    """Median seconds of each, all in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work(batch)
            if batch.input_ids.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(readings) for name, readings in seconds.items()}


def compared(student: Scores, scores: Mapping[str, Scores], batch: Batch) -> list[Job]:
    """Compares each teacher with the live one: the divergence, what it lacks, and the gradient's direction."""
    live = scores["live"]
    kl, grad = by_loss(student, live, batch)
    rows: list[Job] = []
    for name, cached in scores.items():
        print(f"comparing {name}", file=sys.stderr)
        cached_kl, cached_grad = by_loss(student, cached, batch)
        row: Job = {"kept": name, "kl": float(cached_kl.mean()), "lacks": float((kl - cached_kl).mean())}
        row["cosine"] = float(torch.cosine_similarity(grad.flatten().double(), cached_grad.flatten().double(), dim=0))
        row["gradient_deviation"] = float((cached_grad - grad).norm() / grad.norm())
        if cached.top_k_ids is None:
            assert torch.equal(cached.hidden, live.hidden), f"{name}: hidden states differ"
            assert torch.equal(cached.log_probs(slice(SLICE)), live.log_probs(slice(SLICE))), f"{name}: heads differ"
            assert torch.equal(cached_kl, kl), f"{name}: the divergence differs"
        else:
            row |= {key: float(value.mean()) for key, value in tail(student, live, cached.top_k_ids).items()}
            assert abs(row["lacks"] - row["chain_rule"]) <= row["rounding"] + 1e-5 * row["kl"], row
        rows.append(row)
    return rows


def by_loss(student: Scores, teacher: Scores, batch: Batch) -> tuple[Tensor, Tensor]:
    """KL of each position `[N]`, and the mean's gradient by the student's hidden states `[N, D]`."""
    hidden = student.hidden.detach().requires_grad_()
    output = ForwardKL(reduction="token_mean")(replace(student, hidden=hidden), teacher, batch)
    (output.total / output.units).backward()
    assert hidden.grad is not None, "no gradient"
    return output.metrics["divergence"].detach(), hidden.grad


@torch.no_grad()
def tail(student: Scores, live: Scores, top_k_ids: Tensor) -> dict[str, Tensor]:
    """Terms of the chain rule at each position `[N]`, from both full distributions in float64.

    `tail_mass`; `chain_rule`, p(tail) · KL in the tail; `bound`, p(tail) · largest log ratio there; and `rounding`, the
    most that half precision of the kept log p may change: Σ p |log p/q + 1| · |log p| · 2⁻¹¹, to first order.
    """
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(top_k_ids), SLICE):
        part = slice(start, start + SLICE)
        ids, logp, logq = top_k_ids[part], live.log_probs(part).double(), student.log_probs(part).double()
        top_p, top_q = logp.gather(-1, ids), logq.gather(-1, ids)  # [n, K]
        half = (top_p.exp() * (top_p - top_q + 1).abs() * top_p.abs() * HALF).sum(-1)
        rest_p, rest_q = (log_probs.scatter_(-1, ids, -torch.inf) for log_probs in (logp, logq))
        log_mass, inside = rest_p.logsumexp(-1), rest_p > -torch.inf
        ratio = (rest_p - log_mass[:, None]) - (rest_q - rest_q.logsumexp(-1, keepdim=True))
        mass = log_mass.exp()
        chain_rule = (rest_p.exp() * ratio.masked_fill(~inside, 0.0)).sum(-1)
        bound = mass * ratio.masked_fill(~inside, -torch.inf).amax(-1)
        assert bool((chain_rule > -1e-9).all() and (chain_rule <= bound + 1e-9).all()), "outside of the bound"
        parts.append({"tail_mass": mass, "chain_rule": chain_rule, "bound": bound, "rounding": half})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def formula(scores: Scores, vocab: int) -> int:
    """Bytes of a token by docs/models.md."""
    if scores.top_k_ids is None:
        return scores.hidden.shape[-1] * scores.hidden.element_size()
    return scores.top_k_ids.shape[-1] * (2 + (2 if vocab <= 2**16 else 4)) + 8


def as_table(rows: Sequence[Job], markdown: bool) -> str:
    """The rows; a dash where there is nothing to say."""
    formats = {
        "formula_bytes": ".0f",
        "disk_bytes": ".1f",
        "microseconds": ".1f",
        "kl": ".5f",
        "lacks": ".6f",
        "chain_rule": ".6f",
        "bound": ".4f",
        "tail_mass": ".5f",
        "cosine": ".7f",
    }

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [format(row[name], form) if name in row else "–" for name, form in formats.items()]

    header = ("kept", "bytes", "on disk", "µs", "KL(p‖q)", "lacks", "p(tail)·KL(tail)", "bound", "p(tail)", "cosine")
    return table(header, [[row["kept"], *cells(row)] for row in rows], markdown)


if __name__ == "__main__":
    try:
        main()
    except DistillKitError as error:
        sys.exit(str(error))
