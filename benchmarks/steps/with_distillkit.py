"""Distillkit in the step's benchmark: the module, the loader and the loss as users have them, on given rows."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning import Callback, Trainer

from distillkit import DistillModule, Student
from distillkit.data import Layout
from distillkit.interfaces import Curator, Loss
from distillkit.losses import ForwardKL
from distillkit.models import logits_width
from distillkit.teachers import TransformersTeacher
from distillkit.training import DistillData
from distillkit.types import Prompt, Prompts, Row
from steps.clock import StepClock
from steps.workload import ADAMW, Example, Setup, examples, has_weights, load_model


def fit(
    setup: Setup,
    clock: StepClock,
    cached: bool = False,
    layout: Layout = "shared",
    loss: Loss | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """DistillModule under Lightning's Trainer.

    Args:
        setup: What is run.
        clock: What it is measured with.
        cached: Whether the teacher's hidden states are read from the disk; they are written where they are missing.
        layout: How the models get a batch, as in `DistillData`.
        loss: The loss; None is `ForwardKL` with its mean over the tokens.
        callbacks: Further callbacks of the trainer.
    """
    accelerator = {"cpu": "cpu", "cuda": "gpu"}[setup.device]
    teacher: Any = _teacher(setup)
    if cached:
        from distillkit.teachers import CachedTeacher

        teacher = CachedTeacher(teacher=teacher, keep="hidden", folder=setup.path("cache"))
    rows = examples(setup)
    module = DistillModule(
        student=_student(setup),
        teacher=teacher,
        loss=loss or ForwardKL(reduction="token_mean"),
        curator=GivenPairs(rows),
        optimizer=partial(torch.optim.AdamW, **ADAMW),
        lr_schedule="constant",
        warmup=0.0,
    )
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        precision=setup.precision,
        max_epochs=1,
        accumulate_grad_batches=setup.micro_batches,
        callbacks=[_Ends(clock), *callbacks],
        default_root_dir=setup.path("distillkit"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, GivenData(rows, setup.rows // 2 // setup.micro_batches, layout))


def as_row(example: Example) -> Row:
    """An example as curators hand it over."""
    prompt, response, writer, prompt_id = example
    return Row((*prompt, *response), (False,) * len(prompt) + (True,) * len(response), writer, prompt_id)


class GivenPairs(Curator):
    """Rows that were written before, two for each prompt."""

    def __init__(self, rows: Sequence[Example]) -> None:
        super().__init__()
        self.rows: dict[str, list[Row]] = {}
        for row in rows:
            self.rows.setdefault(row.prompt_id, []).append(as_row(row))

    @property
    def rounds(self) -> str:
        return "once"

    @property
    def writers(self) -> frozenset[str]:
        return frozenset()

    def curate(self, prompts: Prompts, generators: Mapping[str, Any]) -> list[Row]:
        """The rows of the prompts."""
        return [row for prompt in prompts for row in self.rows[prompt.id]]


class GivenData(DistillData):
    """The prompts of given rows, in their order; batches are made as ever."""

    def __init__(self, rows: Sequence[Example], batch_size: int, layout: Layout) -> None:
        super().__init__(train="given", batch_size=batch_size, shuffle=False, layout=layout)
        by_id = {row.prompt_id: Prompt(row.prompt_id, (), tuple(row.prompt)) for row in rows}
        self._prompts = Prompts(tuple(by_id.values()))

    def prepare_data(self) -> None:
        """There is no file."""

    def setup(self, stage: str) -> None:
        """There is nothing to tokenise or to validate with."""
        assert self.trainer is not None
        self.prompts, self.trainer.limit_val_batches = {"train": self._prompts}, 0


class _Ends(Callback):
    """Tells the clock where a step begins and ends; its loss is the sum over its micro-batches."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self._loss: Any = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._loss = self._loss + outputs["loss"].detach()
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.clock.end(self._loss)
            self._loss = 0.0


class _DrawnStudent(Student):
    """A student whose weights are drawn."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup.path("student"))
        self.setup = setup

    def load(self) -> Any:
        return load_model(self.setup, "student").train()


class _DrawnTeacher(TransformersTeacher):
    """A teacher whose weights are drawn."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup.path("teacher"), setup.teacher_dtype)  # type: ignore[arg-type]
        self._setup = setup

    def setup(self, device: torch.device) -> None:
        if self._model is None:
            model = load_model(self._setup, "teacher").to(device)
            self._model, self._vocab = model.eval().requires_grad_(False), logits_width(model)


def _student(setup: Setup) -> Student:
    folder = setup.path("student")
    dtype: Any = setup.student_dtype
    return Student(folder, dtype=dtype) if has_weights(folder) else _DrawnStudent(setup)


def _teacher(setup: Setup) -> TransformersTeacher:
    folder = setup.path("teacher")
    dtype: Any = setup.teacher_dtype
    return TransformersTeacher(folder, dtype) if has_weights(folder) else _DrawnTeacher(setup)
