"""Checks of a run's models, before anything is generated or trained."""

import json
import logging
from pathlib import Path

import lightning
import pytest
import torch
from transformers import AutoModelForCausalLM

from distillkit import DistillData, DistillModule, Sampling, Student
from distillkit.callbacks import Export
from distillkit.curators.best_of_n import BestOfN
from distillkit.curators.filtered import FilteredCurator
from distillkit.curators.mixed import MixedCurator
from distillkit.curators.paired import PairedCurator
from distillkit.curators.single import DatasetCurator, StudentCurator, TeacherCurator
from distillkit.errors import ModelError, PluginError
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import CrossEntropy, DistiLLM2, ForwardKL, WeightedSum
from distillkit.storage.responses import ResponseStore
from distillkit.testing import BigramTeacher
from distillkit.testing.families import tiny_family
from distillkit.training.checks import check_parts
from distillkit.verifiers.length import TargetLength
from helpers.models import tiny_tokenizer
from helpers.runs import QUIET, write_prompts

TOKENIZER = tiny_tokenizer()
SHORT = Sampling(temperature=0.0, max_new_tokens=4)


def saved(folder: Path, name: str, **settings: object) -> str:
    tiny_family(name, vocab_size=len(TOKENIZER), **settings).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def fit(
    tmp_path: Path, student: Student, curator=None, answers=SHORT, count=4, callbacks=(), loss=None
) -> DistillModule:
    module = DistillModule(
        student,
        loss or CrossEntropy(),
        curator=curator or DatasetCurator(),
        generator=TransformersGenerator(progress=False),
        answers=answers,
    )
    prompts = write_prompts(tmp_path / "train.jsonl", count, response=True)
    data = DistillData(prompts, prompts, batch_size=2, chat=False)
    options = QUIET | {
        "max_epochs": 1,
        "default_root_dir": tmp_path / "run",
        "logger": False,
        "num_sanity_val_steps": 0,
    }
    lightning.Trainer(**options, enable_checkpointing=False, callbacks=list(callbacks)).fit(module, data)
    return module


def test_a_row_past_the_positions_ends_the_run_before_it_begins(tmp_path):
    student = Student(saved(tmp_path / "student", "gpt2", n_positions=8))
    with pytest.raises(ModelError, match=r"student .* has 8 positions, and the longest row of data\.train takes"):
        fit(tmp_path, student)


def test_new_tokens_past_the_positions_end_the_run_before_it_begins(tmp_path):
    student = Student(saved(tmp_path / "student", "gpt2"))
    with pytest.raises(
        ModelError, match=r"the longest prompt of data\.train with 200 new tokens .max_new_tokens. takes"
    ):
        fit(tmp_path, student, StudentCurator(Sampling(max_new_tokens=200)))
    with pytest.raises(ModelError, match=r"the longest prompt of data\.val with 100 new tokens"):
        fit(tmp_path, student, answers=Sampling(max_new_tokens=100))
    assert not (tmp_path / "run" / "responses").exists()


def test_rotary_models_go_past_theirs_with_one_warning(tmp_path, caplog):
    student = Student(saved(tmp_path / "student", "llama", max_position_embeddings=8))
    with caplog.at_level(logging.WARNING, logger="distillkit"):
        fit(tmp_path, student)
    warnings = [record.getMessage() for record in caplog.records if "max_position_embeddings" in record.getMessage()]
    assert any("the longest row of data.train takes" in warning for warning in warnings)
    assert len(warnings) == len(set(warnings))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "opt", "mamba2", "lfm2"])
def test_a_pruned_student_of_any_family_trains_and_is_exported(name, tmp_path):
    student = Student(saved(tmp_path / "student", name), keep_layers=[0, 2, 3] if name != "lfm2" else [0, 1])
    module = fit(tmp_path, student, callbacks=[Export()])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    ids = torch.tensor([TOKENIZER("What is very 3?").input_ids])
    with torch.no_grad():
        assert torch.equal(exported(input_ids=ids).logits, module.student.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("name", "description"),
    [("llama", "TransformersGenerator"), ("rwkv", "TransformersGenerator (without a cache)")],
)
def test_the_store_notes_how_responses_were_generated(name, description, tmp_path):
    fit(tmp_path, Student(saved(tmp_path / "student", name)), StudentCurator(SHORT))
    (generator,) = {shard["generator"] for shard in ResponseStore(tmp_path / "run" / "responses").shards()}
    assert generator == description


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = tiny_family("llama", vocab_size=len(TOKENIZER))
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "student")
    TOKENIZER.save_pretrained(tmp_path / "student")
    message = r"its tensor model\.layers\.2\.mlp\.up_proj\.weight has entries that are NaN or infinite"
    with pytest.raises(ModelError, match=message):
        fit(tmp_path, Student(str(tmp_path / "student")))
    assert json.loads((tmp_path / "student" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("curator", "missing"),
    [
        (PairedCurator(TeacherCurator(), DatasetCurator()), "no response of PairedCurator is the student's"),
        (StudentCurator(), "no response of StudentCurator is of another writer than the student"),
        (PairedCurator(), None),
    ],
)
def test_a_contrast_of_which_one_side_is_missing_is_warned_of(curator, missing, caplog):
    teacher, answers = BigramTeacher(seed=1), Sampling(temperature=0.0)
    for loss in (DistiLLM2(), WeightedSum([CrossEntropy(), DistiLLM2()], [1.0, 1.0])):
        caplog.clear()
        check_parts(loss, teacher, curator, TransformersGenerator(), answers)
        assert sum(" contrasts " in message for message in caplog.messages) == (missing is not None)
        assert missing is None or missing in caplog.messages[0]
    caplog.clear()
    check_parts(ForwardKL(), teacher, curator, TransformersGenerator(), answers)
    assert not caplog.messages


def test_a_loss_whose_units_are_of_another_shape_is_named(tmp_path):
    class Doubled(CrossEntropy):
        def units(self, batch):
            return super().units(batch).repeat(2)

    message = r"^Doubled: `forward` returns a total of shape \[\] and `units` one of shape \[2\]"
    with pytest.raises(PluginError, match=message):
        fit(tmp_path, Student(saved(tmp_path / "student", "llama")), loss=Doubled())


@pytest.mark.parametrize(
    ("make", "warns"),
    [
        (StudentCurator, True),
        (PairedCurator, True),
        (lambda: MixedCurator([StudentCurator(), DatasetCurator()], [0.5, 0.5]), True),
        (lambda: MixedCurator([BestOfN(StudentCurator(), TargetLength(5)), DatasetCurator()], [0.5, 0.5]), False),
        (lambda: FilteredCurator(StudentCurator()), False),
        (TeacherCurator, False),
        (DatasetCurator, False),
    ],
)
@pytest.mark.parametrize("loss", [CrossEntropy(), WeightedSum([ForwardKL(), CrossEntropy()], [1.0, 0.1])])
def test_cross_entropy_on_what_the_student_generates_itself_is_warned_of(make, warns, loss, caplog):
    with caplog.at_level(logging.WARNING):
        check_parts(loss, BigramTeacher(seed=1), make(), TransformersGenerator(), SHORT)
    assert ("learns to repeat itself" in caplog.text) is warns
