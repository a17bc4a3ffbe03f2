"""Rows in the formats that people have: told by their columns, said in the log, refused where they are ambiguous."""

import gzip
import json
import logging
from pathlib import Path

import pyarrow as pa
import pytest

from distillkit.data.chat import encode, prompt_id
from distillkit.data.formats import Columns
from distillkit.data.records import Source
from distillkit.data.rows import read_row
from distillkit.data.turns import api_request
from distillkit.errors import DataError
from helpers.models import CHAT_TEMPLATE, END_ID, tiny_tokenizer

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind"}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(row, **columns):
    return read_row(row, "a.jsonl line 7", Columns(**columns))


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


SHAREGPT = [human("Hi"), gpt("Hello")]
ROWS = {
    "plain": [
        ({"prompt": "Hi", "response": "Hello"}, (USER, ASSISTANT)),
        ({"prompt": "Hi"}, (USER,)),
    ],
    "trl": [
        ({"prompt": "Hi", "completion": "Hello"}, (USER, ASSISTANT)),
        ({"prompt": [USER], "completion": [ASSISTANT]}, (USER, ASSISTANT)),
    ],
    "openai": [
        ({"messages": [USER, ASSISTANT]}, (USER, ASSISTANT)),
        ({"messages": json.dumps([USER, ASSISTANT])}, (USER, ASSISTANT)),
        ({"messages": [{"role": "developer", "content": "Be kind"}, USER, ASSISTANT]}, (SYSTEM, USER, ASSISTANT)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]}]}, (USER,)),
        ({"messages": [USER, ASSISTANT], "parallel_tool_calls": False}, (USER, ASSISTANT)),
    ],
    "sharegpt": [
        ({"conversations": SHAREGPT}, (USER, ASSISTANT)),
        ({"conversations": [{"from": "system", "value": "Be kind"}, *SHAREGPT]}, (SYSTEM, USER, ASSISTANT)),
        ({"conversations": SHAREGPT, "system": "Be kind", "tools": ""}, (SYSTEM, USER, ASSISTANT)),
        ({"conversation": [USER, ASSISTANT]}, (USER, ASSISTANT)),
        ({"conversations": json.dumps(SHAREGPT), "messages": None}, (USER, ASSISTANT)),
    ],
    "alpaca": [
        ({"instruction": "Hi", "input": "", "output": "Hello"}, (USER, ASSISTANT)),
        ({"instruction": "H", "input": "i", "output": "Hello"}, ({"role": "user", "content": "H\n\ni"}, ASSISTANT)),
        ({"instruction": "Hi", "output": "Hello", "history": [["Hi", "Hello"]]}, (USER, ASSISTANT) * 2),
        ({"instruction": "Hi", "output": "", "system": "Be kind"}, (SYSTEM, USER)),
        ({"instruction": "Hi", "response": "Hello"}, (USER, ASSISTANT)),
    ],
    "preference": [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Ho"}, (USER, ASSISTANT)),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": "Ho"}]}, (USER, ASSISTANT)),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "Ho"}]}, (USER, ASSISTANT)),
        (
            {
                "prompt": "Hi",
                "chosen": [USER, ASSISTANT],
                "rejected": [USER, {**ASSISTANT, "content": "Ho"}],
                "messages": [USER, ASSISTANT],
                "score_chosen": 9.0,
            },
            (USER, ASSISTANT),
        ),
        ({"chosen": SHAREGPT, "rejected": [human("Hi"), gpt("Ho")], "system": "Be kind"}, (SYSTEM, USER, ASSISTANT)),
    ],
}
CASES = [(name, row, messages) for name, cases in ROWS.items() for row, messages in cases]


@pytest.mark.parametrize(("name", "row", "messages"), CASES)
def test_the_format_of_a_row_is_told_by_its_columns_or_named(name, row, messages):
    for setting in ("auto", name):
        record = read(row, format=setting)
        assert record.messages == messages
        assert record.rejected == ({**ASSISTANT, "content": "Ho"} if name == "preference" else None)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "plain"])
def test_a_row_of_another_format_than_the_named_one_is_refused(name):
    for row in ({"prompt": "Hi"}, ROWS["sharegpt" if name == "alpaca" else "alpaca"][0][0]):
        with pytest.raises(DataError, match=rf"^a\.jsonl line 7 is no row of the format {name}: it has no '\w+', only"):
            read(row, format=name)


REFUSED = [
    (
        {"messages": [USER], "conversations": SHAREGPT},
        r" has two conversations, 'messages' and 'conversations'; list one",
    ),
    ({"conversations": SHAREGPT, "prompt": "Ho"}, r" has 'conversations' and another text in 'prompt'"),
    ({"conversations": SHAREGPT, "instruction": "Hi"}, r" has columns .* no effect: 'instruction'"),
    ({"prompt": "Hi", "instruction": "Hi"}, r" has columns .* no effect: 'instruction'"),
    ({"instruction": "Hi", "output": "Hello", "response": "Hello"}, r" has columns .* no effect: 'output'"),
    ({"conversations": [human("Hi"), {"from": "bot", "value": "x"}]}, r", conversations, turn 2 has the unknown role"),
    ({"conversations": [{**human("Hi"), "weight": 1}]}, r", conversations, turn 1 is a user turn to be trained on"),
    ({"conversations": [{"from": "human"}]}, r", conversations, turn 1 must be an object with role and content"),
    ({"conversations": [gpt("Hello")]}, r", conversations, turn 1 is an assistant turn with no user turn before it"),
    ({"messages": "[{"}, r", messages is not valid JSON"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, r", part 1 is no text"),
    ({"messages": [{"role": "user", "content": ["Hi"]}]}, r", messages, turn 1, part 1 is no text but 'Hi'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "bold": True}]}]},
        r", part 1 is no text",
    ),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, r", turn 2 is a tool turn after a user's"),
    ({"messages": [USER, ASSISTANT], "tools": 3}, r", tools must be a list of functions"),
    (
        {"messages": [USER, ASSISTANT], "tools": [{"type": "function"}]},
        r", tools must be a list of functions with a name",
    ),
    ({"messages": [{**USER, "tool_calls": [{"name": "f"}]}]}, r", turn 1 is a user turn with tool calls"),
    ({"prompt": "Hi", "chosen": "Hello"}, r" is half of a pair: it has no 'rejected'"),
    ({"chosen": "Hello", "rejected": "Ho"}, r" has neither 'prompt' nor 'messages', only"),
    (
        {"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "?"}, ASSISTANT]},
        r" that answer different prompts",
    ),
    ({"chosen": [USER], "rejected": [USER]}, r", chosen, turn 1 ends with a user turn; end it with an answer"),
    ({"prompt": "Ho", "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, r"another text in 'prompt'"),
    ({"prompt": "Hi", "chosen": "Hello", "rejected": "Ho", "messages": [USER]}, r"no effect: 'messages'"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED)
def test_an_ambiguous_or_broken_row_is_refused_in_a_line(row, message):
    with pytest.raises(DataError, match=rf"^a\.jsonl line 7.*{message}") as refusal:
        read(row)
    assert str(refusal.value).isprintable()


def test_the_log_says_the_format_and_what_became_of_the_columns(caplog):
    rows = [{"id": 3, "conversations": SHAREGPT, "system": "Be kind", "nots": ""}, {"prompt": "Hi"}]
    Path("data.json").write_text(json.dumps(rows))
    with caplog.at_level(logging.INFO, "distillkit"):
        Source("data.json").records()
    assert caplog.messages == [
        "data.json: 1 in the format sharegpt, such as data.json row 1: 'conversations' is the conversation, 'system' "
        "is the system message, no effect: 'id'",
        "data.json: 1 in the format plain, such as data.json row 2: 'prompt' is the prompt",
        "data.json: without a value in any row, and without effect: 'nots'",
    ]


# ── tools ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

TOOL_TEMPLATE = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for call in message.tool_calls or [] %}"
    "<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}",
)
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
TOOL_ROWS = {
    "openai": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "12:00", "tool_call_id": "c1"},
            ASSISTANT,
        ],
        "tools": [TOOL],
    },
    "sharegpt": {
        "conversations": [
            human("Hi"),
            {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'},
            {"from": "observation", "value": "12:00"},
            gpt("Hello"),
        ],
        "tools": json.dumps([TOOL]),
    },
}


@pytest.mark.parametrize("name", TOOL_ROWS)
def test_tools_calls_and_results_are_rendered_and_the_calls_are_trained_on(name):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    prompt = encode(read(TOOL_ROWS[name]), tokenizer, (END_ID,), chat=True, system="Be kind")
    text = tokenizer.decode(prompt.reference_ids)
    assert text.startswith('<|im_start|>tools\n[{"type": "function", "function": {"name": "clock"')
    assert "<|im_start|>system\nBe kind" in text
    assert "<|im_start|>tool\n12:00<|im_end|>" in text
    trained = [token for token, mask in zip(prompt.reference_ids, prompt.reference_mask, strict=True) if mask]
    assert tokenizer.decode(trained) == '<call>clock {"zone": "UTC"}</call><|im_end|>Hello<|im_end|>'
    plain = read({"messages": [USER, ASSISTANT, USER, ASSISTANT]}).messages
    assert prompt.id != prompt_id(plain[:-1])


def test_a_last_answer_that_calls_a_tool_is_a_response():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    row = {"messages": TOOL_ROWS["openai"]["messages"][:2], "tools": [TOOL]}
    prompt = encode(read(row), tokenizer, (END_ID,), chat=True)
    assert prompt.reference == '<call>clock {"zone": "UTC"}</call>'


def test_tools_that_the_template_does_not_write_are_refused():
    for row in ({"messages": [USER, ASSISTANT], "tools": [TOOL]}, {"messages": TOOL_ROWS["openai"]["messages"]}):
        with pytest.raises(DataError, match=r"does not write the tool(s|_calls) of the row, such as 'clock'"):
            encode(read(row), tiny_tokenizer(), (END_ID,), chat=True)
    with pytest.raises(DataError, match="has tools, which plain text can't hold"):
        encode(read({"prompt": "Hi", "tools": [TOOL]}), tiny_tokenizer(), (END_ID,), chat=False)


def test_a_server_gets_tools_and_calls_in_its_form():
    messages = read(TOOL_ROWS["sharegpt"]).messages
    request = api_request(messages)
    assert request["tools"] == [TOOL]
    assert [message["role"] for message in request["messages"]] == ["user", "assistant", "tool", "assistant"]
    (call,) = request["messages"][1]["tool_calls"]
    assert call == {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    assert "tools" not in request["messages"][0]
    assert api_request((USER,)) == {"messages": [USER]}


def test_a_row_of_calls_without_a_name_or_with_more_than_that_is_refused():
    for call, message in (
        ({"function": {"name": 3}}, "must have a name and arguments"),
        ({"function": {"name": "f", "arguments": "{"}}, "is not valid JSON"),
        ({"name": "f", "arguments": {}, "weight": 2}, "has keys that would have no effect: 'weight'"),
        ("f", "is not valid JSON"),
    ):
        calls = call if isinstance(call, str) else [call]
        with pytest.raises(DataError, match=rf"^a\.jsonl line 7, messages, turn 2, tool_calls {message}"):
            read({"messages": [USER, {"role": "assistant", "tool_calls": calls}]})


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

LINES = [{"prompt": "Hi", "response": "Hello"}, {"prompt": "Ho", "response": "Hello"}]


def zstd(content):
    with pa.CompressedOutputStream("packed", "zstd") as file:
        file.write(content)
    return Path("packed").read_bytes()


JSONL = "\n".join(map(json.dumps, LINES)).encode()
FILES = {
    "data.json": json.dumps(LINES, indent=1).encode(),
    "lines.json": JSONL,
    "data.ndjson": JSONL,
    "data.tsv": b"prompt\tresponse\nHi\tHello\nHo\tHello\n",
    "data.csv.gz": gzip.compress(b"prompt,response\nHi,Hello\nHo,Hello\n", mtime=0),
    "data.json.gz": gzip.compress(json.dumps(LINES).encode()),
    "data.jsonl.zst": JSONL,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_by_its_ending(name):
    Path(name).write_bytes(zstd(FILES[name]) if name.endswith("zst") else FILES[name])
    records = Source(name).records()
    assert [[message["content"] for message in record.messages] for record in records] == [
        ["Hi", "Hello"],
        ["Ho", "Hello"],
    ]
    assert [record.origin.rpartition(" ")[2] for record in records] == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "data.json",
            b'[{"prompt": "Hi"},\n {"prompt": }\n]',
            r" is not valid JSON: Expecting value at line 2, column 13",
        ),
        ("data.json", b'{"data": [\n{"prompt": "Hi"}]}', r" is one object, with the keys 'data'; write a list"),
        ("data.json", b"[1, 2]", r": 2 of 2 rows can't be used; the first is: data\.json row 1 is not an object"),
        ("data.jsonl.zst", b"prompt", r" is damaged after line 0"),
        ("data.json.gz", gzip.compress(b"[]", mtime=0)[:-4], r" is damaged \("),
        ("data.csv.gz", gzip.compress(b"prompt\nHi\n" * 99, mtime=0)[:-9], r" is damaged after row"),
    ],
)
def test_a_damaged_file_is_named(name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^{name}{message}"):
        Source(name).records()


def test_all_bad_rows_of_a_file_are_listed_at_once(caplog):
    Path("data.jsonl").write_text('{"prompt": "Hi"}\n' + '{"prompt": 3}\n' * 25)
    with (
        caplog.at_level(logging.DEBUG, "distillkit"),
        pytest.raises(
            DataError, match=r"^data\.jsonl: 25 of 26 rows can't be used; the first is: data\.jsonl line 2, "
        ),
    ):
        Source("data.jsonl").records()
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors[0].startswith("bad row: data.jsonl line 2, prompt must be a text")
    assert errors[19].startswith("bad row: data.jsonl line 21, ")
    assert errors[20:] == ["bad row: 5 more"]
    assert sum(record.levelname == "DEBUG" for record in caplog.records) == 5, "the log of a run has the rest"
