"""Fuzzers of rows and data files: mutated files and wild rows are read or refused by name."""

import gzip
import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distillkit.data.chat import encode
from distillkit.data.records import Source
from distillkit.data.rows import METADATA, Columns, read_row
from helpers.fuzzing import any_text, any_value, fuzz, mutated
from helpers.models import END_ID, tiny_tokenizer

ROWS = [
    {"prompt": "What is two and two?", "response": "It is four.", "messages": None, "id": 1},
    {"prompt": "Grüße, 世界 🌊", "response": None, "messages": None, "id": 2},
    {
        "prompt": None,
        "response": None,
        "messages": [
            {"role": "system", "content": "Be kind"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello", "weight": 0},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Goodbye."},
        ],
        "id": 3,
    },
] * 3


def as_jsonl():
    return "".join(json.dumps(row, ensure_ascii=row["id"] == 2) + "\n" for row in ROWS).encode()


def as_csv():
    return 'prompt,response,id\n"What is ""two"", and two?",It is four.,1\n"two\nlines",世界,2\n'.encode()


def as_parquet(**settings):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file, **settings)
    return file.getvalue()


FILES = {
    "data.jsonl": as_jsonl(),
    "data.jsonl.gz": gzip.compress(as_jsonl(), mtime=0),
    "data.json": json.dumps(ROWS, indent=1).encode(),
    "data.csv": as_csv(),
    "data.tsv": as_csv().replace(b",", b"\t"),
    "data.parquet": as_parquet(),
    "plain.parquet": as_parquet(compression="none", use_dictionary=False),
    "zstd.parquet": as_parquet(compression="zstd", data_page_version="2.0", row_group_size=2),
}


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("name", FILES)
def test_mutated_files_are_read_or_refused(name, on_error, tmp_path):
    path = tmp_path / name

    def read(data):
        path.write_bytes(data)
        records = Source(str(path), on_error=on_error).records()
        assert all(record.messages for record in records)

    outcome = fuzz(f"{name} {on_error}", lambda rng: mutated(FILES[name], rng), read)
    assert outcome.refused["DataError"] > 0


KEYS = (
    *("prompt", "response", "messages", "completion", "system", "history", "input", "instruction", "tools"),
    *("role", "content", "weight", "train", "reasoning_content", "thinking", *sorted(METADATA)[:4]),
    *("conversations", "from", "value", "chosen", "rejected", "output", "tool_calls", "tool_call_id", "name"),
)


ROLES = ("system", "user", "assistant", "user", "assistant")


def any_message(rng, index):
    message = {"role": ROLES[index], "content": rng.choice(["Hi", any_text(rng, most=3) or "x"])}
    while rng.random() < 0.15:
        message[rng.choice(KEYS)] = any_value(rng, 1)
    return message


def any_row(rng: random.Random):
    row = {}
    if rng.random() < 0.5:
        row["messages"] = [any_message(rng, index) for index in range(rng.randrange(2), rng.randint(2, 5))]
    else:
        row |= {"prompt": any_text(rng, ("Hi ", "ho", "\n")), "completion": rng.choice([None, "Hello", any_value(rng)])}
    while rng.random() < 0.3:
        row[rng.choice(KEYS)] = any_value(rng)
    if rng.random() < 0.3 and "messages" in row:
        row[rng.choice(("conversations", "chosen"))] = row.pop("messages")
        row |= {"rejected": rng.choice(["No", row.get("chosen", None)])} if "chosen" in row else {}
    if rng.random() < 0.1:
        row["tools"] = rng.choice([[{"name": "f"}], '[{"name": "f"}]', [], "[", any_value(rng, 2)])
    return row if rng.random() < 0.95 else any_value(rng)


def test_any_row_is_read_or_refused():
    tokenizer = tiny_tokenizer()

    def read(row):
        record = read_row(row, "a.jsonl line 7", Columns())
        encode(record, tokenizer, (END_ID,), chat=True)

    outcome = fuzz("rows", any_row, read)
    assert outcome.accepted > 20
    assert outcome.refused["DataError"] > 20
