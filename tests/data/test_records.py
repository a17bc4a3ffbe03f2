import csv
import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distillkit.data.records import Source
from distillkit.errors import ConfigError, DataError

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def jsonl(*rows, name="data.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def read(path, **settings):
    return [(record.messages, record.origin) for record in Source(path, **settings).records()]


PAIRS = [({"prompt": "Hi", "response": "Hello"}, (USER, ASSISTANT)), ({"prompt": "Hi", "response": None}, (USER,))]


def test_jsonl_gives_conversations_with_their_line_numbers():
    rows = [*(row for row, _ in PAIRS), {"prompt": "Hi"}, {"messages": [SYSTEM, USER, ASSISTANT, USER]}]

    assert read(jsonl(*rows)) == [
        ((USER, ASSISTANT), "data.jsonl line 1"),
        ((USER,), "data.jsonl line 2"),
        ((USER,), "data.jsonl line 3"),
        ((SYSTEM, USER, ASSISTANT, USER), "data.jsonl line 4"),
    ]


def test_compressed_jsonl_reads_as_the_plain_file():
    rows = [row for row, _ in PAIRS]
    Path("data.jsonl.gz").write_bytes(gzip.compress(Path(jsonl(*rows)).read_bytes()))

    plain, packed = read("data.jsonl"), read("data.jsonl.gz")

    assert [messages for messages, _ in packed] == [messages for messages, _ in plain]
    assert packed[1][1] == "data.jsonl.gz line 2"


def test_csv_gives_rows_numbered_after_the_header():
    with Path("data.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt", "response", "id"], ["a, b\nc", "d", "1"], ["e", "f", "2"]])

    assert read("data.csv") == [
        (({"role": "user", "content": "a, b\nc"}, {"role": "assistant", "content": "d"}), "data.csv row 1"),
        (({"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}), "data.csv row 2"),
    ]


def test_parquet_gives_prompts_responses_and_conversations():
    rows = [{**row, "messages": None} for row, _ in PAIRS]
    rows.append({"prompt": None, "response": None, "messages": [USER, ASSISTANT]})
    pq.write_table(pa.Table.from_pylist(rows, schema=parquet_schema()), "data.parquet", row_group_size=1)

    assert read("data.parquet") == [
        ((USER, ASSISTANT), "data.parquet row 1"),
        ((USER,), "data.parquet row 2"),
        ((USER, ASSISTANT), "data.parquet row 3"),
    ]


def parquet_schema():
    turns = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    return pa.schema({"prompt": pa.string(), "response": pa.string(), "messages": turns})


def test_columns_can_have_other_names():
    path = jsonl({"q": "Hi", "a": "Hello"}, {"chat": [USER]})

    records = read(path, prompt_column="q", response_column="a", messages_column="chat")

    assert [messages for messages, _ in records] == [(USER, ASSISTANT), (USER,)]


def test_limit_reads_no_further():
    path = jsonl({"prompt": "Hi"}, {"prompt": "Hi"}, {"nothing": 1})

    assert len(read(path, limit=2)) == 2


def test_a_byte_order_mark_windows_line_ends_and_unicode_separators_are_read_as_written():
    text = json.dumps({"prompt": "a\u2028b\rc"}, ensure_ascii=False)
    Path("data.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n" + text.encode() + b"\r\n")

    expected = {"role": "user", "content": "a\u2028b\rc"}
    assert read("data.jsonl") == [((expected,), "data.jsonl line 1"), ((expected,), "data.jsonl line 2")]


def test_an_empty_system_turn_is_kept_and_other_keys_of_a_message_are_not():
    path = jsonl({"messages": [{"role": "system", "content": ""}, {**USER, "id": 7}]})

    assert read(path)[0][0] == ({"role": "system", "content": ""}, USER)


def test_a_file_in_a_wheel_is_read_and_named_without_its_hash(monkeypatch):
    path = jsonl({"prompt": "Hi"}, {"prompt": 3}, name="inside.jsonl")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    source = f"wheel:some-data==1.2/data/inside.jsonl#sha256={digest}"
    monkeypatch.setattr("distillkit.data.locations.wheel_file", lambda asked: {source: Path(path).absolute()}[asked])

    assert read(source, limit=1) == [((USER,), "some-data==1.2/data/inside.jsonl line 1")]
    with pytest.raises(DataError, match=r"^some-data==1\.2/data/inside\.jsonl line 2, prompt must be a text"):
        read(source)


def test_a_hub_dataset_is_asked_for_its_split_and_configuration(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return [{"messages": [USER, ASSISTANT]}, {"messages": [ASSISTANT]}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    settings = {"split": "test", "hub_config": "small"}

    assert read("owner/name-v1.1", limit=1, **settings) == [((USER, ASSISTANT), "owner/name-v1.1 test row 1")]
    assert asked == [("owner/name-v1.1", "small", "test")]
    with pytest.raises(DataError, match=r"^owner/name-v1\.1 test row 2, messages, turn 1 is an assistant turn"):
        read("owner/name-v1.1", **settings)


def test_a_hub_dataset_that_can_not_be_loaded_is_one_error_that_says_why(monkeypatch):
    def load_dataset(*_, **__):
        raise FileNotFoundError("no such\ndataset")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)

    with pytest.raises(DataError, match=r"hub dataset owner/name can't be loaded.*\(no such dataset\)\.$"):
        read("owner/name")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "Hi"', r"is not valid JSON: Expecting ',' delimiter at column 16"),
        ('["Hi"]', r"is not an object but \['Hi'\] \(list\)"),
        ('{"text": "Hi", "id": 1}', r"has neither 'prompt' nor 'messages', only 'text', 'id'; name the right column"),
        ("{}", r"has neither 'prompt' nor 'messages', only nothing"),
        ('{"prompt": 3}', r", prompt must be a text, got 3 \(int\); write one string\.$"),
        ('{"prompt": [{"role": "user"}]}', r", prompt, turn 1 must be an object with role and content"),
        ('{"prompt": " \\n"}', r", prompt is an empty prompt; write the text or leave the row out"),
        ('{"prompt": "Hi", "response": " "}', r", response is an empty response; .* \(null in JSON\)"),
        ('{"prompt": "Hi", "response": 3}', r", response must be a text, got 3 \(int\)"),
        ("", r"is blank; delete the line"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(line, message):
    Path("data.jsonl").write_text(f'{{"prompt": "Hi"}}\n{line}\n{{"prompt": "Hi"}}\n', encoding="utf-8")

    with pytest.raises(DataError, match=rf"^data\.jsonl line 2 ?{message}"):
        read("data.jsonl")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", r" must be a list of messages with role and content, got 'Hi' \(str\)"),
        ([], r" must be a list of messages"),
        (["Hi"], r", turn 1 must be an object with role and content"),
        ([{"role": "user"}], r", turn 1 must be an object with role and content"),
        ([USER, {"role": "model", "content": "x"}], r", turn 2 has the unknown role 'model'; use one of system, user,"),
        ([{"role": ["user"], "content": "x"}], r", turn 1 has the unknown role \['user'\]"),
        ([{"role": "user", "content": None}], r", turn 1 must be a text, got None \(NoneType\)"),
        ([{"role": "user", "content": ""}], r", turn 1 is an empty prompt"),
        ([USER, {"role": "assistant", "content": "\n"}, USER], r", turn 2 is an empty response"),
        ([ASSISTANT, USER], r", turn 1 is an assistant turn with no user turn before it"),
        ([SYSTEM, ASSISTANT], r", turn 2 is an assistant turn with no user turn before it"),
        ([USER, USER], r", turn 2 is a second user turn in a row"),
        ([USER, ASSISTANT, ASSISTANT], r", turn 3 is a second assistant turn in a row"),
        ([USER, SYSTEM, ASSISTANT], r", turn 2 is a system turn after another turn"),
        ([SYSTEM], r" has no user turn"),
    ],
)
def test_a_bad_conversation_is_named_with_its_turn(messages, message):
    with pytest.raises(DataError, match=rf"^data\.jsonl line 2, messages{message}"):
        read(jsonl({"prompt": "Hi"}, {"messages": messages}))


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv"])
def test_a_file_without_rows_is_refused(name):
    Path(name).touch()

    with pytest.raises(DataError, match=rf"^{name} has no rows"):
        read(name)


def test_a_parquet_file_without_rows_is_refused():
    pq.write_table(pa.Table.from_pylist([], schema=parquet_schema()), "data.parquet")

    with pytest.raises(DataError, match=r"^data\.parquet has no rows"):
        read("data.parquet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,id\nHi,1\nHi\n", r"row 2 has 1 cells where the header has 2"),
        ("prompt,id\nHi,1\n\nHi,2\n", r"row 2 has 0 cells where the header has 2"),
        ('prompt\nHi\n"Hi\n', r"row 2 is not valid CSV: unexpected end of data"),
        ("prompt,prompt\nHi,Ho\n", r"names a column twice in its header, 'prompt', 'prompt'"),
        ("text\nHi\n", r"row 1 has neither 'prompt' nor 'messages', only 'text'"),
    ],
)
def test_a_bad_csv_is_named_with_its_row(text, message):
    Path("data.csv").write_text(text, encoding="utf-8")

    with pytest.raises(DataError, match=rf"^data\.csv {message}"):
        read("data.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b'{"prompt": "Hi"}\n{"prompt": "\xff"}\n', "line 2 is not UTF-8"),
        ("data.csv", b"prompt\nHi\n\xff\n", "is not UTF-8"),
        ("data.jsonl.gz", b'{"prompt": "Hi"}\n', "is damaged after line 0"),
        ("data.jsonl.gz", gzip.compress(b'{"prompt": "Hi"}\n' * 9, mtime=0)[:-9], "is damaged after line"),
        ("data.parquet", b'{"prompt": "Hi"}\n', "is not a readable Parquet file"),
    ],
)
def test_a_file_of_another_encoding_or_a_damaged_one_is_refused(name, content, message):
    Path(name).write_bytes(content)

    with pytest.raises(DataError, match=rf"^{name} {message}"):
        read(name)


@pytest.mark.parametrize(
    "path", ["data.jsonl", "data.JSON", "data.ndjson", "some/data.parquet", "./data", "/none/data", "a/b/c"]
)
def test_a_path_that_looks_like_a_missing_file_is_refused_before_anything_else(path):
    with pytest.raises(DataError, match=rf"^Source\.path: there is no file {path}"):
        Source(path).check()


def test_a_file_of_an_unknown_format_is_refused():
    Path("data.txt").write_text("[]", encoding="utf-8")

    with pytest.raises(DataError, match=r"data\.txt has an unknown format; convert it to one of \.jsonl, "):
        Source("data.txt").check()


def test_a_wheel_in_another_form_is_refused_without_a_download():
    with pytest.raises(ConfigError, match="wheel:NAME==VERSION/PATH"):
        Source("wheel:some-data/data.jsonl").check()


def test_a_file_of_an_unknown_format_in_a_wheel_is_refused_without_a_download():
    with pytest.raises(DataError, match=r"some-data==1\.2/data\.zip has an unknown format"):
        Source("wheel:some-data==1.2/data.zip").check()


def test_checking_reads_neither_the_file_nor_the_hub(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", None)
    Path("data.jsonl").write_text("no JSON", encoding="utf-8")

    Source("data.jsonl").check()
    Source("owner/name").check()
    Source("name").check()


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(ConfigError, match=rf"Source\.limit must be at least 1 \(null reads all rows\), got {limit}"):
        Source("data.jsonl", limit=limit)


@pytest.mark.parametrize("setting", [{"split": "test"}, {"hub_config": "small"}])
def test_a_setting_for_the_hub_is_refused_for_a_file(setting):
    with pytest.raises(ConfigError, match=r"choose within a hub dataset, but data\.jsonl is a file"):
        Source("data.jsonl", **setting)
