"""Training as a plain loop: the oracle of runs with any options of the trainer."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch

from distillkit import DistillData, DistillModule, Sampling, Student
from distillkit.data.encoding import encode_all
from distillkit.data.records import Source
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import ForwardKL
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Prompt, Reduction
from helpers.models import END_ID
from helpers.runs import QUIET, DoubleStudent, DoubleTeacher, MemoryLogger, UnequalPairs

LEARNING_RATE = 0.2
NEW_TOKENS = 2


@dataclass(frozen=True)
class Options:
    """Options of a run, as a trainer takes them.

    With `interval` (`val_check_interval`) or `every` (`check_val_every_n_epoch`) there are validations; 0 for `every`
    lets `interval` count the batches of all epochs.
    """

    accumulate: int = 1
    limit: int | float | None = None
    overfit: int = 0
    clip: float | None = None
    algorithm: str = "norm"
    max_epochs: int = 2
    max_steps: int = -1
    size: int = 2
    world: int = 1
    reduction: Reduction = "sequence_mean"
    precision: str = "64-true"
    schedule: str = "constant"
    interval: int | float | None = None
    every: int | None = None
    reload: int = 0

    @property
    def validates(self) -> bool:
        return self.interval is not None or self.every is not None

    def batches(self, total: int) -> int:
        """Micro-batches of an epoch that are trained on, of `total`."""
        limit = self.overfit or self.limit
        if limit is None:
            return total
        return min(limit, total) if isinstance(limit, int) else int(limit * total)

    def steps(self, batches: int) -> int:
        """Optimizer steps of the run, with so many micro-batches in an epoch."""
        of_epochs = self.max_epochs * -(-batches // self.accumulate)
        return min([steps for steps in (of_epochs, self.max_steps) if steps >= 0])

    def is_validated(self, epoch: int, batch: int, batches: int) -> bool:
        """True if a validation follows that many micro-batches of an epoch of `batches`."""
        if not self.validates:
            return False
        interval = int(self.interval * batches) if isinstance(self.interval, float) else self.interval or batches
        if self.every == 0:
            return (epoch * batches + batch) % interval == 0
        return (epoch + 1) % (self.every or 1) == 0 and batch % interval == 0

    def trainer(self) -> dict[str, Any]:
        """The trainer's arguments."""
        named = {
            "accumulate_grad_batches": self.accumulate,
            "limit_train_batches": self.limit,
            "overfit_batches": self.overfit,
            "gradient_clip_val": self.clip,
            "gradient_clip_algorithm": self.algorithm if self.clip else None,
            "max_epochs": self.max_epochs,
            "max_steps": self.max_steps,
            "precision": self.precision,
            "val_check_interval": self.interval,
            "reload_dataloaders_every_n_epochs": self.reload,
            "strategy": "ddp" if self.world > 1 else "auto",
            "devices": self.world,
        }
        chosen = {name: value for name, value in named.items() if value is not None}
        return chosen | ({} if self.every is None else {"check_val_every_n_epoch": self.every or None})


@dataclass
class Result:
    """The loss of each step, the student's weights at the end, and the step and KL of each validation."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    held_out: list[tuple[int, float]] = field(default_factory=list)


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(folder: Path, options: Options, **more: Any) -> Result:
    """The run by Lightning, with further arguments of the trainer."""
    logger, double = MemoryLogger(), options.precision == "64-true"
    module = DistillModule(
        (DoubleStudent if double else Student)(str(folder / "student")),
        ForwardKL(reduction=options.reduction),
        (DoubleTeacher if double else TransformersTeacher)(str(folder / "teacher"), dtype="float32"),
        UnequalPairs(),
        TransformersGenerator(progress=False),
        answers=Sampling(temperature=0.0, max_new_tokens=NEW_TOKENS),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE),
        lr_schedule=options.schedule,
        warmup=0.0,
    )
    fixed = {"enable_checkpointing": False, "default_root_dir": folder / "run", "logger": logger}
    trainer = lightning.Trainer(**QUIET | fixed | {"num_sanity_val_steps": 0} | options.trainer() | more)
    held_out = str(folder / "val.jsonl") if options.validates else None
    trainer.fit(module, DistillData(str(folder / "train.jsonl"), held_out, batch_size=options.size))
    figures = [(int(row["step"]), row["val/kl"]) for row in module.history]
    return Result(logger.column("train/loss"), module.student.state_dict(), figures)


def save(folder: str, cases: Sequence[Options]) -> None:
    """Runs whose results are saved; for a process of its own."""
    results = [vars(run(Path(folder), options)) for options in cases]
    torch.save(results, Path(folder) / "ranks.pt")


# ── by hand: no Lightning, no module, no batches, no slices ───────────────────────────────────────────────────────────

Rows = list[list[tuple[list[int], int]]]
"""For each prompt its rows: the tokens, and the place of the first that is trained on."""


def plain(folder: Path, options: Options) -> Result:
    """The same by hand."""
    rows, held_out = _rows(folder, "train"), _prompts(folder, "val")
    student, teacher = load(folder / "student", options.precision), _teacher(folder, options.precision)
    optimizer, result = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE), Result([], student.state_dict())
    per_step, rank_batch = options.accumulate, options.size * options.world
    batches = options.batches(-(-len(rows) // rank_batch))
    total = options.steps(batches)
    held_out = held_out[: options.overfit * rank_batch] if options.overfit else held_out
    for epoch, batch in _micro_batches(batches):
        is_stepping = batch % per_step == 0 or batch == batches
        if is_stepping:
            order = torch.Generator().manual_seed(0 if options.overfit else epoch)
            indices = torch.randperm(len(rows), generator=order).tolist()
            first = (batch - 1) // per_step * per_step
            step_rows = [row for index in indices[first * rank_batch : batch * rank_batch] for row in rows[index]]
            factor = 1 - len(result.losses) / total if options.schedule == "linear" else 1.0
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
            result.losses.append(_step(student, teacher, optimizer, step_rows, options))
        if options.is_validated(epoch, batch, batches):
            result.held_out.append((len(result.losses), _held_out_kl(student, teacher, held_out)))
        if is_stepping and len(result.losses) == total:
            break
    return result


def _micro_batches(batches: int) -> Iterator[tuple[int, int]]:
    """Epoch, and micro-batches of it, again and again."""
    return ((epoch, batch) for epoch in itertools.count() for batch in range(1, batches + 1))


def load(folder: Path, precision: str) -> Any:
    """A model with the weights of a precision."""
    model = Student(str(folder)).load()
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    if dtype == torch.bfloat16:  # the weights alone: rotary frequencies stay in float32
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model
    return model.to(dtype)


def _teacher(folder: Path, precision: str) -> Any:
    return load(folder / "teacher", precision if precision == "64-true" else "32-true").eval()


def _step(student: Any, teacher: Any, optimizer: Any, rows: list[tuple[list[int], int]], options: Options) -> float:
    """An optimizer step on all rows at once; its loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16-mixed"):
        divergences = [_divergences(student, teacher, ids, start) for ids, start in rows]
    if options.reduction == "token_mean":
        loss = torch.cat(divergences).mean()
    else:
        loss = torch.stack([row.mean() for row in divergences]).mean()
    optimizer.zero_grad()
    loss.backward()
    if options.clip and options.algorithm == "norm":
        torch.nn.utils.clip_grad_norm_(student.parameters(), options.clip)
    elif options.clip:
        torch.nn.utils.clip_grad_value_(student.parameters(), options.clip)
    optimizer.step()
    return float(loss.detach())


def _divergences(student: Any, teacher: Any, ids: list[int], start: int) -> torch.Tensor:
    """KL(p‖q) at each position of a row from `start` on."""
    tokens = torch.tensor([ids])
    logits = student(tokens).logits[0, start - 1 : -1]
    with torch.no_grad():
        target = teacher(tokens).logits[0, start - 1 : -1]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    with torch.autocast("cpu", enabled=False):
        logp, logq = target.to(wide).log_softmax(-1), logits.to(wide).log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum(-1)


@torch.no_grad()
def _held_out_kl(student: Any, teacher: Any, prompts: Sequence[Prompt]) -> float:
    """The mean KL at the positions of the teacher's greedy answers."""
    values = []
    for prompt in prompts:
        ids = list(prompt.input_ids)
        while len(ids) < len(prompt.input_ids) + NEW_TOKENS and ids[len(prompt.input_ids) :][-1:] != [END_ID]:
            ids.append(int(teacher(torch.tensor([ids])).logits[0, -1].argmax()))
        values.append(_divergences(student, teacher, ids, len(prompt.input_ids)))
    return float(torch.cat(values).double().mean())


def _prompts(folder: Path, name: str) -> list[Prompt]:
    tokenizer = Student(str(folder / "student")).tokenizer()
    records = Source(str(folder / f"{name}.jsonl")).records()
    limits = {"chat": True, "system": None, "max_length": 2048, "overlong": "error"}
    return list(encode_all(records, tokenizer, (tokenizer.eos_token_id,), **limits)[0])


def _rows(folder: Path, name: str) -> Rows:
    """The two rows of each prompt."""
    curator = UnequalPairs()
    pairs = [[curator._row(prompt, writer) for writer in curator.names] for prompt in _prompts(folder, name)]
    return [[(list(row.input_ids), row.response_mask.index(True)) for row in pair] for pair in pairs]
