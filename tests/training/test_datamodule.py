import json
from types import SimpleNamespace

import pytest

from distillkit.curators.single import DatasetCurator, TeacherCurator
from distillkit.data.records import Source
from distillkit.errors import ConfigError, DataError, ModelError
from distillkit.evaluation.heldout import HeldOut
from distillkit.rollouts.loader import RoundLoader
from distillkit.training.datamodule import DistillData
from distillkit.training.module import DistillModule
from distillkit.types import Row
from helpers.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "data.jsonl", [{"prompt": f"Question {i}", "response": f"Answer {i}"} for i in range(5)])


@pytest.fixture
def bare(tmp_path):
    return write(tmp_path / "bare.jsonl", [{"prompt": "Question"}])


class Rows:
    """What makes rows, without a model."""

    needs_reference, check_held_out = DistillModule.needs_reference, DistillModule.check_held_out

    def __init__(self, curator, same_vocab_teacher, tokenizer):
        self.curator, self.same_vocab_teacher, self.tokenizer, self.held_out = (
            curator,
            same_vocab_teacher,
            tokenizer,
            HeldOut(),
        )
        self.rounds = SimpleNamespace(
            length=curator.rounds,
            prefetch_device=None,
            prepare=lambda prompts: None,
            rows=lambda prompts: DatasetCurator().curate(prompts, {}),
        )

    def reference_rows(self, prompts):
        return [[Row((7, 8), (False, True), "teacher", prompt.id)] for prompt in prompts]


def attached(data, rank=0, world=1, accumulate=1, teacher=None, curator=None, tokenizer=TOKENIZER, stage="fit"):
    """The data module on a trainer that has just what it asks for."""
    curator = DatasetCurator() if curator is None else curator
    module = Rows(curator, teacher, tokenizer)
    data.trainer = SimpleNamespace(
        lightning_module=module,
        global_rank=rank,
        world_size=world,
        accumulate_grad_batches=accumulate,
        overfit_batches=0.0,
        current_epoch=2,
        num_training_batches=float("inf"),
        estimated_stepping_batches=float("inf"),
        limit_val_batches=1.0,
        limit_test_batches=1.0,
        training=False,
        state=SimpleNamespace(fn=stage),
    )
    data.prepare_data()
    data.setup(stage)
    return data


def test_training_batches_are_made_of_the_rendered_conversations(file):
    data = attached(DistillData(file, batch_size=2, shuffle=False))
    first, *_ = batches = list(data.train_dataloader())
    assert [len(batch.lengths) for batch in batches] == [2, 2, 1]
    row = first.input_ids[0][first.attention_mask[0]]
    assert TOKENIZER.decode(row) == (
        "<|im_start|>user\nQuestion 0<|im_end|>\n<|im_start|>assistant\nAnswer 0<|im_end|>"
    )
    assert TOKENIZER.decode(first.input_ids[0][first.response_mask[0]]) == "Answer 0<|im_end|>"


def test_all_responses_to_a_prompt_are_trained_on_where_a_curator_needs_them(tmp_path):
    rows = [{"prompt": "Question", "response": f"Answer {i}"} for i in (0, 1, 0)]
    data = attached(DistillData(write(tmp_path / "data.jsonl", rows), batch_size=3, shuffle=False))
    (batch,) = data.train_dataloader()
    texts = [TOKENIZER.decode(ids[mask]) for ids, mask in zip(batch.input_ids, batch.response_mask, strict=True)]
    assert texts == ["Answer 0<|im_end|>", "Answer 1<|im_end|>"]
    generated = attached(DistillData(str(tmp_path / "data.jsonl")), curator=TeacherCurator(), teacher=object())
    assert len(generated.prompts["train"]) == 1, "a teacher answers it once"


def test_rows_that_cant_be_used_are_left_out_counted_and_listed_if_wanted(tmp_path, caplog):
    rows = [{"prompt": "Question", "response": "Answer"}, {"prompt": "?", "rating": 5}]
    thought = {"role": "assistant", "content": "Answer", "reasoning_content": "Hm"}
    rows.append({"messages": [{"role": "user", "content": "Why?"}, thought]})
    path = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match="line 2 has columns that would have no effect: 'rating'"):
        attached(DistillData(path))
    data = attached(DistillData(Source(path, on_error="skip")))
    assert len(data.prompts["train"]) == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.partition(";")[0].replace(path, "data.jsonl") for text in warnings] == [
        "data.jsonl: 1 of 3 rows are left out",
        "left out: data.jsonl line 2 has columns that would have no effect: 'rating'",
        "train: 1 of 2 rows are left out",
        "left out: data.jsonl line 3: the chat template of  does not write the reasoning of an answer: choose one that "
        "does, or remove the reasoning.",
    ]


def test_the_loader_gets_the_trainers_and_the_curators_settings(file):
    data = attached(
        DistillData(file, batch_size=3, seed=9),
        rank=1,
        world=4,
        accumulate=2,
        curator=TeacherCurator(rounds={"every": 7}),
        teacher=object(),
    )
    loader = data.train_dataloader()
    assert isinstance(loader, RoundLoader)
    batching = loader.batching
    assert (batching.batch_size, batching.accumulate, loader.rounds.length, loader.loop.epoch) == (3, 2, 7, 2)
    assert (batching.shuffle, batching.seed, loader.rank, loader.world) == (True, 9, 1, 4)
    assert batching.pad_id == TOKENIZER.pad_token_id


def test_held_out_prompts_are_dealt_to_the_ranks_each_once(file):
    loaders = [attached(DistillData(file, file, batch_size=2), rank, world=2).val_dataloader() for rank in range(2)]
    assert [len(loader) for loader in loaders] == [2, 2]
    assert [[batch.num_tokens for batch in loader] for loader in loaders] == [[2, 1], [2, 0]]


def test_validation_batches_have_a_size_of_their_own(file):
    data = attached(DistillData(file, file, batch_size=2, eval_batch_size=4))
    assert [len(batch.lengths) for batch in data.val_dataloader()] == [4, 1]


def test_without_held_out_prompts_there_is_nothing_to_validate_on(file):
    data = attached(DistillData(file))
    assert len(data.val_dataloader()) == len(data.test_dataloader()) == 0


def test_test_prompts_are_those_of_validation_unless_named(file, bare):
    assert len(attached(DistillData(file, file), stage="test").prompts["test"]) == 5
    assert len(attached(DistillData(file, file, bare), teacher=object(), stage="test").prompts["test"]) == 1


def test_only_the_prompts_that_are_asked_for_are_tokenised(file):
    data = DistillData(file, file)
    assert attached(data, stage="validate").prompts.keys() == {"val"}
    assert attached(data, stage="fit").prompts.keys() == {"train", "val"}


def test_to_measure_a_student_its_training_prompts_are_not_needed(file, tmp_path):
    data = DistillData(str(tmp_path / "gone.jsonl"), file)
    assert len(attached(data, stage="validate").prompts["val"]) == 5
    with pytest.raises(DataError, match=r"there is no file .*gone\.jsonl"):
        attached(data, stage="fit")
    write(tmp_path / "gone.jsonl", [{"prompt": "Question", "response": "Answer"}])
    assert len(attached(data, stage="fit").prompts["train"]) == 1


def test_without_a_trainer_it_says_what_to_call(file):
    data = DistillData(file)
    for act in (lambda: data.setup("fit"), data.train_dataloader):
        with pytest.raises(ConfigError, match=r"not attached to a trainer.* trainer\.fit\(module, data\)"):
            act()


@pytest.mark.parametrize(("stage", "name"), [("validate", "val"), ("test", "test")])
def test_a_stage_without_prompts_is_refused(stage, name, file):
    with pytest.raises(DataError, match=rf"data\.{name} is missing: there are no prompts"):
        attached(DistillData(file), stage=stage)


def test_a_source_may_be_given_with_its_columns(tmp_path):
    path = write(tmp_path / "other.jsonl", [{"question": "Q", "answer": "A"}, {"question": "R", "answer": "B"}])
    source = Source(path, prompt_column="question", response_column="answer", limit=1)
    assert [prompt.messages[0]["content"] for prompt in attached(DistillData(source)).prompts["train"]] == ["Q"]


def test_system_message_plain_text_and_length_reach_the_prompts(file):
    told = attached(DistillData(file, system="Be brief.")).prompts["train"][0]
    assert told.messages[0] == {"role": "system", "content": "Be brief."}
    plain = attached(DistillData(file, chat=False)).prompts["train"][0]
    assert TOKENIZER.decode(plain.input_ids) == "Question 0"


def test_records_beyond_the_length_are_dropped_or_refused_as_told(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"prompt": p, "response": "Yes"} for p in ("Short?", 40 * "A longer one?")])
    assert len(attached(DistillData(path, max_length=40, overlong="drop")).prompts["train"]) == 1
    with pytest.raises(DataError, match=r"line 2 has \d+ tokens, more than `data\.max_length: 40`"):
        attached(DistillData(path, max_length=40))
    with pytest.raises(DataError, match=r"No train prompt is left: 2 of 2 are longer than `data\.max_length: 3`"):
        attached(DistillData(path, max_length=3, overlong="drop"))


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size", "max_length"])
def test_a_number_below_1_is_refused(name):
    with pytest.raises(ConfigError, match=rf"DistillData\.{name} must be at least 1, got 0"):
        DistillData("data.jsonl", **{name: 0})


def test_a_missing_file_is_found_before_anything_is_tokenised(file):
    with pytest.raises(DataError, match=r"there is no file none\.jsonl"):
        DistillData(file, val="none.jsonl").prepare_data()


def test_a_curator_that_needs_responses_refuses_prompts_without(bare):
    with pytest.raises(DataError, match=r"bare\.jsonl line 1 has no response, and the curator needs one"):
        attached(DistillData(bare))
    attached(DistillData(bare), curator=TeacherCurator(), teacher=object())


def test_rows_without_the_response_that_a_curator_needs_are_listed_or_left_out(tmp_path, caplog):
    rows = [{"prompt": "One?", "response": "Yes."}, {"prompt": "Two?"}, {"prompt": "Three?"}]
    path = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match=r"2 of 3 rows can't be used; .*data\.jsonl line 2 has no response.*skip"):
        attached(DistillData(path))
    caplog.clear()
    prompts = attached(DistillData(path, on_error="skip")).prompts["train"]
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["One?"]
    assert "train: 2 of 3 rows are left out" in caplog.text
    assert "left out: " in caplog.text
    assert "data.jsonl line 3 has no response" in caplog.text


def test_a_file_without_any_response_is_refused_though_bad_rows_are_left_out(bare):
    with pytest.raises(DataError, match="has no response, and the curator needs one"):
        attached(DistillData(bare, on_error="skip"))


def test_validation_without_a_teacher_needs_responses(file, bare):
    with pytest.raises(DataError, match=r"no response, and validation without a teacher needs one"):
        attached(DistillData(file, bare))
    attached(DistillData(file, bare), teacher=object())


def test_a_tokenizer_without_a_chat_template_is_refused_for_chat(file):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        attached(DistillData(file), tokenizer=tokenizer)
    attached(DistillData(file, chat=False), tokenizer=tokenizer)


def test_the_format_and_the_treatment_of_errors_are_those_of_every_source_without_its_own(tmp_path):
    rows = [{"instruction": "Question", "output": "Answer"}, {"prompt": 3}]
    path = write(tmp_path / "data.jsonl", rows)
    data = attached(DistillData(path, Source(path, format="auto"), format="alpaca", on_error="skip"))
    assert [prompt.reference for split in ("train", "val") for prompt in data.prompts[split]] == ["Answer"] * 2
    with pytest.raises(DataError, match="line 1 is no row of the format openai"):
        attached(DistillData(Source(path, limit=1), format="openai"))
    with pytest.raises(DataError, match="line 2, prompt must be a text"):
        attached(DistillData(Source(path, on_error="stop"), on_error="skip"))


def test_held_out_prompts_are_for_references_and_their_file_is_read_once(file, caplog):
    with caplog.at_level("INFO", "distillkit"):
        data = attached(DistillData(file, file))
    assert {name: prompts.purpose for name, prompts in data.prompts.items()} == {
        "train": "training",
        "val": "reference",
    }
    assert sum("in the format plain" in message for message in caplog.messages) == 2


def test_training_prompts_that_are_null_are_refused():
    with pytest.raises(ConfigError, match=r"^DistillData\.train is missing: name the training prompts"):
        DistillData(None)


def test_the_prompts_of_a_large_file_are_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("distillkit.training.encoded.CACHED_FROM", 3)
    path = write(tmp_path / "data.jsonl", [{"prompt": f"Question {i}", "response": f"Answer {i}"} for i in range(5)])
    batches = [
        [batch.input_ids.tolist() for batch in attached(DistillData(path, batch_size=2)).train_dataloader()]
        for _ in range(2)
    ]
    assert batches[0] == batches[1]
    assert len(list((tmp_path / "cache" / "encoded").glob("*.arrow"))) == 1
