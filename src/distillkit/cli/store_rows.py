"""What a store holds, row by row, without a model and without torch."""

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from distillkit.errors import StoreError
from distillkit.store_files import StoreFolder
from distillkit.store_index import PROMPTS, Catalog, Shard, digests, find


def open_store(path: str, process: str = "reader", new: bool = False) -> Catalog:
    """The store at `path`.

    Args:
        path: Its folder, or another address of fsspec's.
        process: Name under which something may be written to it.
        new: Whether there may be none yet.

    Raises:
        StoreError: If there is none, or it is damaged.
    """
    folder = StoreFolder(path)
    catalog = Catalog(folder, process if folder.local is not None else f"{process}.{uuid.uuid4().hex[:8]}")
    if not new and not catalog.shards:
        raise StoreError(f"{path} is no response store: it has no manifest that names a shard. Correct the path.")
    return catalog


def rows_by_shard(catalog: Catalog, key: str) -> Iterator[tuple[Shard, list[int]]]:
    """The shards of a provenance, or of the prompts, each with its rows that are read, in the order of writing.

    A response that two processes wrote at the same time is in two shards, and is read from one.
    """
    places = [places for _, places in catalog.index(key).runs]
    joined = np.concatenate(places) if places else np.empty((0, 2), np.int32)
    ordered = joined[np.lexsort((joined[:, 1], joined[:, 0]))]
    numbers, starts = np.unique(ordered[:, 0], return_index=True)
    for number, rows in zip(numbers.tolist(), np.split(ordered[:, 1], starts[1:]), strict=False):
        yield catalog.shards[number], rows.tolist()


def chosen_keys(catalog: Catalog, writer: str | None = None, number: int | None = None) -> list[str]:
    """The keys of the provenances of one writer or one round, or all, by writer, round and model."""
    about = catalog.provenances
    keys = [
        key
        for key in about
        if (writer is None or about[key]["writer"] == writer) and (number is None or about[key]["round"] == number)
    ]
    return sorted(keys, key=lambda key: (about[key]["writer"], about[key]["round"], about[key]["model"], key))


def stored_rows(catalog: Catalog, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every response of some provenances as a dictionary, with where it comes from and its prompt's messages.

    `messages` is None where the store has no such prompt.
    """
    for key in keys:
        for shard, rows in rows_by_shard(catalog, key):
            found = catalog.open(shard).table.take(pa.array(rows, pa.int32())).to_pylist()
            messages = prompt_messages(catalog, [row["prompt_id"] for row in found])
            for row, asked in zip(found, messages, strict=True):
                del row["id_hash"]
                yield row | catalog.provenances[key] | {"generator": shard.generator, "messages": asked}


def prompt_messages(catalog: Catalog, prompt_ids: Sequence[str]) -> list[list[dict[str, str]] | None]:
    """The chat messages of each prompt; None for one that is not in the store."""
    found: list[list[dict[str, str]] | None] = []
    for number, row in find(catalog.index(PROMPTS).runs, digests(prompt_ids)).tolist():
        known = number >= 0
        found.append(catalog.open(catalog.shards[number]).column("messages")[row].as_py() if known else None)
    return found
