"""A run ends when its budget is spent, its schedules and learning rate with it, and says what it has cost."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import lightning
import pytest

from distillkit import DistillData, DistillModule, Student
from distillkit.callbacks import Budget, FiniteLoss
from distillkit.errors import ConfigError, TrainingError
from distillkit.interfaces import Loss
from distillkit.losses import CrossEntropy, SkewKL
from distillkit.run_folder import ANSWERS, USAGE, read_metrics
from distillkit.schedules import Linear
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.training.lr_schedule import lr_factor
from distillkit.types import Batch, LossOutput
from helpers.runs import QUIET, MemoryLogger, command, save_models, write_config, write_prompts

PROMPTS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("budget")
    save_models(root)
    write_prompts(root / "train.jsonl", PROMPTS, response=True)
    write_prompts(root / "val.jsonl", 2, response=True)
    return root


class Watch(lightning.Callback):
    """Keeps the tokens of each micro-batch, and the learning rate of each step."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.keys: dict[bytes, int] = {}
        self.rates: list[float] = []
        self.validated: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.tokens.append(batch.num_tokens)
        self.keys |= dict(zip(batch.keys, batch.lengths, strict=True))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validated.append(trainer.global_step)


class Moving(SkewKL):
    """A loss with a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.share = Linear(0.0, 0.5)


def fit(
    folder: Path, root: Path, budget: Budget, loss: Loss | None = None, **settings: Any
) -> tuple[DistillModule, Watch, MemoryLogger]:
    teacher = TransformersTeacher(str(folder / "teacher"), dtype="float32") if loss is None else None
    module = DistillModule(
        Student(str(folder / "student")),
        loss or Moving(),
        teacher,
        lr_schedule="linear",
        warmup=0.0,
    )
    watch, logger = Watch(), MemoryLogger()
    options = {"max_epochs": -1, "default_root_dir": root, "logger": logger, "num_sanity_val_steps": 0} | settings
    trainer = lightning.Trainer(**QUIET | options, callbacks=[budget, FiniteLoss(), watch], enable_checkpointing=False)
    data = DistillData(str(folder / "train.jsonl"), str(folder / "val.jsonl"), batch_size=2)
    trainer.fit(module, data)
    return module, watch, logger


def epoch_tokens(folder: Path, tmp_path: Path) -> int:
    """Response tokens of an epoch."""
    _, watch, _ = fit(folder, tmp_path / "epoch", Budget(), CrossEntropy(), max_epochs=1)
    return sum(watch.tokens)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_that_reaches_it_is_the_last(accumulate: int, folder: Path, tmp_path: Path) -> None:
    budget = int(1.5 * epoch_tokens(folder, tmp_path))
    _, watch, _ = fit(folder, tmp_path, Budget(budget), CrossEntropy(), accumulate_grad_batches=accumulate)
    assert sum(watch.tokens) >= budget
    micro = len(watch.tokens)
    of_last_step = 1 if accumulate == 1 or micro % 3 == 0 else 2  # three micro-batches in an epoch
    assert micro > 3
    assert sum(watch.tokens[:-of_last_step]) < budget
    assert len(watch.rates) == micro if accumulate == 1 else len(watch.rates) < micro
    assert watch.validated[-1] == len(watch.rates), "the end is measured"


def test_schedules_and_learning_rate_run_to_its_end(folder: Path, tmp_path: Path) -> None:
    budget = int(1.6 * epoch_tokens(folder, tmp_path))
    module, watch, _ = fit(folder, tmp_path, Budget(budget))
    spent = [sum(watch.tokens[:step]) / budget for step in range(len(watch.tokens))]
    assert watch.rates == pytest.approx([2e-5 * (1 - share) for share in spent])
    assert float(module.loss.share.value) == pytest.approx(0.5)


def test_seconds_end_it_too(folder: Path, tmp_path: Path) -> None:
    _, watch, logger = fit(folder, tmp_path, Budget(seconds=0.3), CrossEntropy())
    spent = logger.column("train/spent_seconds")
    assert spent == sorted(spent)
    assert spent[-1] >= 0.3 > spent[-2]
    assert len(spent) == len(watch.rates)
    assert watch.rates[-1] < 0.7 * watch.rates[0]


def test_so_do_steps_and_the_last_is_validated_in_the_middle_of_an_epoch(folder: Path, tmp_path: Path) -> None:
    _, watch, _ = fit(folder, tmp_path, Budget(steps=4), CrossEntropy())
    assert watch.rates == pytest.approx([2e-5, 1.5e-5, 1e-5, 0.5e-5])
    assert watch.validated == [3, 4]


def test_what_it_has_cost_is_written_down(folder: Path, tmp_path: Path) -> None:
    module, watch, logger = fit(folder, tmp_path, Budget(), max_epochs=2)
    usage = json.loads((tmp_path / USAGE).read_text())
    assert usage["spent_tokens"] == sum(watch.tokens)
    assert logger.column("train/spent_tokens")[-1] == sum(watch.tokens)
    assert usage["distinct_tokens"] == {"dataset": sum(watch.keys.values())}
    assert 2 * usage["distinct_tokens"]["dataset"] == usage["spent_tokens"]
    assert usage["teacher_tokens"] > usage["spent_tokens"], "prompts go through the teacher as well"
    assert usage["spent_seconds"] > usage["curation_seconds"] > 0
    assert module.progress_fn is None


def test_without_a_teacher_none_is_counted(folder: Path, tmp_path: Path) -> None:
    fit(folder, tmp_path, Budget(), CrossEntropy(), max_epochs=1)
    usage = json.loads((tmp_path / USAGE).read_text())
    assert usage["teacher_tokens"] == 0
    assert usage["written_tokens"] == {}


def test_a_killed_run_goes_on_with_what_it_has_spent(folder: Path, tmp_path: Path) -> None:
    def start(name: str, *more: Any) -> list[str]:
        part = {"sampling": {"max_new_tokens": 5}, "rounds": "epoch"}
        config = {
            "trainer": QUIET
            | {
                "default_root_dir": str(tmp_path / name),
                "max_epochs": -1,
                "callbacks": [
                    {"class_path": "RunCheckpoint", "init_args": {"every_n_steps": 2}},
                    {"class_path": "Budget", "init_args": {"tokens": 80}},
                    {"class_path": "Answers", "init_args": {"shown": 0}},
                    *more,
                ],
            },
            "model": {
                "student": {"source": str(folder / "student")},
                "loss": "ForwardKL",
                "teacher": {"class_path": "TransformersTeacher", "init_args": {"source": str(folder / "teacher")}},
                "curator": {"class_path": "StudentCurator", "init_args": part},
                "generator": {"class_path": "TransformersGenerator", "init_args": {"progress": False}},
                "answers": {"temperature": 0.0, "max_new_tokens": 4},
            },
            "data": {"train": str(folder / "train.jsonl"), "val": str(folder / "val.jsonl"), "batch_size": 2},
        }
        return ["fit", "--config", write_config(tmp_path / f"{name}.yaml", config)]

    assert command(start("alone")) == 0
    # After the validation that ends an epoch and the curation of the next, and before a checkpoint knows of either.
    killer = {"class_path": "helpers.killed.KillAfterStep", "init_args": {"step": 3}}
    assert command(start("killed", killer)) == -signal.SIGKILL
    assert command([*start("killed"), "--ckpt_path", "last"]) == 0
    ours, theirs = (json.loads((tmp_path / name / USAGE).read_text()) for name in ("killed", "alone"))
    timed = {"spent_seconds", "curation_seconds"}
    assert {key: own for key, own in ours.items() if key not in timed} == {
        key: own for key, own in theirs.items() if key not in timed
    }
    answers = [(tmp_path / name / ANSWERS).read_text().splitlines() for name in ("killed", "alone")]
    assert answers[0] == answers[1] != [], "none is there twice"
    # One that is resumed when it has spent all goes no further.
    (tmp_path / "killed" / USAGE).unlink()
    assert command([*start("killed"), "--ckpt_path", "last"]) == 0
    again = json.loads((tmp_path / "killed" / USAGE).read_text())
    assert again["spent_tokens"] == ours["spent_tokens"]
    assert again["distinct_tokens"] == ours["distinct_tokens"]
    assert again["written_tokens"] == ours["written_tokens"] != {}
    ours, theirs = (read_metrics(tmp_path / name)["train/spent_tokens"] for name in ("killed", "alone"))
    assert ours == theirs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 1, "seconds": 1.0}, "Budget takes one limit, got tokens and seconds: leave the others out"),
        ({"tokens": 0}, "Budget.tokens must be above 0, got 0"),
        ({"steps": -1}, "Budget.steps must be above 0, got -1"),
        ({"seconds": 0.0}, "Budget.seconds must be above 0, got 0.0"),
        ({"seconds": math.nan}, "Budget.seconds must be above 0, got nan"),
    ],
)
def test_a_budget_that_is_none_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(**settings)


@pytest.mark.parametrize("least", ["min_epochs", "min_steps"])
def test_a_budget_is_not_exceeded_by_a_least_length(least: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.{least} can't be used with a limit in Budget"):
        fit(folder, tmp_path, Budget(5), CrossEntropy(), **{"max_epochs": -1, least: 3})


def test_two_ends_are_one_too_many(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs must be -1 with a limit in Budget, .* got 2"):
        fit(folder, tmp_path, Budget(5), CrossEntropy(), max_epochs=2)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("cosine", [0.0, 0.5, 1.0, 0.5, 0.0]),
    ],
)
def test_the_learning_rate_has_its_shape(shape: Any, expected: list[float]) -> None:
    assert [lr_factor(shape, 0.2, share) for share in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx(expected)


class Broken(CrossEntropy):
    """Its loss is no number in the second step."""

    calls = 0

    def forward(self, student: Any, teacher: Any, batch: Batch) -> LossOutput:
        found = super().forward(student, teacher, batch)
        self.calls += 1
        return LossOutput(found.total * (math.nan if self.calls == 2 else 1.0), found.units, found.metrics)


def test_a_loss_that_is_no_number_ends_the_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="The loss was nan in step 2 on rank 0: lower the learning rate"):
        fit(folder, tmp_path, Budget(), Broken(), max_epochs=1)


def test_a_run_without_an_end_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"Training has no end: set trainer\.max_epochs, trainer\.max_steps, or a Bud"
    ):
        fit(folder, tmp_path, Budget(), CrossEntropy(), max_epochs=-1)
