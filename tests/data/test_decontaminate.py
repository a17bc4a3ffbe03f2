import json
import logging

import pytest

from distillkit.data.decontaminate import Decontamination, without_overlap
from distillkit.data.module import DistillData
from distillkit.data.records import Record, Source
from distillkit.errors import ConfigError, DataError

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


def test_a_prompt_of_no_words_overlaps_with_nothing():
    assert kept(["?!"], ["?!"]) == ["?!"]


def test_every_turn_of_the_user_counts_and_nobody_elses():
    messages = (*record("Hello", "Good day").messages, {"role": "user", "content": LONG})
    others = record("Hello again", LONG, system=LONG)
    found = without_overlap([Record(messages, "train line 1"), others], {"val": [record(LONG, "No", system="Hello")]})
    assert found == [others]


def test_the_log_counts_and_names_the_first(caplog):
    records = [record("One"), record(LONG, origin="train line 2"), record(LONG + "?", origin="train line 3")]
    with caplog.at_level(logging.INFO, "distillkit"):
        without_overlap(records, {"val": [record("Two")], "gsm.jsonl": [record(LONG, origin="gsm.jsonl line 7")]})
        without_overlap(records[:1], {"val": [record("Two")]}, ngram=8)
    assert caplog.messages == [
        "data.decontaminate: 2 of 3 training records share a run of 13 words, or a shorter turn, with a prompt of val, "
        "gsm.jsonl; the first, train line 2, with gsm.jsonl line 7; they are left out",
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
