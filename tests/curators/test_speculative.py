from pathlib import Path
from typing import Any

import lightning
import pytest

from distillkit import DistillData, DistillModule, Sampling, Student
from distillkit.curators.base import models_of
from distillkit.curators.single import StudentCurator, TeacherCurator
from distillkit.curators.speculative import SpeculativeCurator
from distillkit.errors import ConfigError
from distillkit.generators.speculative.acceptance import Exact, TopK, Typical
from distillkit.generators.speculative.generator import SpeculativeGenerator
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import CrossEntropy, ForwardKL
from distillkit.models.fingerprint import fingerprint
from distillkit.storage.responses import Provenance, ResponseStore
from distillkit.teachers.transformers import TransformersTeacher
from helpers.runs import QUIET, MemoryLogger, save_models, write_prompts

SHORT = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=6)


def test_it_brings_a_generator_that_writes_with_both_models():
    curator = SpeculativeCurator()
    assert curator.writers == frozenset({"speculative"})
    assert curator.own_generators()["speculative"].needs_models == ("student", "teacher")
    assert models_of(curator) == {"student", "teacher"}


@pytest.mark.parametrize(
    ("settings", "rule", "rounds"),
    [
        ({}, Exact(), "once"),
        ({"rounds": "epoch"}, Exact(), "epoch"),
        ({"rule": "top_k"}, TopK(25), "epoch"),
        ({"rule": "top_k", "top_k": 7, "rounds": "once"}, TopK(7), "once"),
        ({"rule": "typical", "epsilon": 0.2, "delta": 0.5, "rounds": {"every": 3}}, Typical(0.2, 0.5), 3),
    ],
)
def test_the_rule_and_its_rounds_are_as_configured(settings, rule, rounds):
    curator = SpeculativeCurator(**settings)
    assert (curator.own_generators()["speculative"].rule, curator.rounds) == (rule, rounds)


def test_settings_reach_the_generator():
    generator = SpeculativeCurator(block=7, batch_size=5, progress=False).own_generators()["speculative"]
    assert (generator.block, generator.batch_size, generator.progress) == (7, 5, False)
    with pytest.raises(ConfigError, match="epsilon belongs to the rule typical, but rule is top_k"):
        SpeculativeCurator("top_k", epsilon=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speculative")
    save_models(root)
    write_prompts(root / "train.jsonl", 4)
    return root


def built(folder: Path, curator: Any, loss: Any = None, teacher: bool = True, **settings: Any) -> DistillModule:
    return DistillModule(
        Student(str(folder / "student")),
        loss or ForwardKL(),
        TransformersTeacher(str(folder / "teacher"), dtype="float32") if teacher else None,
        curator,
        settings.pop("generator", TransformersGenerator(progress=False)),
        **settings,
    )


def fit(folder: Path, root: Path, module: DistillModule) -> MemoryLogger:
    """Two epochs of two steps."""
    logger = MemoryLogger()
    trainer = lightning.Trainer(
        **QUIET, max_epochs=2, default_root_dir=root, logger=logger, num_sanity_val_steps=0, enable_checkpointing=False
    )
    trainer.fit(module, DistillData(str(folder / "train.jsonl"), batch_size=2))
    return logger


def test_a_run_writes_each_epoch_with_the_student_as_it_is_and_logs_the_rate(folder: Path, tmp_path: Path) -> None:
    curator = SpeculativeCurator("top_k", top_k=60, sampling=SHORT, progress=False)
    module = built(folder, curator)
    logger = fit(folder, tmp_path, module)
    assert len(logger.column("train/loss")) == 4
    rates = logger.column("curation/speculative/acceptance")
    assert len(rates) == 4
    assert rates[0] == rates[1]
    assert 0 < rates[0] < 1
    assert rates[-1] == pytest.approx(
        curator.own_generators()["speculative"].acceptance.rate, rel=1e-6
    )  # of the last round
    assert min(logger.column("curation/speculative/tokens_per_check")) >= 1
    student, teacher = Student(str(folder / "student")).load(), module.teacher.model
    shards = ResponseStore(tmp_path / "responses").shards()
    first, second = (shard["model"].split("+") for shard in shards)
    assert first[:2] == [fingerprint(student), fingerprint(teacher)]
    assert first[2].startswith("template:")
    assert first[3:] == ["speculative TopK(k=60) block=4"]
    assert second[1:] == first[1:]
    assert second[0] not in (first[0], fingerprint(module.student))  # neither the first nor the last
    assert [(shard["writer"], shard["round"], shard["responses"]) for shard in shards] == [
        ("speculative", 0, 4),
        ("speculative", 1, 4),
    ]


def test_the_teacher_may_write_with_the_student_as_its_draft(folder: Path, tmp_path: Path) -> None:
    greedy = Sampling(temperature=0.0, max_new_tokens=6)
    drafting = TeacherCurator(greedy, generator=SpeculativeGenerator(progress=False))
    texts = []
    for name, curator in (("alone", TeacherCurator(greedy)), ("drafting", drafting)):
        fit(folder, tmp_path / name, built(folder, curator))
        store = ResponseStore(tmp_path / name / "responses")
        (shard,) = store.shards()
        assert shard["writer"] == "teacher"
        written = store.read(Provenance("teacher", shard["model"], greedy, 0))
        texts.append({prompt_id: response.token_ids for prompt_id, response in written.items()})
    assert texts[0] == texts[1]
    assert len(texts[0]) == 4


def test_without_a_teacher_it_is_refused_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.teacher is missing: SpeculativeCurator needs one"):
        built(folder, SpeculativeCurator(), CrossEntropy(), teacher=False)


def test_as_the_generator_of_a_whole_run_it_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.generator generates for student and teacher, each alone"):
        built(folder, StudentCurator(), generator=SpeculativeGenerator())
