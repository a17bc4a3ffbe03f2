import json
import logging

import pytest

from distillkit.data.decontaminate import Decontamination, without_overlap
from distillkit.data.records import Source
from distillkit.errors import ConfigError, DataError
from distillkit.training.datamodule import DistillData
from distillkit.types import Record
from helpers.languages import ANSWERS

LONG = "Tell me in which year the old bridge over the river was built and by whom"


def record(text, response=None, origin="train line 1", system=None):
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": text})
    if response is not None:
        turns.append({"role": "assistant", "content": response})
    return Record(tuple(turns), origin)


def kept(texts, held_out, ngram=13):
    records = [record(text) for text in (*texts, "Something else")]
    found = without_overlap(records, {"val": [record(text) for text in held_out]}, ngram)
    return [own.messages[0]["content"] for own in found][:-1]


def test_a_prompt_that_shares_a_run_of_words_is_left_out():
    words = LONG.split()
    quoted = "Please: " + " ".join(words[2:15]) + ", would you?"
    shorter = "Please: " + " ".join(words[2:14]) + ", would you?"
    assert kept([quoted, shorter], [LONG]) == [shorter]
    assert kept([quoted, shorter], [LONG], ngram=12) == []


def test_case_punctuation_and_white_space_make_no_difference():
    assert kept([LONG.upper().replace(" ", ",\n") + "!"], [LONG]) == []


def test_words_in_another_order_are_no_run():
    text = " ".join(reversed(LONG.split()))
    assert kept([text], [LONG]) == [text]


def test_short_prompts_are_compared_as_a_whole():
    texts = ["What is 2 + 2?", "what is 2 2", "What is 2 + 2 and 3?", "Is 2 + 2 4?"]
    assert kept(texts, ["What is 2 + 2?"]) == texts[2:]


@pytest.mark.parametrize("script", ANSWERS)
def test_the_same_prompt_is_left_out_in_every_script(script):
    text = ANSWERS[script]
    assert kept([text, f"«{text}»", ANSWERS["Greek" if script != "Greek" else "Latin"]], [text])[:-1] == []


def test_a_quotation_without_spaces_is_left_out():
    held_out = "请告诉我河上的那座老桥是哪一年建造的,是谁建造的?"
    assert kept([f"问题:{held_out[4:20]}", f"问题:{held_out[4:14]}"], [held_out]) == [f"问题:{held_out[4:14]}"]


def test_a_prompt_of_no_words_overlaps_with_nothing():
    assert kept(["?!"], ["?!"]) == ["?!"]


def test_every_turn_of_the_user_counts_and_nobody_elses():
    messages = (*record("Hello", "Good day").messages, {"role": "user", "content": LONG})
    others = record("Hello again", LONG, system=LONG)
    found = without_overlap([Record(messages, "train line 1"), others], {"val": [record(LONG, "No", system="Hello")]})
    assert found == [others]


def test_the_log_counts_and_names_each(caplog):
    records = [record("One"), record(LONG, origin="train line 2"), record(LONG + "?", origin="train line 3")]
    with caplog.at_level(logging.INFO, "distillkit"):
        without_overlap(records, {"val": [record("Two")], "gsm.jsonl": [record(LONG, origin="gsm.jsonl line 7")]})
        without_overlap(records[:1], {"val": [record("Two")]}, ngram=8)
    assert caplog.messages == [
        "data.decontaminate: 2 of 3 training records share a run of 13 words, or a shorter turn, with a prompt of val, "
        "gsm.jsonl; they are left out",
        "data.decontaminate: 2 of 3 rows are left out",
        "left out: train line 2 shares words with gsm.jsonl line 7",
        "left out: train line 3 shares words with gsm.jsonl line 7",
        "data.decontaminate: 0 of 1 training records share a run of 8 words, or a shorter turn, with a prompt of val; "
        "they are left out",
    ]


def test_nothing_left_or_nothing_to_compare_with_is_an_error():
    with pytest.raises(DataError, match=r"data\.decontaminate: 1 of 1 training records .* none is left: evaluate on"):
        without_overlap([record(LONG)], {"val": [record(LONG)]})
    with pytest.raises(ConfigError, match=r"`data\.decontaminate` has nothing to compare with"):
        without_overlap([record(LONG)], {})
    with pytest.raises(ConfigError, match=r"Decontamination\.ngram must be at least 1, got 0"):
        Decontamination(ngram=0)


@pytest.fixture
def files(tmp_path):
    def write(name, *texts):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        return str(path)

    return {name: write(name, f"Only in {name}") for name in ("val", "test", "more", "other")} | {
        "train": write("train", "Mine", "Only in val", "Only in test", "Only in more", "Only in other")
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, 5),
        (Decontamination(), 3),
        (Decontamination(["more"]), 2),
        (Decontamination(["more", "other"]), 1),
    ],
)
def test_training_prompts_are_compared_with_validation_test_and_the_named_sets(files, settings, expected):
    if settings is not None:
        against = [files["more"], Source(files["other"])][: len(settings.against)]
        settings = Decontamination(against)
    data = DistillData(files["train"], files["val"], files["test"], decontaminate=settings)
    data.prepare_data()  # no trainer and no model
    assert len(data._records["train"]) == expected
    assert [len(data._records[name]) for name in ("val", "test")] == [1, 1]
    assert data._records.keys() == {"train", "val", "test"}


def test_a_missing_evaluation_set_is_found_before_anything_is_read(files):
    with pytest.raises(DataError, match=r"there is no file none\.jsonl"):
        DistillData(files["train"], decontaminate=Decontamination(["none.jsonl"])).prepare_data()
