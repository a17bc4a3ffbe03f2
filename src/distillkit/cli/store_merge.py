"""`distillkit store merge`: one store of several, such as those that shards of a curation wrote on their machines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from distillkit.cli.store_rows import open_store, rows_by_shard
from distillkit.errors import ConfigError, StoreError
from distillkit.store_index import PROMPTS, Catalog, NewShard, Shard, find

MERGED_BYTES = 64 * 2**20
"""Size from which a shard of the merged store is written: small ones become large ones."""

Rows = list[tuple[Shard, list[int]]]


@dataclass(frozen=True)
class Merged:
    """What became of a source.

    Args:
        responses: Responses that were added.
        prompts: Prompts that were added.
        known: Responses that were there already, with the same tokens.
    """

    responses: int
    prompts: int
    known: int


def merge(target: str, sources: Sequence[str]) -> list[str]:
    """Adds what several stores hold to one, each of them wholly or not at all.

    Args:
        target: The store that is added to; made if there is none.
        sources: The stores that are read.

    Returns:
        A line for each source.

    Raises:
        ConfigError: If a store is to be merged into itself.
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
            found = _add(into, catalog)
        lines.append(
            f"{source}: {found.responses} responses and {found.prompts} prompts added, "
            f"{found.known} responses were there already"
        )
    return lines


def _add(target: Catalog, source: Catalog) -> Merged:
    new = {key: _new_rows(target, source, key) for key in source.provenances}  # refuses before anything is written
    new[PROMPTS] = _new_rows(target, source, PROMPTS)
    for key, rows in new.items():
        about = source.provenances.get(key)
        label = PROMPTS if about is None else f"{about['writer']}-{key}"
        for table, generator in _large_tables(source, rows):
            target.add([NewShard(label, key, about, table, generator)])
    counts = {key: sum(len(places) for _, places in rows) for key, rows in new.items()}
    prompts, responses = counts.pop(PROMPTS), sum(counts.values())
    return Merged(responses, prompts, sum(len(source.index(key)) for key in counts) - responses)


def _new_rows(target: Catalog, source: Catalog, key: str) -> Rows:
    """The rows of `source` that `target` lacks."""
    runs, found = target.index(key).runs, []
    for shard, rows in rows_by_shard(source, key):
        opened = source.open(shard)
        places = find(runs, opened.hashes[rows])
        for row, (number, other) in zip(rows, places.tolist(), strict=True):
            if number < 0 or key == PROMPTS:
                continue
            if opened.numbers("token_ids", row) != target.open(target.shards[number]).numbers("token_ids", other):
                about, name = source.provenances[key], opened.column("prompt_id")[row].as_py()
                raise StoreError(
                    f"{source.folder} and {target.folder} hold different responses of {about['writer']} in round "
                    f"{about['round']} to prompt {name}: they can't be one store, and nothing of {source.folder} was "
                    "added."
                )
        missing = [row for row, (number, _) in zip(rows, places.tolist(), strict=True) if number < 0]
        if missing:
            found.append((shard, missing))
    return found


def _large_tables(source: Catalog, rows: Rows) -> Iterator[tuple[pa.Table, str]]:
    """The rows in tables of `MERGED_BYTES`, each of shards that say the same of themselves."""
    held: list[pa.Table] = []
    generator = ""
    for shard, places in rows:
        table = source.open(shard).table.take(pa.array(places, pa.int32()))
        differs = bool(held) and table.schema.metadata != held[0].schema.metadata
        if differs or sum(one.nbytes for one in held) >= MERGED_BYTES:
            yield pa.concat_tables(held).combine_chunks(), generator
            held = []
        held.append(table)
        generator = shard.generator
    if held:
        yield pa.concat_tables(held).combine_chunks(), generator
