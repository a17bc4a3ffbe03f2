"""Reading a response store row by row, without a model and without torch."""

import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distillkit.errors import StoreError
from distillkit.run_folder import RESPONSES
from distillkit.storage.files import StoreFolder
from distillkit.storage.index import Catalog, digests, find, in_writing_order
from distillkit.storage.shards import PROMPTS, Shard


def open_store(path: str, process: str = "reader", new: bool = False) -> Catalog:
    """Opens the store at `path`.

    Args:
        path: Its folder, that of a run with a store, or another fsspec address.
        process: Name of this process, which becomes part of the names of the files that it writes.
        new: Whether the store may be empty or missing.

    Raises:
        StoreError: If there is no store, or it is damaged.
    """
    in_run = Path(path) / RESPONSES
    is_run = not new and in_run.is_dir() and not any(Path(path).glob("manifest-*"))
    folder = StoreFolder(in_run if is_run else path)
    catalog = Catalog(folder, process if folder.local is not None else f"{process}.{uuid.uuid4().hex[:8]}")
    if not new and not catalog.shards:
        raise StoreError(f"{path} is no response store: it has no manifest that lists a shard. Correct the path.")
    return catalog


def rows_by_shard(catalog: Catalog, key: str) -> Iterator[tuple[Shard, NDArray[np.int32]]]:
    """The shards of a provenance, or of the prompts, each with the rows to read, in the order of writing.

    A response that two processes wrote at the same time is in two shards, and is read from only one of them.
    """
    ordered = in_writing_order(catalog.index(key).runs)
    shard_indices, starts = np.unique(ordered[:, 0], return_index=True)
    for shard_index, rows in zip(shard_indices.tolist(), np.split(ordered[:, 1], starts[1:]), strict=False):
        yield catalog.shards[shard_index], rows


def chosen_keys(catalog: Catalog, writer: str | None = None, round_index: int | None = None) -> list[str]:
    """The provenance keys of a writer, of a round, or all of them, sorted by writer, round and model."""
    provenances = catalog.provenances
    keys = [
        key
        for key, provenance in provenances.items()
        if (writer is None or provenance["writer"] == writer)
        and (round_index is None or provenance["round"] == round_index)
    ]
    return sorted(keys, key=lambda key: (*(provenances[key][name] for name in ("writer", "round", "model")), key))


def stored_rows(catalog: Catalog, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields every response of some provenances as a dictionary, with its provenance and its prompt's messages.

    `messages` is None if the store does not have the prompt.
    """
    for key in keys:
        for shard, row_indices in rows_by_shard(catalog, key):
            rows = catalog.open(shard).table.take(pa.array(row_indices, pa.int32())).to_pylist()
            conversations = prompt_messages(catalog, [row["prompt_id"] for row in rows])
            for row, messages in zip(rows, conversations, strict=True):
                del row["id_hash"]
                notes = {"generator": shard.generator, "purpose": shard.purpose, "messages": messages}
                yield row | catalog.provenances[key] | notes


def prompt_messages(catalog: Catalog, prompt_ids: Sequence[str]) -> list[list[dict[str, str]] | None]:
    """The chat messages of each prompt; None for a prompt that is not in the store."""
    messages: list[list[dict[str, str]] | None] = []
    for shard_index, row in find(catalog.index(PROMPTS).runs, digests(prompt_ids)).tolist():
        in_store = shard_index >= 0
        messages.append(catalog.open(catalog.shards[shard_index]).column("messages")[row].as_py() if in_store else None)
    return messages
