"""The response store: every generated response on disk, with its provenance.

A store is a folder with Arrow shards and the manifests that list them. Each process writes separate manifests and
shards. A shard is complete before a manifest lists it, and both are written atomically, so a killed run leaves no
half-written file; a file that no manifest lists is ignored. The prompts are stored too, each once, so that a store can
be read and trained on without the data set that its prompts came from.
"""

import functools
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
from distillkit.storage.admission import fault
from distillkit.storage.files import StoreFolder
from distillkit.storage.index import Catalog, Index, digest, digests, find, in_writing_order, provenance_key
from distillkit.storage.shards import (
    PROMPT_COLUMNS,
    PROMPTS,
    RESPONSE_COLUMNS,
    SCHEMA_VERSION,
    NewShard,
    Shard,
)
from distillkit.types import Prompt, Prompts, Response, Sampling


@dataclass(frozen=True)
class Provenance:
    """The origin of a round's responses.

    Args:
        writer: The model that generated them: teacher, student, ...
        model: Fingerprint of the weights that generated them.
        sampling: Settings with which they were sampled.
        round: Index of the round, from 0.
    """

    writer: str
    model: str
    sampling: Sampling
    round: int

    @property
    def key(self) -> str:
        """A short hash of all fields."""
        return provenance_key(asdict(self))


class Responses(Mapping[str, Response]):
    """The responses of one provenance by prompt id: a snapshot of the store, whose responses are read when used.

    Args:
        catalog: Opens the shards.
        index: Maps prompt ids to the rows of the shards.
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
        for shard_index, row in in_writing_order(self._runs).tolist():
            opened = self._catalog.open(self._shards[shard_index])
            prompt_id: str = opened.column("prompt_id")[row].as_py()
            self._require_id(self._shards[shard_index], digest(prompt_id), opened.column("id_hash")[row].as_py())
            yield prompt_id

    def missing(self, prompt_ids: Sequence[str]) -> list[str]:
        """The `prompt_ids` that have no response, in their order."""
        absent = find(self._runs, digests(prompt_ids))[:, 0] < 0
        return [prompt_id for prompt_id, is_absent in zip(prompt_ids, absent.tolist(), strict=True) if is_absent]

    def take(self, prompt_ids: Sequence[str]) -> list[Response]:
        """The response to each of `prompt_ids`, in their order. Each file is opened once, whatever the order.

        Raises:
            KeyError: If a prompt has no response.
            StoreError: If a shard is damaged.
        """
        locations = find(self._runs, digests(prompt_ids))
        responses: dict[int, Response] = {}
        for index in np.argsort(locations[:, 0], kind="stable").tolist():
            shard_index, row = locations[index].tolist()
            if shard_index < 0:
                raise KeyError(prompt_ids[index])
            responses[index] = self._response(self._shards[shard_index], row)
            self._require_id(self._shards[shard_index], responses[index].prompt_id, prompt_ids[index])
        return [responses[index] for index in range(len(prompt_ids))]

    def _require_id(self, shard: Shard, value: object, expected: object) -> None:
        if value != expected:  # of 10³⁸ pairs of ids, one has the same hash
            address = self._catalog.folder.address(shard.file)
            raise StoreError(f"{address} is damaged (a prompt's id and its hash differ): remove the store.")

    def _response(self, shard: Shard, row: int) -> Response:
        opened = self._catalog.open(shard)
        prompt_id, text, finish = (opened.column(column)[row].as_py() for column in ("prompt_id", "text", "finish"))
        token_ids, log_probs = (opened.list_values(column, row) for column in ("token_ids", "log_probs"))
        return Response(prompt_id, token_ids, text, finish, log_probs)


class ResponseStore:
    """Reads and writes the responses in a folder.

    Args:
        folder: The store's folder, local or a remote one that fsspec can open; it is created at the first write.
        rank: Rank of this process. It writes separate shards and manifests, and reads those of all ranks.
        part: Name of the part of the work that these ranks do, if other machines do the rest; it keeps the file names
            of two parts apart.

    Raises:
        StoreError: If a manifest is damaged or has another schema version, or the folder can't be opened.
    """

    def __init__(self, folder: str | Path, rank: int = 0, part: str = "") -> None:
        self.folder = StoreFolder(folder)
        process = f"{part}.{rank:05d}" if part else f"{rank:05d}"
        if self.folder.local is None:  # no locks there, so each process needs a unique name
            process += f".{uuid.uuid4().hex[:8]}"
        self.catalog = Catalog(self.folder, process)
        self._run = ""

    def shards(self) -> list[dict[str, Any]]:
        """Every shard of responses that a manifest lists, with its provenance and counts."""
        self.catalog.refresh()
        provenances = self.catalog.provenances
        return [asdict(shard) | provenances[shard.key] for shard in self.catalog.shards if shard.key != PROMPTS]

    def read(self, provenance: Provenance) -> Responses:
        """The responses of one provenance, by prompt id."""
        self.catalog.refresh()
        return Responses(self.catalog, self.catalog.index(provenance.key))

    def count_for(self, run: str) -> None:
        """Counts all responses that are written from now on for a run, under a name that is stored with them."""
        self._run = run

    def tokens_of(self, run: str) -> Counter[str]:
        """Tokens of the responses that all ranks have generated for a run, by writer."""
        self.catalog.refresh()
        tokens: Counter[str] = Counter()
        for shard in self.catalog.shards:
            if shard.run == run and shard.key != PROMPTS:
                tokens[self.catalog.provenances[shard.key]["writer"]] += shard.tokens
        return tokens

    def write(
        self,
        provenance: Provenance,
        responses: Sequence[Response],
        prompts: Iterable[Prompt] = (),
        generator: str = "",
    ) -> None:
        """Adds responses of one provenance as a new shard, atomically.

        Args:
            provenance: The origin of the responses.
            responses: Responses to store; nothing is written if there are none.
            prompts: The prompts that they answer; messages of prompts that are not in the store yet are added. If they
                are `Prompts`, their purpose is noted.
            generator: Description of the generator, for information.

        Raises:
            StoreError: If the store has a response to one of the prompts already; or if a response can't be stored
                (see `admission.fault`), in which case all others are.
        """
        self._write(provenance, responses, prompts, generator, skip_stored=False)

    def write_missing(
        self,
        provenance: Provenance,
        responses: Sequence[Response],
        prompts: Iterable[Prompt] = (),
        generator: str = "",
    ) -> int:
        """As `write`, but leaves out responses to prompts that another process has stored a response to.

        Returns:
            The number of responses that were stored.

        Raises:
            StoreError: If a response can't be stored; all others are.
        """
        return self._write(provenance, responses, prompts, generator, skip_stored=True)

    def _write(
        self,
        provenance: Provenance,
        responses: Sequence[Response],
        prompts: Iterable[Prompt],
        generator: str,
        skip_stored: bool,
    ) -> int:
        by_id = {prompt.id: prompt for prompt in prompts}
        faults = {
            index: fault(one, by_id.get(one.prompt_id) if isinstance(one.prompt_id, str) else None)
            for index, one in enumerate(responses)
        }
        faults = {index: reason for index, reason in faults.items() if reason}
        sound = [response for index, response in enumerate(responses) if index not in faults]
        if sound:
            with self.folder.lock(self.catalog.process):
                sound = self._without_stored(provenance, sound, skip_stored)
                if sound:
                    bad_ids = {str(responses[index].prompt_id) for index in faults}
                    new_prompts = [prompt for name, prompt in by_id.items() if name not in bad_ids and _is_text(prompt)]
                    purpose = prompts.purpose if isinstance(prompts, Prompts) else ""
                    self.catalog.add(self._shards(provenance, sound, new_prompts, generator, purpose))
        if faults:
            index = min(faults)
            raise StoreError(
                f"{len(faults)} of {len(responses)} responses by {provenance.writer} can't be stored, such as the one "
                f"to prompt {str(responses[index].prompt_id)[:64]!r}: {faults[index]}. The other "
                f"{len(responses) - len(faults)} are stored: mend the generator and run the same command again."
            )
        return len(sound)

    def _without_stored(self, provenance: Provenance, responses: list[Response], skip_stored: bool) -> list[Response]:
        """The responses that are not in the store yet; call it while holding the lock."""
        ids = [response.prompt_id for response in responses]
        missing = set(self.read(provenance).missing(ids))
        counts = Counter(ids if skip_stored else [*ids, *(set(ids) - missing)])
        duplicates = {prompt_id for prompt_id, count in counts.items() if count > 1}
        if duplicates:
            raise StoreError(
                f"{self.folder} already holds a response of {provenance.writer} to prompt {min(duplicates)}."
            )
        return [response for response in responses if response.prompt_id in missing]

    def _shards(
        self, provenance: Provenance, responses: list[Response], prompts: list[Prompt], generator: str, purpose: str
    ) -> list[NewShard]:
        """The responses as a shard, after one with the prompts that are not in the store yet."""
        key, table = provenance.key, _responses_table(provenance, responses, generator)
        shard = NewShard(f"{provenance.writer}-{key}", key, asdict(provenance), table, generator, self._run, purpose)
        shard_indices = find(self.catalog.index(PROMPTS).runs, digests(prompt.id for prompt in prompts))[:, 0].tolist()
        new_prompts = [prompt for prompt, index in zip(prompts, shard_indices, strict=True) if index < 0]
        return [*([NewShard(PROMPTS, PROMPTS, None, _prompts_table(new_prompts))] if new_prompts else ()), shard]


def _responses_table(provenance: Provenance, responses: Sequence[Response], generator: str) -> pa.Table:
    ids = [response.prompt_id for response in responses]
    metadata = {**asdict(provenance), "generator": generator, "versions": _versions()}
    columns = {
        "prompt_id": ids,
        "id_hash": [digest(prompt_id) for prompt_id in ids],
        "token_ids": [response.token_ids for response in responses],
        "text": [response.text for response in responses],
        "finish": [response.finish for response in responses],
        "seed": [provenance.sampling.seed_of(provenance.round, prompt_id) for prompt_id in ids],
        "log_probs": [response.log_probs for response in responses],
    }
    return pa.table(columns, schema=RESPONSE_COLUMNS.with_metadata(_schema_metadata(metadata)))


def _is_text(prompt: Prompt) -> bool:
    """True if role and content are the whole of a prompt, and not its tools or tool calls besides."""
    return all(not message.keys() & {"tools", "tool_calls"} for message in prompt.messages)


def _prompts_table(prompts: Sequence[Prompt]) -> pa.Table:
    ids = [prompt.id for prompt in prompts]
    messages = [
        [{"role": message["role"], "content": message["content"]} for message in prompt.messages] for prompt in prompts
    ]
    columns = {"prompt_id": ids, "id_hash": [digest(prompt_id) for prompt_id in ids], "messages": messages}
    return pa.table(columns, schema=PROMPT_COLUMNS.with_metadata(_schema_metadata({})))


def _schema_metadata(values: Mapping[str, object]) -> dict[str, str]:
    """Metadata of an Arrow schema: the store's version and `values`, as JSON."""
    return {"distillkit": json.dumps({"schema": SCHEMA_VERSION, **values})}


@functools.cache
def _versions() -> dict[str, str]:
    """Versions of the installed packages that responses may depend on."""
    versions = {}
    for name in ("distillkit", "torch", "transformers", "vllm"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
