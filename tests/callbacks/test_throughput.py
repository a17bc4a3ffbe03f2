"""What is logged about speed, of runs in which each micro-batch takes half a second."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest

from distillkit import DistillData, DistillModule, Student
from distillkit.callbacks import Throughput, throughput
from distillkit.callbacks.flops import ModelFlops, model_flops
from distillkit.interfaces import Loss, Teacher
from distillkit.losses import CrossEntropy, SkewKL
from distillkit.models.heads import logits_width
from distillkit.teachers.cached import CachedTeacher
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Batch
from helpers.runs import QUIET, MemoryLogger, save_models, write_prompts

SECONDS = 0.5
RATE = 1e9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("throughput")
    save_models(root)
    write_prompts(root / "train.jsonl", 10, response=True)
    write_prompts(root / "val.jsonl", 2, response=True)
    return root


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A clock that moves by half a second each time it is looked at, and a device of a known rate."""
    ticks = itertools.count()
    monkeypatch.setattr(throughput, "_mark", lambda device: SECONDS * next(ticks))
    monkeypatch.setattr(throughput, "matrix_rate", lambda device, dtype: (RATE, 8))
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "cache"))


class Batches(lightning.Callback):
    """Keeps the batches that were trained on."""

    def __init__(self) -> None:
        self.seen: list[Batch] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.seen.append(batch)


def fit(
    folder: Path, root: Path, teacher: Teacher, loss: Loss | None = None, layout: Any = "shared", **settings: Any
) -> tuple[DistillModule, list[Batch], MemoryLogger]:
    """An epoch of five micro-batches of two prompts, two to an optimizer step."""
    module = DistillModule(Student(str(folder / "student")), loss or SkewKL(), teacher)
    logger, batches = MemoryLogger(), Batches()
    options = {"max_epochs": 1, "default_root_dir": root, "logger": logger, "accumulate_grad_batches": 2} | settings
    trainer = lightning.Trainer(**QUIET | options, callbacks=[Throughput(), batches], enable_checkpointing=False)
    trainer.fit(module, DistillData(str(folder / "train.jsonl"), batch_size=2, layout=layout))
    assert [len(batch.lengths) for batch in batches.seen] == [2] * 5
    return module, batches.seen, logger


def live(folder: Path) -> TransformersTeacher:
    return TransformersTeacher(str(folder / "teacher"), dtype="float32")


def by_step(of: Callable[[Batch], float], batches: list[Batch]) -> list[float]:
    """What is logged after each of the three optimizer steps, a second, a second and half a second long."""
    values = [of(batch) for batch in batches]
    return [sum(values[start : start + 2]) / (SECONDS * len(values[start : start + 2])) for start in (0, 2, 4)]


def test_speeds_are_those_of_the_optimizer_steps(folder: Path, tmp_path: Path) -> None:
    module, batches, logger = fit(folder, tmp_path, live(folder))
    assert logger.column("train/tokens_per_s") == by_step(lambda batch: batch.num_tokens, batches)
    lines = by_step(lambda batch: batch.packed.input_ids.numel(), batches)
    assert logger.column("train/body_tokens_per_s") == lines
    costs = (model_flops(module.student, trained=True), model_flops(module.teacher.model, trained=False))
    percent = by_step(lambda batch: 100 * sum(cost.of(batch) for cost in costs) / RATE, batches)
    assert logger.column("train/mfu") == pytest.approx(percent, rel=1e-6)
    assert all(value > 0 for value in percent)
    memory = logger.column("train/peak_memory_gb")
    assert len(memory) == 3
    assert 0.1 < memory[0] <= memory[-1] < 1000


def test_they_are_means_over_the_log_interval(folder: Path, tmp_path: Path) -> None:
    _, batches, logger = fit(folder, tmp_path, live(folder), log_every_n_steps=2)
    mean = sum(batch.num_tokens for batch in batches[:4]) / (4 * SECONDS)
    assert logger.column("train/tokens_per_s") == [mean]
    assert len(logger.column("train/mfu")) == 1


def test_padding_goes_through_the_body(folder: Path, tmp_path: Path) -> None:
    _, batches, logger = fit(folder, tmp_path, live(folder), layout="padded")
    assert logger.column("train/body_tokens_per_s") == by_step(lambda batch: batch.input_ids.numel(), batches)


@pytest.mark.parametrize("keep", ["hidden", "top_k"])
def test_a_teacher_whose_scores_are_kept_costs_its_head_at_most_and_is_not_loaded(
    keep: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CachedTeacher, "model", property(lambda _: pytest.fail("the model was loaded")))
    teacher = CachedTeacher(live(folder), keep=keep, k=8)
    module, batches, logger = fit(folder, tmp_path, teacher)
    head = 2.0 * 32 * logits_width(module.student) if keep == "hidden" else 0.0
    costs = (model_flops(module.student, trained=True), ModelFlops(position=head))
    percent = by_step(lambda batch: 100 * sum(cost.of(batch) for cost in costs) / RATE, batches)
    assert logger.column("train/mfu") == pytest.approx(percent, rel=1e-6)
    assert teacher.teacher.model is None


def test_a_teacher_that_the_loss_does_not_ask_costs_nothing(folder: Path, tmp_path: Path) -> None:
    module, batches, logger = fit(folder, tmp_path, live(folder), CrossEntropy())
    cost = model_flops(module.student, trained=True)
    percent = by_step(lambda batch: 100 * cost.of(batch) / RATE, batches)
    assert logger.column("train/mfu") == pytest.approx(percent, rel=1e-6)


def test_the_products_are_measured_in_the_precision_of_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(throughput, "matrix_rate", lambda *what: asked.append(what) or (RATE, 8))
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        fit(folder, tmp_path / precision, live(folder), precision=precision)
    assert [str(dtype) for _, dtype in asked] == ["torch.float32", "torch.bfloat16", "torch.bfloat16"]
