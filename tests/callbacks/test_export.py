"""The exported folder is the trained model, can be read by others, and appears only when that is so."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from distillkit import DistillData, DistillModule, Lora, Student
from distillkit.callbacks import Export
from distillkit.errors import ConfigError, ModelError
from distillkit.losses import CrossEntropy
from distillkit.models.export import write_merged
from distillkit.models.options import DEFAULT
from distillkit.models.scoring import base_model
from helpers.models import END_ID, save_tiny, tiny_tokenizer
from helpers.runs import QUIET, write_prompts

TOKENS = torch.arange(2, 14).reshape(2, 6)


def fit(root: Path, student: Student, export: Export | None = None) -> DistillModule:
    """One step on two rows, and its export."""
    data = DistillData(write_prompts(root / "train.jsonl", 2, response=True), batch_size=2)
    module = DistillModule(student, CrossEntropy())
    options = QUIET | {"max_epochs": 1, "default_root_dir": root, "logger": False}
    lightning.Trainer(**options, callbacks=[export or Export()]).fit(module, data)
    return module


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def changed(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_generation_config_that_transformers_refuses_to_save_is_exported_without_what_has_no_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = save_tiny(tmp_path / "source")
    changed(source / "generation_config.json", do_sample=False, temperature=0.9, output_scores=True)
    with caplog.at_level(logging.INFO, "distillkit"):
        fit(tmp_path, Student(str(source)))
    exported = GenerationConfig.from_pretrained(tmp_path / "export")
    exported.validate(strict=True)
    assert (exported.temperature, exported.output_scores, exported.eos_token_id) == (None, None, END_ID)
    assert "sets temperature, output_scores without effect; the export does not." in caplog.text


def test_a_generation_config_with_a_fault_is_refused_before_training(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    changed(source / "generation_config.json", num_return_sequences=2)
    with pytest.raises(ModelError, match=r"source: the generation config can't be loaded.*num_return_sequences"):
        fit(tmp_path, Student(str(source)))


def test_an_export_has_the_type_of_its_source_and_no_token_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, tokenizer = save_tiny(tmp_path / "source", dtype="bfloat16"), tiny_tokenizer()
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(source)
    with caplog.at_level(logging.INFO, "distillkit"):
        module = fit(tmp_path, Student(str(source)))
    assert module.tokenizer.pad_token_id == END_ID, "a run needs one"
    assert AutoTokenizer.from_pretrained(tmp_path / "export").pad_token is None
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert again.dtype == torch.bfloat16
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (source, tmp_path / "export")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert torch.equal(again.model.norm.weight, module.student.model.norm.weight.bfloat16())
    assert "The export is in bfloat16" in caplog.text


def test_others_can_read_the_exported_files_and_their_type_is_a_choice(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        module = fit(tmp_path, Student(str(save_tiny(tmp_path / "source"))), Export(dtype="float16"))
    finally:
        os.umask(before)
    files = list((tmp_path / "export").iterdir())
    assert "model.safetensors" in {file.name for file in files}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    assert (tmp_path / "export").stat().st_mode & 0o777 == 0o755
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert again.dtype == torch.float16
    torch.testing.assert_close(logits(again).float(), logits(module.student), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("options", "head"),
    [
        ({"max_epochs": 1, "num_sanity_val_steps": -1}, "| metric | before | after |"),
        ({"max_steps": 3, "num_sanity_val_steps": -1}, "| metric | before | at step 2 of 3 |"),
        ({"max_epochs": 2}, "| metric | at step 2 of 4 | after |"),
        ({"max_steps": 1, "num_sanity_val_steps": -1}, "| metric | before |"),
    ],
)
def test_the_card_says_of_which_step_its_metrics_are(options: dict[str, int], head: str, tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "train.jsonl", 2, response=True)
    module = DistillModule(Student(str(save_tiny(tmp_path / "source"))), CrossEntropy())
    fixed = QUIET | {"default_root_dir": tmp_path, "logger": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(**fixed, **({"num_sanity_val_steps": 0} | options), callbacks=[Export()])
    trainer.fit(module, DistillData(rows, rows, batch_size=1))
    lines = (tmp_path / "export" / "README.md").read_text().splitlines()
    start = lines.index(head)
    assert len({line.count("|") for line in lines[start : start + 4]}) == 1
    (row,) = [line for line in lines[start:] if line.startswith("| student's NLL of the reference responses")]
    assert f"{module.history[-1]['val/nll']:.4g} |" in row
    assert "The reference responses are the gold responses of the data." in lines
    assert str(tmp_path) not in "\n".join(lines)
    (training,) = [line for line in lines if line.startswith("| training |")]
    epochs = {1: "less than 1 epoch", 2: "1 epoch", 3: "1 epoch", 4: "2 epochs"}[module.trainer.global_step]
    assert f", {epochs}, precision" in training


def test_no_curves_are_drawn_of_a_log_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "distillkit"):
        fit(tmp_path, Student(str(save_tiny(tmp_path / "source"))))
    assert "No curves are drawn: the run's folder has no CSV log." in caplog.text
    assert not (tmp_path / "curves.png").exists()


def test_an_adapter_alone_fits_its_source_and_is_a_source_itself(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "cache"))
    source = save_tiny(tmp_path / "source")
    module = fit(tmp_path, Student(str(source), lora=Lora(r=4)), Export(adapter_only=True))
    export, expected = tmp_path / "export", logits(module.student)
    assert not (export / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), export)
    torch.testing.assert_close(logits(loaded), expected)
    student = Student(str(export))
    torch.testing.assert_close(logits(student.load()), expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in student.load().parameters())
    assert student.tokenizer().get_vocab() == tiny_tokenizer().get_vocab()


def test_an_adapter_that_there_is_not_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    source = str(save_tiny(tmp_path / "source"))
    with pytest.raises(ConfigError, match=r"Export\.adapter_only needs adapters"):
        fit(tmp_path, Student(source), Export(adapter_only=True))
    with pytest.raises(ConfigError, match=r"adapter_only can't be used with model\.student\.keep_layers"):
        fit(tmp_path, Student(source, keep_layers=[0], lora=Lora()), Export(adapter_only=True))
    with pytest.raises(ConfigError, match=r"Export\.dtype is that of a merged model"):
        Export(adapter_only=True, dtype="float32")
    with pytest.raises(ConfigError, match=r"Export\.dtype must be one of"):
        Export(dtype="int8")  # type: ignore[arg-type]


def test_a_folder_that_can_not_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"Export\.folder: .*file/export can't be written"):
        fit(tmp_path, Student(str(save_tiny(tmp_path / "source"))), Export(str(tmp_path / "file" / "export")))


def test_a_new_export_replaces_an_older_one_and_leaves_other_files(tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    for name in (
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "adapter_config.json",
        "notes.txt",
    ):
        (export / name).write_text("old")
    module = fit(tmp_path, Student(str(save_tiny(tmp_path / "source"))))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(export)), logits(module.student))
    assert (export / "notes.txt").read_text() == "old"
    assert sorted(path.name for path in export.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


class Diverged(Student):
    """A student with a weight that is no number."""

    def load(self) -> Any:
        model = super().load()
        base_model(model).model.norm.weight.data[0] = float("nan")
        return model


def test_a_student_that_has_diverged_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not exported: its logits are not finite"):
        write_merged(
            Diverged(str(save_tiny(tmp_path))).load(), tmp_path / "x", torch.float32, GenerationConfig(), DEFAULT
        )


class Doubled(Student):
    """A student with a setting that its config does not have."""

    def load(self) -> Any:
        model = super().load()
        base_model(model).model.layers[1].self_attn.scaling *= 2
        return model


def test_a_model_that_would_be_reloaded_as_another_one_replaces_nothing(tmp_path: Path) -> None:
    source, export = save_tiny(tmp_path / "source"), tmp_path / "export"
    export.mkdir()
    (export / "model.safetensors").write_text("earlier")
    with pytest.raises(ModelError, match=r"not exported.* reloads it differ .* by 0\.\d+ of their norm"):
        fit(tmp_path, Doubled(str(source)))
    assert [path.name for path in export.iterdir()] == ["model.safetensors"]
    assert (export / "model.safetensors").read_text() == "earlier"
