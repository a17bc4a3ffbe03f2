"""Merging of response stores, such as those of curation shards on several machines (`distillkit store merge`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distillkit.errors import ConfigError, StoreError
from distillkit.storage.dates import read_date, write_date
from distillkit.storage.index import Catalog, find
from distillkit.storage.rows import open_store, rows_by_shard
from distillkit.storage.shards import PROMPTS, NewShard, Shard

MERGED_BYTES = 64 * 2**20
"""Size at which a shard of the merged store is written, so that small shards are combined into large ones."""

Rows = list[tuple[Shard, NDArray[np.int32]]]
"""Shards, each with the indices of some of its rows."""


@dataclass(frozen=True)
class MergeCounts:
    """The result of merging one source into the target.

    Args:
        responses: Responses that were added.
        prompts: Prompts that were added.
        duplicates: Responses that the target had already, with the same tokens.
    """

    responses: int
    prompts: int
    duplicates: int


def merge(target: str, sources: Sequence[str]) -> list[str]:
    """Adds the responses and prompts of several stores to one store. Each source is added completely or not at all.

    Args:
        target: The store to add to; it is created if it does not exist.
        sources: The stores to read.

    Returns:
        A line for each source.

    Raises:
        ConfigError: If a store would be merged into itself.
        StoreError: If two stores hold different responses of the same provenance to one prompt.
    """
    opened = {source: open_store(source) for source in sources}
    into = open_store(target, "merge", new=True)
    for source, catalog in opened.items():
        if catalog.folder.root == into.folder.root:
            raise ConfigError(f"{source} can't be merged into itself: name another TARGET.")
    lines = []
    for source, catalog in opened.items():
        with into.folder.lock(into.process):
            into.refresh()
            _copy_date(into, catalog)
            counts = _add(into, catalog)
        lines.append(
            f"{source}: {counts.responses} responses and {counts.prompts} prompts added, "
            f"{counts.duplicates} responses were there already"
        )
    return lines


def _add(target: Catalog, source: Catalog) -> MergeCounts:
    missing = {key: _missing_rows(target, source, key) for key in source.provenances}  # checks all before any write
    missing[PROMPTS] = _missing_rows(target, source, PROMPTS)
    for key, rows in missing.items():
        provenance = source.provenances.get(key)
        label = PROMPTS if provenance is None else f"{provenance['writer']}-{key}"
        for table, first in _large_tables(source, rows):
            target.add([NewShard(label, key, provenance, table, first.generator, first.run, first.purpose)])
    counts = {key: sum(len(row_indices) for _, row_indices in rows) for key, rows in missing.items()}
    prompts, responses = counts.pop(PROMPTS), sum(counts.values())
    return MergeCounts(responses, prompts, sum(len(source.index(key)) for key in counts) - responses)


def _copy_date(target: Catalog, source: Catalog) -> None:
    """Gives the target the date that the source's prompts were rendered with, if it has none."""
    day = read_date(source.folder)
    if day is not None and read_date(target.folder) is None:
        write_date(target.folder, day)


def _missing_rows(target: Catalog, source: Catalog, key: str) -> Rows:
    """The rows of `source` that `target` does not have.

    Raises:
        StoreError: If the two hold different responses to one prompt.
    """
    runs = target.index(key).runs
    missing: Rows = []
    for shard, rows in rows_by_shard(source, key):
        locations = find(runs, source.open(shard).hashes[rows])
        is_missing = locations[:, 0] < 0
        if key != PROMPTS:
            _require_equal(target, source, shard, rows[~is_missing], locations[~is_missing])
        if is_missing.any():
            missing.append((shard, rows[is_missing]))
    return missing


def _require_equal(
    target: Catalog, source: Catalog, shard: Shard, rows: NDArray[np.int32], locations: NDArray[np.int32]
) -> None:
    """Compares the tokens of rows `[R]` of a source's shard with those at `[R, 2]` locations in the target."""
    opened = source.open(shard)
    for index in np.argsort(locations[:, 0], kind="stable").tolist():  # each of the target's shards is opened once
        row, (shard_index, target_row) = int(rows[index]), locations[index].tolist()
        target_shard = target.open(target.shards[shard_index])
        if opened.list_values("token_ids", row) != target_shard.list_values("token_ids", target_row):
            provenance, prompt_id = source.provenances[shard.key], opened.column("prompt_id")[row].as_py()
            raise StoreError(
                f"{source.folder} and {target.folder} hold different responses of {provenance['writer']} in round "
                f"{provenance['round']} to prompt {prompt_id}, so they can't be merged. Nothing of {source.folder} "
                "was added."
            )


def _large_tables(source: Catalog, rows: Rows) -> Iterator[tuple[pa.Table, Shard]]:
    """Yields the rows as tables of about `MERGED_BYTES`, each with the first of the shards that they come from.

    Only shards with equal metadata, of one generator, run and purpose, share a table.
    """
    pending: list[pa.Table] = []
    num_bytes = 0
    first: Shard | None = None
    for shard, row_indices in rows:
        table = source.open(shard).table.take(pa.array(row_indices, pa.int32()))
        differs = first is not None and (
            (shard.generator, shard.run, shard.purpose) != (first.generator, first.run, first.purpose)
            or table.schema.metadata != pending[0].schema.metadata
        )
        if first is not None and (differs or num_bytes >= MERGED_BYTES):
            yield pa.concat_tables(pending).combine_chunks(), first
            pending, num_bytes, first = [], 0, None
        pending.append(table)
        num_bytes += table.nbytes
        first = first or shard
    if first is not None:
        yield pa.concat_tables(pending).combine_chunks(), first
