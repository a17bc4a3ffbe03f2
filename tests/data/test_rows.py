"""Keys of rows and of messages: each has its effect or is refused."""

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distillkit.data.records import Source
from distillkit.data.rows import METADATA, Columns, read_row
from distillkit.errors import DataError
from distillkit.storage import export

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind"}


def read(row, **columns):
    return read_row(row, "a.jsonl line 7", Columns(**columns))


def user(text):
    return {"role": "user", "content": text}


ALPACA = {"prompt": "instruction", "response": "output"}
HONOURED = [
    # TRL: completion, also as messages
    ({"prompt": "Hi", "completion": "Hello"}, {}, (USER, ASSISTANT)),
    ({"prompt": "Hi", "response": None, "completion": "Hello"}, {}, (USER, ASSISTANT)),
    ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, {}, (SYSTEM, USER, ASSISTANT)),
    ({"prompt": [USER]}, {}, (USER,)),
    ({"prompt": [USER], "response": "Hello"}, {}, (USER, ASSISTANT)),
    # Alpaca
    ({"instruction": "Hi", "input": "", "output": "Hello"}, ALPACA, (USER, ASSISTANT)),
    ({"instruction": "Hi", "input": None, "output": "Hello"}, ALPACA, (USER, ASSISTANT)),
    ({"instruction": "Sort", "input": "b, a", "output": "Hello"}, ALPACA, (user("Sort\n\nb, a"), ASSISTANT)),
    ({"instruction": "Hi", "output": "Hello", "history": [["Hi", "Hello"]]}, ALPACA, (USER, ASSISTANT) * 2),
    ({"input": "Hi", "output": "Hello"}, {"prompt": "input", "response": "output"}, (USER, ASSISTANT)),
    # columns of a row
    ({"system": "Be kind", "prompt": "Hi"}, {}, (SYSTEM, USER)),
    ({"system": "", "prompt": "Hi"}, {}, (USER,)),
    ({"system": "Be kind", "messages": [USER, ASSISTANT]}, {}, (SYSTEM, USER, ASSISTANT)),
    ({"system": "Be kind", "history": [("Hi", "Hello")], "prompt": "Hi"}, {}, (SYSTEM, USER, ASSISTANT, USER)),
    ({"prompt": "Hi", "history": []}, {}, (USER,)),
    # what only repeats, is empty, describes the row, or is named
    ({"prompt": "Hi", "response": "Hello", "messages": [USER, ASSISTANT]}, {}, (USER, ASSISTANT)),
    ({"prompt": [USER], "completion": [ASSISTANT], "messages": [USER, ASSISTANT]}, {}, (USER, ASSISTANT)),
    ({"prompt": "Hi", "tools": None, "images": [], "suffix": ""}, {}, (USER,)),
    ({"prompt": "Hi", **dict.fromkeys(METADATA, "x")}, {}, (USER,)),
    ({"prompt": "Hi", "rating": 5}, {"ignored": frozenset({"rating"})}, (USER,)),
    (
        {"prompt": "Hi", "response": "No", "chosen": "Hello"},
        {"response": "chosen", "ignored": frozenset({"response"})},
        (USER, ASSISTANT),
    ),
    # messages
    ({"messages": [{**USER, "id": 7, "tool_calls": None}, ASSISTANT]}, {}, (USER, ASSISTANT)),
    ({"messages": [{**USER, "name": "Ann"}]}, {"ignored": frozenset({"name"})}, (USER,)),
    ({"messages": [USER, {**ASSISTANT, "weight": 1, "train": True}]}, {}, (USER, ASSISTANT)),
    ({"messages": [{**USER, "weight": 0, "train": False}, ASSISTANT]}, {}, (USER, ASSISTANT)),
]


@pytest.mark.parametrize(("row", "columns", "messages"), HONOURED)
def test_a_key_has_its_effect(row, columns, messages):
    record = read(row, **columns)
    assert (record.messages, record.origin, record.untrained) == (messages, "a.jsonl line 7", frozenset())


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_the_reasoning_of_an_answer_is_kept(name):
    record = read({"messages": [USER, {**ASSISTANT, name: "They greet."}]})
    assert record.messages == (USER, {**ASSISTANT, "reasoning_content": "They greet."})
    assert read({"messages": [USER, {**ASSISTANT, name: None}]}).messages == (USER, ASSISTANT)


@pytest.mark.parametrize("keys", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"train": 0, "weight": False}])
def test_an_answer_of_weight_0_is_not_trained_on(keys):
    record = read({"system": "Be kind", "messages": [USER, {**ASSISTANT, **keys}, USER, ASSISTANT]})
    assert record.untrained == {2}
    assert record.messages == (SYSTEM, USER, ASSISTANT, USER, ASSISTANT)


@pytest.mark.parametrize(("finish", "ended"), [("stop", True), ("length", False), (None, True)])
def test_an_answer_that_was_cut_is_one_that_did_not_end(finish, ended):
    assert read({"messages": [USER, ASSISTANT], "finish": finish}).ended is ended


def test_every_column_of_an_export_is_read():
    assert set(export._SCHEMA.names) | {field.name for field in export._TOKENS} <= METADATA | {"messages", "finish"}


REFUSED = [
    ({"prompt": "Hi", "finish": "cut"}, {}, r" has the finish 'cut'; use stop, or length"),
    (
        {"prompt": "Hi", "answer": "Hello", "rating": 5},
        {},
        r" has columns .* no effect: 'answer', 'rating'; name the right",
    ),
    ({"prompt": "Hi", "chosen": "a", "rejected": None}, {}, r" is half of a pair: it has no 'rejected'"),
    ({"prompt": "Hi", "input": "b, a"}, {}, r"no effect: 'input'"),
    ({"prompt": "Hi", "response": "Hello", "completion": "Ho"}, {}, r"no effect: 'completion'"),
    ({"prompt": "Hi", "reasoning_content": "Hm"}, {}, r"no effect: 'reasoning_content'"),
    ({"prompt": "Hi", "weight": 0.5}, {}, r"no effect: 'weight'"),
    ({"prompt": "Hi", "history": "Hello"}, {}, r", history must be a list of pairs"),
    ({"prompt": "Hi", "history": [["Hi", "Hello", "Ho"]]}, {}, r", history must be a list of pairs"),
    ({"prompt": "Hi", "history": [["Hi", ""]]}, {}, r", history, pair 1 is an empty response"),
    ({"prompt": "Hi", "system": ["Be kind"]}, {}, r", system must be a text"),
    ({"messages": [USER], "history": [["Hi", "Hello"]]}, {}, r"no effect: 'history'"),
    ({"messages": [SYSTEM, USER], "system": "Be brief"}, {}, r", messages, turn 1 is a second system turn"),
    ({"messages": [USER, ASSISTANT], "prompt": "Ho"}, {}, r" has 'messages' and another text in 'prompt'"),
    ({"messages": [USER, ASSISTANT], "response": "Ho"}, {}, r" has 'messages' and another text in 'response'"),
    ({"messages": [USER], "completion": "Ho"}, {}, r" has 'messages' and another text in 'completion'"),
    ({"messages": [{**USER, "name": "Ann"}]}, {}, r", messages, turn 1 has keys that would have no effect: 'name'"),
    ({"messages": [USER, {**ASSISTANT, "tool_calls": [1]}]}, {}, r", messages, turn 2, tool_calls must have a name"),
    (
        {"messages": [USER, {**ASSISTANT, "weight": 0.5}, USER]},
        {},
        r", messages, turn 2 has the weight 0\.5; use 0 or 1",
    ),
    ({"messages": [USER, {**ASSISTANT, "train": "no"}, USER]}, {}, r", messages, turn 2 has the weight 'no'"),
    ({"messages": [USER, {**ASSISTANT, "train": True, "weight": 0}, USER]}, {}, r"contradict each other"),
    ({"messages": [{**USER, "weight": 1}]}, {}, r", messages, turn 1 is a user turn to be trained on"),
    ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, {}, r" ends with an answer that is not trained on"),
    (
        {"messages": [{**USER, "reasoning_content": "Hm"}]},
        {},
        r", messages, turn 1 has reasoning that would have no effect",
    ),
    (
        {"messages": [USER, {**ASSISTANT, "reasoning": "Hm"}, USER]},
        {},
        r", messages, turn 2 has reasoning that would have no",
    ),
    (
        {"messages": [USER, {**ASSISTANT, "reasoning": "Hm", "thinking": "Hm"}]},
        {},
        r"reasoning that would have no effect",
    ),
    ({"messages": [USER, {**ASSISTANT, "reasoning": 5}]}, {}, r", messages, turn 2, reasoning must be a text"),
    # False is a value, not nothing: ms-swift's and LLaMA-Factory's loss, verl's trainable, the labels of KTO
    ({"messages": [USER, {**ASSISTANT, "loss": False}, USER, ASSISTANT]}, {}, r", messages, turn 2 has keys .* 'loss'"),
    ({"messages": [USER, {**ASSISTANT, "trainable": False}]}, {}, r", messages, turn 2 has keys .* 'trainable'"),
    ({"prompt": "Hi", "response": "Hello", "train": False}, {}, r" has columns .* no effect: 'train'"),
    ({"prompt": "Hi", "completion": "Hello", "label": False}, {}, r" has columns .* no effect: 'label'"),
    ({"prompt": "Hi", "system": False}, {}, r", system must be a text, got False \(bool\)"),
    ({"prompt": "Hi", "history": False}, {}, r", history must be a list of pairs"),
    ({"instruction": "Hi", "input": 0}, {"prompt": "instruction"}, r", input must be a text, got 0 \(int\)"),
    ({"messages": [USER, {**ASSISTANT, "reasoning": False}]}, {}, r", messages, turn 2, reasoning must be a text"),
    # turns that would be taken for what they are not
    ({"prompt": [USER, ASSISTANT]}, {}, r", prompt, turn 2 is the start of an answer, which can't be continued"),
    ({"prompt": [USER, ASSISTANT], "response": "lo"}, {}, r", response is a second assistant turn in a row"),
    ({"prompt": "Hi", "response": [ASSISTANT, USER]}, {}, r", response, turn 2 is a user turn that ends a response"),
    ({"prompt": None, "response": "Hello"}, {}, r", prompt is null; write the prompt or leave the row out"),
    ({"prompt": "a \ud83d b"}, {}, r", prompt has half of a surrogate pair, '\\ud83d', at character 3"),
    ({"messages": [USER, {**ASSISTANT, "content": "\udc00"}]}, {}, r", messages, turn 2 has half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "columns", "message"), REFUSED)
def test_a_key_without_an_effect_is_refused_and_listed(row, columns, message):
    with pytest.raises(DataError, match=rf"^a\.jsonl line 7{message}" if message[0] in " ," else message) as refusal:
        read(row, **columns)
    assert str(refusal.value).isprintable()


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def jsonl(*rows, name="data.jsonl"):
    Path(name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return name


@pytest.mark.parametrize("setting", ["response_column", "messages_column", "prompt_column"])
def test_a_column_that_no_row_has_is_refused(setting):
    path = jsonl({"messages": [USER, ASSISTANT]} if setting == "prompt_column" else {"prompt": "Hi"})
    with pytest.raises(
        DataError, match=rf"Source\.{setting}: no row of data\.jsonl has a column 'anser'; the columns are "
    ):
        Source(path, **{setting: "anser"}).records()


def test_a_misspelt_response_column_does_not_make_prompts_without_responses():
    with pytest.raises(DataError, match=r"line 1 has columns that would have no effect: 'response'"):
        Source(jsonl({"prompt": "Hi", "response": "Hello"}), response_column="respnse").records()


BAD_LINES = {
    '{"prompt": "Hi"': r"is not valid JSON",
    '{"prompt": "Hi", "prompt": "Ho"}': r"can't be read \(it has the key 'prompt' twice\)",
    '{"prompt": "Hi", "id": ' + "9" * 5000 + "}": r"can't be read \(Exceeds the limit",
    '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}": r"is nested too deeply",
    '{"prompt": ' + '{"a":' * 2000 + "1" + "}" * 2000 + "}": r"is nested too deeply",
    '{"prompt": "a \\ud83d b"}': r", prompt has half of a surrogate pair",
    "": r"is blank",
    '{"prompt": "Hi", "answer": "Hello"}': r"has columns that would have no effect",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20])
def test_a_bad_line_is_an_error_or_left_out_and_counted(line, caplog):
    path = jsonl({"prompt": "Hi"}, line, {"prompt": "Ho"})
    with pytest.raises(DataError, match=rf"^data\.jsonl line 2 ?{BAD_LINES[line]}"):
        Source(path).records()
    with caplog.at_level(logging.WARNING, "distillkit"):
        records = Source(path, on_error="skip").records()
    assert [record.origin for record in records] == ["data.jsonl line 1", "data.jsonl line 3"]
    assert caplog.messages[0] == "data.jsonl: 1 of 3 rows are left out"
    assert caplog.messages[1].startswith("left out: data.jsonl line 2")


def test_rows_left_out_are_listed_up_to_a_number(caplog):
    path = jsonl(*[{"prompt": "Hi"}] * 3, *["{"] * 30)
    with caplog.at_level(logging.WARNING, "distillkit"):
        assert len(Source(path, on_error="skip").records()) == 3
    assert len(caplog.messages) == 22
    assert caplog.messages[0] == "data.jsonl: 30 of 33 rows are left out"
    assert caplog.messages[-1] == "left out: 10 more"


def test_where_every_row_is_bad_the_first_is_named():
    with pytest.raises(
        DataError, match=r"^Every row of data\.jsonl is malformed\. data\.jsonl line 1 is not valid JSON"
    ):
        Source(jsonl("{", "{"), on_error="skip").records()


def test_blank_lines_at_the_end_are_no_rows_but_others_may_be():
    assert len(Source(jsonl({"prompt": "Hi"}, "", "  ", "")).records()) == 1
    with pytest.raises(DataError, match="line 2 is blank"):
        Source(jsonl({"prompt": "Hi"}, "", "", {"prompt": "Hi"})).records()


def test_rows_of_a_csv_with_other_cells_are_left_out_and_long_cells_are_read(caplog):
    Path("data.csv").write_text(f"prompt,id\nHi,1\nHi\n{'x' * 200_000},2\n")
    records = Source("data.csv", on_error="skip").records()
    assert [len(record.messages[0]["content"]) for record in records] == [2, 200_000]
    assert "data.csv row 2 has 1 cells where the header has 2" in caplog.text


def test_a_null_prompt_in_parquet_is_named():
    schema = pa.schema({"prompt": pa.string(), "response": pa.string()})
    pq.write_table(pa.Table.from_pylist([{"prompt": None, "response": "Hello"}], schema=schema), "data.parquet")
    with pytest.raises(DataError, match=r"^data\.parquet row 1, prompt is null; write the prompt or leave the row out"):
        Source("data.parquet").records()


def test_two_columns_of_one_name_in_parquet_are_refused():
    columns = [pa.array(["Hi"]), pa.array(["Hello"]), pa.array(["Ho"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["prompt", "response", "response"]), "data.parquet")
    with pytest.raises(DataError, match=r"^data\.parquet names a column twice in its schema, 'prompt', 'response', "):
        Source("data.parquet").records()


def test_keys_that_parquet_fills_with_null_have_no_effect():
    rows = [{"messages": [USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT], "tools": None}]
    pq.write_table(pa.Table.from_pylist(rows), "data.parquet")
    assert Source("data.parquet").records()[0].untrained == {1}
