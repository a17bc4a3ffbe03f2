"""Runs whose student has another end token, template or vocabulary than its data or teacher."""

import logging
from datetime import date
from pathlib import Path
from typing import Any

import lightning
import pytest
from transformers import AutoTokenizer, GenerationConfig

from distillkit import DistillData, DistillModule, Lora, Sampling, Student
from distillkit.callbacks import Export, RunCheckpoint
from distillkit.curators.single import DatasetCurator, StudentCurator, TeacherCurator
from distillkit.errors import ConfigError, DataError, ModelError
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import CrossEntropy, ForwardKL
from distillkit.storage import dates
from distillkit.storage.files import StoreFolder
from distillkit.storage.merge import merge
from distillkit.storage.responses import ResponseStore
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.training.tokens import run_tokenizer
from distillkit.workflows import export
from helpers.models import CHAT_TEMPLATE, END_ID, tiny_model, tiny_tokenizer
from helpers.runs import QUIET, write_prompts

EOS = "<|endoftext|>"
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATE
SWITCHED = "{% if brief is defined %}Be brief.\n{% endif %}" + CHAT_TEMPLATE


def save(folder: Path, template: str | None = CHAT_TEMPLATE, seed: int = 0, added: tuple[str, ...] = ()) -> str:
    """A tiny base model, whose end token is not the one that ends a turn of the template."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": EOS})
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.pad_token, tokenizer.chat_template = None, template
    model = tiny_model(330, seed=seed, eos_token_id=tokenizer.eos_token_id)
    model.lm_head.weight.data[END_ID] *= 4  # so that turns end within a few tokens
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def fit(root: Path, student: Student, teacher: str | None = None, curator: Any = None, **settings: Any) -> Any:
    """One epoch on four prompts; the module."""
    root.mkdir(exist_ok=True)
    data = DistillData(write_prompts(root / "train.jsonl", 4, response=True), batch_size=4)
    callbacks = settings.pop("callbacks", [])
    module = DistillModule(
        student,
        CrossEntropy() if teacher is None else ForwardKL(),
        None if teacher is None else TransformersTeacher(teacher, dtype="float32"),
        curator or DatasetCurator(),
        TransformersGenerator(progress=False),
        **settings,
    )
    options = QUIET | {"max_epochs": 1, "default_root_dir": root, "logger": False}
    options |= {"enable_checkpointing": any(isinstance(callback, RunCheckpoint) for callback in callbacks)}
    lightning.Trainer(**options, callbacks=callbacks).fit(module, data)
    return module


def test_a_base_student_ends_its_turn_as_its_template_does_on_policy_and_in_its_export(tmp_path: Path) -> None:
    curator = StudentCurator(Sampling(temperature=1.0, top_p=1.0, max_new_tokens=40, seed=1))
    module = fit(tmp_path, Student(save(tmp_path / "student")), curator=curator, callbacks=[Export()])
    end = module.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert module.tokenizer.eos_token == EOS
    catalog = ResponseStore(tmp_path / "responses").catalog
    catalog.refresh()
    rows = [row for shard in catalog.shards if shard.key != "prompts" for row in catalog.open(shard).table.to_pylist()]
    ended = [row for row in rows if row["token_ids"][-1] == end]
    assert ended
    assert all(row["finish"] == "stop" and "<|im_end|>" not in row["text"] for row in ended)
    assert all(end not in row["token_ids"][:-1] for row in rows)
    exported = GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id
    assert set(exported) == {end, module.tokenizer.eos_token_id}


def test_a_student_without_a_template_gets_one_and_its_export_has_it(tmp_path: Path) -> None:
    source = save(tmp_path / "student", template=None)
    with pytest.raises(ModelError, match=r"no chat template: .* `model\.student\.chat_template`"):
        fit(tmp_path, Student(source))
    fit(tmp_path, Student(source, chat_template="plain"), callbacks=[Export()])
    assert "### Assistant:" in (tmp_path / "export" / "chat_template.jinja").read_text()
    with pytest.raises(ConfigError, match="teacher needs a teacher with a chat template"):
        fit(tmp_path, Student(source, chat_template="teacher"))


def test_a_checkpoint_is_exported_with_the_template_and_the_ends_of_its_run(tmp_path: Path) -> None:
    lora = Lora(r=2, target_modules=["q_proj", "lm_head"])
    student = Student(save(tmp_path / "student", template=None), lora=lora, chat_template="teacher")
    teacher = save(tmp_path / "teacher", seed=1)
    fit(tmp_path, student, teacher, callbacks=[RunCheckpoint(), Export()])
    target = export(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "out")
    for name in ("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"):
        assert (target / name).read_bytes() == (tmp_path / "export" / name).read_bytes(), name
    assert "<|im_end|>" in (target / "chat_template.jinja").read_text()
    assert END_ID in GenerationConfig.from_pretrained(target).eos_token_id


def test_the_teachers_template_serves_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = save(tmp_path / "teacher", template=SWITCHED.replace("<|im_start|>", "<|im_start|>\n"), seed=1)
    note = "Prompts are rendered with the student's chat template, and the teacher's is another"
    with caplog.at_level(logging.INFO, "distillkit"):
        fit(tmp_path / "first", Student(save(tmp_path / "student")), teacher)
        assert caplog.text.count(note) == 1
        module = fit(tmp_path / "second", Student(save(tmp_path / "student"), chat_template="teacher"), teacher)
    assert caplog.text.count(note) == 1, "nothing to say if both have the same"
    assert "brief" in module.tokenizer.chat_template


def test_the_date_is_fixed_in_the_default_of_several_templates(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": DATED, "tool_use": "none"}
    tokenizer.save_pretrained(tmp_path / "student")
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "student")
    dates.write_date(StoreFolder(tmp_path / "store"), date(2024, 2, 29))
    student = Student(str(tmp_path / "student"))
    assert isinstance(student.tokenizer().chat_template, dict)
    fixed = run_tokenizer(student, None, tmp_path / "store")
    text = fixed.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "29 Feb 2024\n<|im_start|>user\nHi<|im_end|>\n"


def test_the_date_of_the_first_run_is_that_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Day(date):
        current = (2026, 11, 28)

        @classmethod
        def today(cls) -> date:
            return date(*cls.current)

    monkeypatch.setattr(dates, "date", Day)
    source, teacher = save(tmp_path / "student", DATED), save(tmp_path / "teacher", DATED, seed=1)
    curator = TeacherCurator(Sampling(max_new_tokens=4))
    tokens = []
    for day in ((2026, 11, 28), (2027, 1, 1)):
        Day.current = day
        module = fit(tmp_path / "run", Student(source), teacher, curator, callbacks=[Export()])
        prompt = module.trainer.datamodule.prompts["train"][0]
        assert module.tokenizer.decode(prompt.input_ids).startswith("28 Nov 2026\n")
        tokens.append(prompt.input_ids)
        assert len(list((tmp_path / "run" / "responses" / "shards").glob("teacher-*"))) == 1, "generated once"
    assert tokens[0] == tokens[1]
    assert (tmp_path / "run" / "export" / "chat_template.jinja").read_text() == DATED, "an export prints its own date"
    merge(str(tmp_path / "merged"), [str(tmp_path / "run" / "responses")])
    assert dates.fixed_date(tmp_path / "merged") == date(2026, 11, 28)
    assert dates.fixed_date(tmp_path / "new") == date(2027, 1, 1)


def test_a_response_is_not_reused_with_a_prompt_that_another_template_renders(tmp_path: Path) -> None:
    source, teacher = save(tmp_path / "student", SWITCHED), save(tmp_path / "teacher", SWITCHED, seed=1)
    curator, store = TeacherCurator(Sampling(max_new_tokens=4)), str(tmp_path / "store")
    for arguments in (None, {"brief": True}, None):
        fit(tmp_path / "run", Student(source, template_kwargs=arguments), teacher, curator, store=store)
    provenances = {shard["model"] for shard in ResponseStore(store).shards()}
    assert len(provenances) == 2
    assert sum(shard["responses"] for shard in ResponseStore(store).shards()) == 8


def test_a_pair_with_other_added_tokens_is_trained_if_these_never_occur(tmp_path: Path) -> None:
    student, teacher = save(tmp_path / "student", added=("<tool>",)), save(tmp_path / "teacher", seed=1)
    with pytest.raises(ModelError) as caught:
        fit(tmp_path / "strict", Student(student), teacher)
    assert str(caught.value).startswith(
        f"The tokenizers of the student {student} and the teacher {teacher} differ: id 321 is '<tool>' for the student "
        f"{student} and no token for the teacher {teacher}. If such added tokens never occur, set "
        "`model.added_tokens: unused`."
    )
    fit(tmp_path / "unused", Student(student), teacher, added_tokens="unused")


def test_tokens_without_logits_are_no_error_if_they_never_occur(tmp_path: Path) -> None:
    # Gemma 3 has a token for images past its 262,144 logits, and many tuned Llamas an added padding token.
    folders = []
    for seed, name in enumerate(("student", "teacher")):
        folders.append(save(tmp_path / name, added=("<image>", "very")))
        tokenizer = AutoTokenizer.from_pretrained(folders[-1])
        tokenizer.pad_token = "<image>"
        tokenizer.save_pretrained(folders[-1])
        tiny_model(321, seed=seed, eos_token_id=tokenizer.eos_token_id).save_pretrained(folders[-1])
    with pytest.raises(ModelError, match=r"has 323 tokens and the models share 321 logits\. .*added_tokens: unused"):
        fit(tmp_path / "strict", Student(folders[0]), folders[1])
    with pytest.raises(
        DataError, match=r"has the token 322, which is 'very' for the tokenizer and past the 321 logits"
    ):
        fit(tmp_path / "occurs", Student(folders[0]), folders[1], added_tokens="unused")
    for folder in folders:
        for file in Path(folder).glob("*token*.json"):
            file.write_text(file.read_text().replace('"very"', '"<audio>"'))
    for curator in (None, StudentCurator(Sampling(temperature=0.0, max_new_tokens=4))):
        module = fit(tmp_path / "run", Student(folders[0]), folders[1], curator, added_tokens="unused")
    assert module.tokenizer.pad_token_id == module.tokenizer.eos_token_id, "padding has an embedding"


def test_an_end_token_without_a_logit_is_refused(tmp_path: Path) -> None:
    student = save(tmp_path / "student")
    tiny_model(320).save_pretrained(student)
    with pytest.raises(ModelError, match="has 321 tokens and the models share 320 logits"):
        fit(tmp_path / "run", Student(student), added_tokens="unused")


def test_an_added_token_that_occurs_after_all_is_an_error(tmp_path: Path) -> None:
    student, teacher = save(tmp_path / "student", added=("very",)), save(tmp_path / "teacher", seed=1)
    with pytest.raises(DataError, match=r"has the token 321, which is 'very' for the student .* `model\.added_tokens"):
        fit(tmp_path / "run", Student(student), teacher, added_tokens="unused")
