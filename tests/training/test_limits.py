"""A run that is cut short generates what it uses, and one with `fast_dev_run` leaves a finished run as it is."""

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import lightning
import pytest
import torch

from distillkit import DistillData, DistillModule, Sampling, Student
from distillkit.curators.paired import PairedCurator
from distillkit.curators.single import StudentCurator, TeacherCurator
from distillkit.errors import StoreError
from distillkit.generators.transformers import TransformersGenerator
from distillkit.interfaces import Curator, Generator
from distillkit.losses import ForwardKL
from distillkit.storage.responses import ResponseStore
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Prompts, Response
from helpers.runs import QUIET, MemoryLogger, command, save_models, write_config, write_prompts

PROMPTS, HELD_OUT = 20, 5
SHORT = Sampling(max_new_tokens=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("limits")
    save_models(root)
    write_prompts(root / "train.jsonl", PROMPTS)
    write_prompts(root / "val.jsonl", HELD_OUT)
    return root


class Counting(TransformersGenerator):
    """Counts what it and its copies generate."""

    counts: ClassVar[list[int]] = []

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        self.counts.append(len(prompts))
        return super().generate(prompts, sampling)


def fit(
    folder: Path, root: Path, curator: Curator, val: bool = False, generator: Generator | None = None, **options: Any
) -> DistillModule:
    """A run with batches of two; its losses are in its logger."""
    module = DistillModule(
        Student(str(folder / "student")),
        ForwardKL(),
        TransformersTeacher(str(folder / "teacher"), dtype="float32"),
        curator,
        generator or TransformersGenerator(progress=False),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lr_schedule="constant",
        warmup=0.0,
        answers=Sampling(temperature=0.0, max_new_tokens=3),
        overlap=options.pop("overlap", False),
    )
    checkpoint = options.pop("ckpt_path", None)
    fixed = {"enable_checkpointing": False, "default_root_dir": root, "logger": MemoryLogger()}
    data = DistillData(
        str(folder / "train.jsonl"), str(folder / "val.jsonl") if val else None, batch_size=2, eval_batch_size=2
    )
    lightning.Trainer(**QUIET | fixed | options).fit(module, data, ckpt_path=checkpoint)
    return module


def written(root: Path) -> Counter[str]:
    """Responses in the store by writer."""
    count: Counter[str] = Counter()
    for shard in ResponseStore(root / "responses").shards():
        count[shard["writer"]] += shard["responses"]
    return count


LIMITED = {
    "two steps": ({"max_steps": 2}, 4),
    "two steps of two": ({"max_steps": 2, "accumulate_grad_batches": 2}, 8),
    "two steps, epochs without end": ({"max_steps": 2, "max_epochs": -1}, 4),
    "a step beyond an epoch": ({"max_steps": 11}, PROMPTS),
    "a try": ({"fast_dev_run": True}, 2),
    "a try of three": ({"fast_dev_run": 3}, 6),
    "one batch of an epoch": ({"limit_train_batches": 1, "max_epochs": 1}, 2),
    "one batch, over and over": ({"overfit_batches": 1, "max_epochs": 3}, 2),
    "all": ({"max_epochs": 1}, PROMPTS),
}


@pytest.mark.parametrize("rounds", ["once", "epoch"])
@pytest.mark.parametrize("name", LIMITED)
def test_responses_are_generated_for_the_steps_that_are_taken(
    name: str, rounds: str, folder: Path, tmp_path: Path
) -> None:
    options, count = LIMITED[name]
    if (name, rounds) == ("one batch, over and over", "epoch"):
        count = 6  # the responses of each of three epochs
    if (name, rounds) == ("a step beyond an epoch", "epoch"):
        count = PROMPTS + 2
    module = fit(folder, tmp_path, TeacherCurator(SHORT, rounds), **options)
    assert written(tmp_path) == {"teacher": count}
    assert module.trainer.global_step > 0


def test_several_epochs_use_the_prompts_of_all_of_them(folder: Path, tmp_path: Path) -> None:
    fit(folder, tmp_path, TeacherCurator(SHORT), limit_train_batches=2, max_epochs=2)
    orders = [torch.randperm(PROMPTS, generator=torch.Generator().manual_seed(epoch)).tolist() for epoch in (0, 1)]
    assert written(tmp_path) == {"teacher": len({*orders[0][:4], *orders[1][:4]})}


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_that_is_cut_short_takes_the_first_steps_of_the_whole(
    overlap: bool, folder: Path, tmp_path: Path
) -> None:
    losses = []
    for options in ({"max_epochs": 1}, {"max_steps": 3}):
        curator = PairedCurator(TeacherCurator(SHORT), StudentCurator(SHORT, "epoch"))
        module = fit(folder, tmp_path / str(len(losses)), curator, overlap=overlap, **options)
        losses.append(module.trainer.logger.column("train/loss"))
    assert written(tmp_path / "1") == {"teacher": 6, "student": 6}
    assert losses[1] == pytest.approx(losses[0][:3], rel=1e-5)


def test_a_run_that_was_cut_short_is_trained_further(folder: Path, tmp_path: Path) -> None:
    def trained(root: Path, **options: Any) -> list[float]:
        return fit(folder, root, TeacherCurator(SHORT), **options).trainer.logger.column("train/loss")

    whole = trained(tmp_path / "whole", max_epochs=1)
    first = fit(folder, tmp_path / "cut", TeacherCurator(SHORT), max_steps=2)
    first.trainer.save_checkpoint(tmp_path / "cut.ckpt")
    assert written(tmp_path / "cut") == {"teacher": 4}
    rest = trained(tmp_path / "cut", max_epochs=1, ckpt_path=tmp_path / "cut.ckpt")
    assert written(tmp_path / "cut") == {"teacher": PROMPTS}
    assert [*first.trainer.logger.column("train/loss"), *rest] == pytest.approx(whole, rel=1e-5)


def test_a_round_of_the_student_that_was_cut_short_is_not_written_by_other_weights(
    folder: Path, tmp_path: Path
) -> None:
    first = fit(folder, tmp_path, StudentCurator(SHORT, "epoch"), max_steps=2)
    first.trainer.save_checkpoint(tmp_path / "cut.ckpt")
    with pytest.raises(
        StoreError, match=r"lacks responses of round 0 by student.*trainer\.max_steps ends within a round"
    ):
        fit(folder, tmp_path, StudentCurator(SHORT, "epoch"), max_epochs=1, ckpt_path=tmp_path / "cut.ckpt")


@pytest.mark.parametrize(("limit", "count"), [(1, 2), (2, 4), (9, 5), (0.5, 2), (1.0, 5), (0, 0)])
def test_answers_are_generated_for_the_held_out_batches_that_are_used(
    limit: float, count: int, folder: Path, tmp_path: Path
) -> None:
    Counting.counts.clear()
    options = {"max_steps": 1, "limit_val_batches": limit, "val_check_interval": 1, "num_sanity_val_steps": -1}
    module = fit(folder, tmp_path, TeacherCurator(SHORT), True, Counting(progress=False), **options)
    assert written(tmp_path) == {"teacher": 2 + count}
    assert len(module.held_out.table) == count
    assert sum(Counting.counts) == 2 + 3 * count, "references once, and answers before and after the step"


def test_a_try_leaves_a_finished_run_as_it_is(folder: Path, tmp_path: Path) -> None:
    parts = [{"class_path": name} for name in ("RunCheckpoint", "Export", "Answers", "Budget", "FiniteLoss")]
    config = {
        "trainer": QUIET | {"default_root_dir": str(tmp_path / "run"), "max_steps": 2, "callbacks": parts},
        "model": {
            "student": {"source": str(folder / "student")},
            "teacher": {"class_path": "TransformersTeacher", "init_args": {"source": str(folder / "teacher")}},
            "loss": {"class_path": "ForwardKL"},
            "curator": {"class_path": "TeacherCurator", "init_args": {"sampling": {"max_new_tokens": 3}}},
            "answers": {"temperature": 0.0, "max_new_tokens": 3},
        },
        "data": {"train": str(folder / "train.jsonl"), "val": str(folder / "val.jsonl"), "batch_size": 2},
    }
    arguments = ["fit", "--config", write_config(tmp_path / "config.yaml", config)]
    assert command(arguments) == 0
    before = files(tmp_path / "run")
    assert {"config.yaml", "answers.jsonl", "usage.json", "export/model.safetensors"} <= before.keys()
    assert written(tmp_path / "run") == {"teacher": 4 + HELD_OUT}
    again = ["--trainer.fast_dev_run=3", "--model.loss=ReverseKL", "--trainer.max_steps=-1"]
    assert command([*arguments, *again]) == 0
    assert files(tmp_path / "run") == before
    assert written(tmp_path / "run") == {"teacher": 6 + HELD_OUT}


def files(root: Path) -> dict[str, tuple[int, bytes]]:
    """The files of a run but its responses and its log, and when each was written."""
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {
        name: (path.stat().st_mtime_ns, path.read_bytes())
        for name, path in found.items()
        if not name.startswith("responses") and "lock" not in name and name != "run.log"
    }
