"""Rounds that are written while the ones before them are trained on."""

import logging
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import lightning
import pyarrow as pa
import pytest
import torch
from lightning import Callback

from distillkit import DistillData, DistillModule, Sampling
from distillkit.curators.paired import PairedCurator
from distillkit.curators.single import StudentCurator, TeacherCurator
from distillkit.errors import ConfigError, GenerationError
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import ReverseKL
from distillkit.models.fingerprint import fingerprint
from distillkit.models.student import Student
from distillkit.storage.responses import ResponseStore
from distillkit.teachers.cached import CachedTeacher
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Prompts, Response
from helpers.runs import QUIET, MemoryLogger, save_models, write_prompts

PROMPTS, BATCH, STEPS = 10, 2, 5
"""Five steps an epoch; rounds of two steps begin at steps 0, 2 and 4 of each."""

SHORT = Sampling(max_new_tokens=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


class Watched(Callback):
    """Keeps the student's fingerprint before each step, and ends the run early if it is told to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.weights: list[str] = []
        self.stop_at = stop_at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(fingerprint(pl_module.student))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trained.set()
        trainer.should_stop = trainer.global_step == self.stop_at


trained = threading.Event()
"""Set once a step is taken; an event can't be a part's own, because the parts of a run are copies."""


class Later(TransformersGenerator):
    """Writes round 0 at once, and later ones not before a step is taken."""

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        if prompts.round > 0 and not trained.wait(60):
            raise GenerationError("Nothing was trained on while this round was to be written.")
        return super().generate(prompts, sampling)


class GivesUp(TransformersGenerator):
    """Writes round 0 alone."""

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        if prompts.round > 0:
            raise GenerationError("The ink ran out.")
        return super().generate(prompts, sampling)


class OneByOne(Later):
    """Each response is a group, and a shard, of its own."""

    responses_per_shard = 1


def run(
    folder: Path,
    models: tuple[str, str],
    generator: Any = None,
    lr: float = 0.1,
    overlap: Any = True,
    stop_at: int | None = None,
    every: int = 2,
    **trainer: Any,
) -> tuple[Watched, MemoryLogger]:
    """Trains on the student's own responses."""
    trained.clear()
    watched, logger = Watched(stop_at), MemoryLogger()
    folder.mkdir(exist_ok=True)
    module = DistillModule(
        Student(models[1], dtype="float32"),
        ReverseKL(),
        TransformersTeacher(models[0], "float32"),
        StudentCurator(SHORT, {"every": every}),
        generator or TransformersGenerator(progress=False),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        lr_schedule="constant",
        warmup=0.0,
        overlap=overlap,
    )
    data = DistillData(write_prompts(folder / "prompts.jsonl", PROMPTS), batch_size=BATCH)
    settings = {"max_epochs": 2, "enable_checkpointing": False} | QUIET | trainer
    lightning.Trainer(default_root_dir=folder, logger=logger, callbacks=[watched], **settings).fit(module, data)
    return watched, logger


def written(folder: Path) -> dict[int, tuple[str, dict[str, list[int]]]]:
    """The student's rounds: the weights that wrote them, and the tokens of each prompt's response."""
    store, found = ResponseStore(folder / "responses"), dict[int, tuple[str, dict[str, list[int]]]]()
    for shard in store.shards():
        with pa.memory_map(str(folder / "responses" / shard["file"])) as source:
            rows = pa.ipc.open_file(source).read_all().to_pylist()
        weights = shard["model"].partition("+")[0]
        _, tokens = found.setdefault(shard["round"], (weights, {}))
        assert weights == found[shard["round"]][0], "one round, one set of weights"
        tokens |= {row["prompt_id"]: row["token_ids"] for row in rows}
    return found


def test_a_step_is_taken_before_the_next_round_is_written(tmp_path: Path, models: tuple[str, str]) -> None:
    # Each of the two waits for the other: without a thread of its own the round would never be written.
    run(tmp_path, models, Later(progress=False), max_epochs=1)
    assert sorted(written(tmp_path)) == [0, 1, 2]


def test_each_round_has_the_weights_of_the_start_of_the_one_before(tmp_path: Path, models: tuple[str, str]) -> None:
    watched, logger = run(tmp_path, models)
    starts = [0, 2, 4, 5, 7, 9]
    assert len(set(watched.weights)) == 2 * STEPS
    found = {number: weights for number, (weights, _) in written(tmp_path).items()}
    expected = [watched.weights[starts[max(0, number - 1)]] for number in range(6)]
    assert [found[number] for number in range(6)] == expected
    assert logger.column("curation/lag") == [0, 0, 2, 2, 2, 1, 1, 2, 2, 2]


def test_rounds_that_wait_for_one_another_have_their_own_weights(tmp_path: Path, models: tuple[str, str]) -> None:
    watched, logger = run(tmp_path, models, overlap=False)
    found = {number: weights for number, (weights, _) in written(tmp_path).items()}
    assert [found[number] for number in range(6)] == [watched.weights[step] for step in (0, 2, 4, 5, 7, 9)]
    assert logger.column("curation/lag") == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_weights_that_stay_write_the_same_ahead_as_in_turn(
    precision: str, tmp_path: Path, models: tuple[str, str]
) -> None:
    # A run in bf16 changes torch's default type while a step is taken, for all threads.
    for name, overlap in (("ahead", True), ("in turn", False)):
        run(tmp_path / name, models, lr=0.0, overlap=overlap, every=1, precision=precision)
    ahead, in_turn = written(tmp_path / "ahead"), written(tmp_path / "in turn")
    assert len(ahead) == 2 * STEPS
    assert ahead == in_turn
    assert len({str(tokens) for _, own in ahead.values() for tokens in own.values()}) > PROMPTS, "they are drawn"


@pytest.mark.parametrize(
    ("limits", "rounds"),
    [
        ({"max_epochs": 1}, 3),
        ({"max_epochs": -1, "max_steps": 6}, 4),
        ({"max_epochs": 2, "limit_train_batches": 2}, 2),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 4),
    ],
)
def test_no_round_is_written_that_is_not_trained_on(
    limits: dict[str, int], rounds: int, tmp_path: Path, models: tuple[str, str]
) -> None:
    watched, _ = run(tmp_path, models, **limits)
    assert len(watched.weights) > 0
    assert len(written(tmp_path)) == rounds


def test_an_error_in_writing_is_raised_when_the_round_is_asked_for(tmp_path: Path, models: tuple[str, str]) -> None:
    with pytest.raises(GenerationError, match="The ink ran out"):
        run(tmp_path, models, GivesUp(progress=False))
    assert list(written(tmp_path)) == [0]
    assert not any(thread.name.startswith("round") for thread in threading.enumerate())


def test_a_run_that_ends_early_stops_the_writing(tmp_path: Path, models: tuple[str, str]) -> None:
    run(tmp_path, models, OneByOne(progress=False), stop_at=1, every=5)
    counts = Counter({number: len(own) for number, (_, own) in written(tmp_path).items()})
    assert counts[0] == PROMPTS
    assert counts[1] < PROMPTS
    assert not any(thread.name.startswith("round") for thread in threading.enumerate())


def test_the_lag_and_the_wait_are_said(
    tmp_path: Path, models: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="distillkit.rollouts.rounds"):
        run(tmp_path, models, max_epochs=1)
    said = [text for text in map(logging.LogRecord.getMessage, caplog.records) if text.startswith("Round")]
    assert [text.split(" was generated")[0] for text in said] == ["Round 0", "Round 1", "Round 2"]
    assert "with weights that lag by 2 steps; training waited for" in said[1]


def module(models: tuple[str, str], curator: Any, overlap: Any, cached: dict[str, Any] | None = None) -> DistillModule:
    teacher: Any = TransformersTeacher(models[0], "float32")
    if cached is not None:
        teacher = CachedTeacher(teacher, **cached)
    return DistillModule(Student(models[1]), ReverseKL(), teacher, curator, overlap=overlap)


@pytest.mark.parametrize(
    ("curator", "overlap", "message"),
    [
        (TeacherCurator(), True, "TeacherCurator generates only once: leave model.overlap out"),
        (StudentCurator(), "gpu number one", "must be true, false or a device such as cuda:1, got 'gpu number one'"),
    ],
)
def test_what_cannot_be_written_ahead_is_refused(
    curator: Any, overlap: Any, message: str, models: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        module(models, curator, overlap)


def test_a_teacher_that_leaves_the_memory_cannot_write_meanwhile(tmp_path: Path, models: tuple[str, str]) -> None:
    anew = PairedCurator(TeacherCurator(rounds="epoch"), StudentCurator())
    settings: dict[str, Any] = {"keep": "top_k", "k": 4, "folder": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"CachedTeacher is unloaded then: set model\.teacher\.unload to false"):
        module(models, anew, True, settings)
    module(models, anew, True, settings | {"unload": False})
    module(models, PairedCurator(), True, settings)  # the teacher's half is written before the first step
