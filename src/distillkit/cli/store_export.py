"""`distillkit store export`: responses as conversations that anything can train on."""

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from distillkit.cli.store_rows import chosen_keys, open_store, stored_rows
from distillkit.errors import ConfigError, StoreError

ROWS_AT_ONCE = 4096
"""Rows of a Parquet group, and what is in memory at once."""

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_SAMPLING = [("temperature", pa.float64()), ("top_p", pa.float64())]
_SAMPLING += [(name, pa.int64()) for name in ("top_k", "max_new_tokens", "seed")]
_SCHEMA = pa.schema(
    [
        ("messages", _MESSAGES),
        ("prompt_id", pa.string()),
        ("writer", pa.string()),
        ("model", pa.string()),
        ("round", pa.int64()),
        ("finish", pa.string()),
        ("sampling", pa.struct(_SAMPLING)),
        ("generator", pa.string()),
    ]
)
_TOKENS = [pa.field("token_ids", pa.list_(pa.int32())), pa.field("log_probs", pa.list_(pa.float32()))]

_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train.parquet
---

# Responses

Conversations whose last turn was written by {writers}, with where each comes from: the writer's weights by their
fingerprint (`model`), how it was drawn (`sampling`), and whether the turn ended or was cut (`finish`). {count} rows,
exported from a response store of distillkit.
"""


def export(
    path: str,
    out: Path,
    form: Literal["jsonl", "datasets"] = "jsonl",
    writer: str | None = None,
    number: int | None = None,
    ended: bool = False,
    tokens: bool = False,
) -> list[str]:
    """Writes the responses of a store as conversations, each of which ends with the response.

    A response without text can't be learnt from, and one whose prompt is not in the store is no conversation: they are
    left out and counted.

    Args:
        path: The store.
        out: A file that ends in .jsonl or .jsonl.gz, or with `datasets` a folder; it must not exist.
        form: `jsonl`, or `datasets` for a folder with a Parquet file and a card, as the Hugging Face hub takes it.
        writer: Only the responses of one writer.
        number: Only those of one round.
        ended: Only those whose turn ended, none that was cut.
        tokens: Whether token ids and the writer's log-probabilities are exported too.

    Returns:
        What to tell the user.

    Raises:
        ConfigError: If `out` exists or has the wrong ending.
        StoreError: If there is nothing to export.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already: name another OUT, or remove it.")
    if form == "jsonl" and not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"OUT must end in .jsonl or .jsonl.gz, got {out}; `--format datasets` writes a folder.")
    catalog = open_store(path)
    left_out: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    schema = pa.schema([*_SCHEMA, *_TOKENS]) if tokens else _SCHEMA
    rows = _kept(stored_rows(catalog, chosen_keys(catalog, writer, number)), schema.names, ended, kept, left_out)
    with _new(out) as place:
        _write_jsonl(place, rows, out.name) if form == "jsonl" else _write_dataset(place, rows, schema, kept)
        reasons = [f"{count} left out: {reason}" for reason, count in sorted(left_out.items())]
        if not kept:
            raise StoreError("; ".join([f"{path} has no response to export", *reasons]) + ".")
    return [f"{out}: {sum(kept.values())} responses", *reasons]


def _kept(
    rows: Iterable[dict[str, Any]], names: list[str], ended: bool, kept: Counter[str], left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    for row in rows:
        if not row["messages"]:
            left_out["their prompts are not in the store"] += 1
        elif not row["text"].strip():
            left_out["they have no text"] += 1
        elif ended and row["finish"] != "stop":
            left_out["they were cut"] += 1
        else:
            kept[row["writer"]] += 1
            messages = [*row["messages"], {"role": "assistant", "content": row["text"]}]
            yield {name: messages if name == "messages" else row[name] for name in names}


@contextmanager
def _new(out: Path) -> Iterator[Path]:
    """A place beside `out`, which takes its name once it is complete."""
    place = out.with_name(f".{out.name}.unfinished")
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove(place)
    try:
        yield place
        place.rename(out)
    finally:
        _remove(place)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)


def _write_jsonl(place: Path, rows: Iterable[Mapping[str, Any]], name: str) -> None:
    with gzip.open(place, "wb") if name.endswith(".gz") else place.open("wb") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _write_dataset(place: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema, kept: Counter[str]) -> None:
    (place / "data").mkdir(parents=True)
    with pq.ParquetWriter(place / "data" / "train.parquet", schema) as writer:
        while part := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(part, schema))
    card = _CARD.format(writers=", ".join(sorted(kept)), count=sum(kept.values()))
    (place / "README.md").write_text(card)
