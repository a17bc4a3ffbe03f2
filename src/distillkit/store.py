"""The response store: every response written, on disk, with where it came from.

A store is a folder with Arrow shards, and manifests that name them. Each writing process has manifests and shards of
its own. A shard is complete before a manifest names it, and both appear whole or not at all: a killed run leaves
nothing half-written behind, and what no manifest names does not exist. Beside the responses are the prompts that they
answer, each once, so that a store can be read and trained on without the data that it was made of.
"""

import functools
import hashlib
import importlib.metadata
import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distillkit.errors import StoreError
from distillkit.store_files import StoreFolder
from distillkit.store_index import PROMPTS, SCHEMA_VERSION, Catalog, Index, NewShard, Shard, digest, digests, find
from distillkit.types import Prompt, Response, Sampling

_IDS = [("prompt_id", pa.string()), ("id_hash", pa.binary(16))]
_RESPONSES = pa.schema(
    [
        *_IDS,
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish", pa.string()),
        ("seed", pa.uint64()),
        ("log_probs", pa.list_(pa.float32())),
    ]
)
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_PROMPTS = pa.schema([*_IDS, ("messages", _MESSAGES)])


@dataclass(frozen=True)
class Provenance:
    """Where a round's responses come from.

    Args:
        writer: Who wrote them: teacher, student, ...
        model: Fingerprint of the weights that wrote them.
        sampling: How they were drawn.
        round: Number of the round.
    """

    writer: str
    model: str
    sampling: Sampling
    round: int

    @property
    def key(self) -> str:
        """A short hash of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class Responses(Mapping[str, Response]):
    """The responses of one provenance by prompt id, as the store had them; each is read when it is used.

    Args:
        catalog: Opens the shards.
        index: Where each response is.
    """

    def __init__(self, catalog: Catalog, index: Index) -> None:
        self._catalog, self._shards, self._runs = catalog, catalog.shards, index.runs

    def __len__(self) -> int:
        return sum(len(ids) for ids, _ in self._runs)

    def __contains__(self, prompt_id: object) -> bool:
        return isinstance(prompt_id, str) and not self.missing([prompt_id])

    def __getitem__(self, prompt_id: str) -> Response:
        return self.take([prompt_id])[0]

    def __iter__(self) -> Iterator[str]:
        places = [places for _, places in self._runs]
        order = np.concatenate(places) if places else np.empty((0, 2), np.int32)
        for shard, row in order[np.lexsort((order[:, 1], order[:, 0]))].tolist():  # as they were written
            yield self._catalog.open(self._shards[shard]).column("prompt_id")[row].as_py()

    def missing(self, prompt_ids: Sequence[str]) -> list[str]:
        """Those of `prompt_ids` that have no response, in their order."""
        unknown = find(self._runs, digests(prompt_ids))[:, 0] < 0
        return [name for name, absent in zip(prompt_ids, unknown.tolist(), strict=True) if absent]

    def take(self, prompt_ids: Sequence[str]) -> list[Response]:
        """The response to each of `prompt_ids`; each file is opened once, however they are mixed.

        Raises:
            KeyError: If one has no response.
            StoreError: If a shard is damaged.
        """
        places = find(self._runs, digests(prompt_ids))
        found: dict[int, Response] = {}
        for number in np.argsort(places[:, 0], kind="stable").tolist():
            shard, row = places[number].tolist()
            if shard < 0:
                raise KeyError(prompt_ids[number])
            found[number] = self._response(self._shards[shard], row)
            assert found[number].prompt_id == prompt_ids[number], "128 bits stand for an id"
        return [found[number] for number in range(len(prompt_ids))]

    def _response(self, shard: Shard, row: int) -> Response:
        opened = self._catalog.open(shard)
        name, text, finish = (opened.column(column)[row].as_py() for column in ("prompt_id", "text", "finish"))
        return Response(name, opened.numbers("token_ids", row), text, finish, opened.numbers("log_probs", row))


class ResponseStore:
    """Reads and writes the responses in a folder.

    Args:
        folder: The store's folder, made when something is written: a local one, or any that fsspec can open.
        rank: Number of this process: it writes its own shards and manifests, and reads those of all.
        part: Name of the part of the work that this process and its ranks do, if others do the rest elsewhere: no
            two parts write files of one name.

    Raises:
        StoreError: If a manifest is damaged or of another schema version, or the folder can't be opened.
    """

    def __init__(self, folder: str | Path, rank: int = 0, part: str = "") -> None:
        self.folder = StoreFolder(folder)
        process = f"{part}.{rank:05d}" if part else f"{rank:05d}"
        if self.folder.local is None:  # where nothing can be locked, no two processes have the same name
            process += f".{uuid.uuid4().hex[:8]}"
        self.catalog = Catalog(self.folder, process)

    def shards(self) -> list[dict[str, Any]]:
        """Every shard of responses that a manifest names, with its provenance and counts."""
        self.catalog.refresh()
        known = self.catalog.provenances
        return [asdict(shard) | known[shard.key] for shard in self.catalog.shards if shard.key != PROMPTS]

    def read(self, provenance: Provenance) -> Responses:
        """The responses of one provenance, by prompt id."""
        self.catalog.refresh()
        return Responses(self.catalog, self.catalog.index(provenance.key))

    def write(
        self,
        provenance: Provenance,
        responses: Sequence[Response],
        prompts: Iterable[Prompt] = (),
        generator: str = "",
    ) -> None:
        """Adds responses of one provenance as a shard of their own, atomically.

        Args:
            provenance: Where they come from.
            responses: The responses; nothing is written for none.
            prompts: What they answer; the messages of those that the store has not yet are kept.
            generator: Name of the class that wrote them, for information.

        Raises:
            StoreError: If one of them is in the store already.
        """
        if not responses:
            return
        ids = [response.prompt_id for response in responses]
        with self.folder.lock(self.catalog.process):
            missing = self.read(provenance).missing(ids)
            twice = {name for name, count in Counter([*ids, *(set(ids) - set(missing))]).items() if count > 1}
            if twice:
                raise StoreError(
                    f"{self.folder} already holds a response of {provenance.writer} to prompt {min(twice)}."
                )
            key, about = provenance.key, asdict(provenance)
            table = _responses_table(provenance, responses, generator)
            shards = [NewShard(f"{provenance.writer}-{key}", key, about, table, generator)]
            unknown = self._unknown(prompts)
            if unknown:
                shards.insert(0, NewShard(PROMPTS, PROMPTS, None, _prompts_table(unknown)))
            self.catalog.add(shards)

    def _unknown(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        by_id = {prompt.id: prompt for prompt in prompts}
        found = find(self.catalog.index(PROMPTS).runs, digests(by_id))[:, 0]
        return [prompt for prompt, shard in zip(by_id.values(), found.tolist(), strict=True) if shard < 0]


def _responses_table(provenance: Provenance, responses: Sequence[Response], generator: str) -> pa.Table:
    ids = [response.prompt_id for response in responses]
    about = {**asdict(provenance), "generator": generator, "versions": _versions()}
    columns = {
        "prompt_id": ids,
        "id_hash": [digest(name) for name in ids],
        "token_ids": [response.token_ids for response in responses],
        "text": [response.text for response in responses],
        "finish": [response.finish for response in responses],
        "seed": [provenance.sampling.seed_of(provenance.round, name) for name in ids],
        "log_probs": [response.log_probs for response in responses],
    }
    return pa.table(columns, schema=_RESPONSES.with_metadata(_about(about)))


def _prompts_table(prompts: Sequence[Prompt]) -> pa.Table:
    ids = [prompt.id for prompt in prompts]
    messages = [[{"role": one["role"], "content": one["content"]} for one in prompt.messages] for prompt in prompts]
    columns = {"prompt_id": ids, "id_hash": [digest(name) for name in ids], "messages": messages}
    return pa.table(columns, schema=_PROMPTS.with_metadata(_about({})))


def _about(facts: Mapping[str, Any]) -> dict[str, str]:
    return {"distillkit": json.dumps({"schema": SCHEMA_VERSION, **facts})}


@functools.cache
def _versions() -> dict[str, str]:
    """Of the packages that responses may depend on, as far as they are installed."""
    found = {}
    for name in ("distillkit", "torch", "transformers", "vllm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
