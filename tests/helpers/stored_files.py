"""Every kind of stored file: a small one is written, and read again through the package."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillkit.chunked.output_head import OutputHead
from distillkit.storage.checkpoint_io import AtomicCheckpointIO
from distillkit.storage.checksum import checksum
from distillkit.storage.manifest import encode_manifest
from distillkit.storage.responses import Provenance, ResponseStore
from distillkit.storage.rows import open_store, stored_rows
from distillkit.storage.score_shards import Column
from distillkit.storage.scores import ScoreCache
from distillkit.teachers.metadata import TeacherMetadata, read_head, read_metadata, write_head, write_metadata
from distillkit.types import Prompt, Response, Sampling

PROVENANCE = Provenance("teacher", "0" * 16, Sampling(max_new_tokens=64), 0)
COLUMNS = {"logp": Column(torch.float16, (8,)), "ids": Column(torch.int32, (8,)), "own": Column(torch.float32)}
KEYS = [bytes([number]) * 16 for number in range(40)]
METADATA = TeacherMetadata("folder 0123", "0" * 16, 64)


@dataclass(frozen=True)
class Kind:
    """A kind of stored file.

    Args:
        name: Its name.
        write: Writes a file of the kind into a folder; returns its path.
        read: Reads it from the folder, in a form that `==` compares.
    """

    name: str
    write: Callable[[Path], Path]
    read: Callable[[Path], object]


def sign(path: Path, folder: Path) -> None:
    """Makes the checksums fit the file: its own if it is a manifest, and those that the manifests have of it."""
    for file in {*folder.glob("manifest-*.json"), *([path] if path.suffix == ".json" else [])}:
        try:
            manifest = json.loads(file.read_bytes())
            manifest.pop("checksum", None)
            for shard in manifest.get("shards", ()):
                if path.name == Path(shard["file"]).name and path.suffix == ".arrow":
                    shard |= {"bytes": path.stat().st_size, "checksum": checksum(path.read_bytes())}
            file.write_bytes(encode_manifest(manifest))
        except (ValueError, AttributeError, TypeError, KeyError):
            return


# ── the kinds ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_store(folder: Path) -> None:
    """A store with two shards of responses and one of prompts."""
    names = [f"{number:032x}" for number in range(24)]
    prompts = [Prompt(name, ({"role": "user", "content": f"What is {name}?"},), (1,)) for name in names]
    store = ResponseStore(folder)
    for start in (0, 12):
        rows = range(start, start + 12)
        store.write(PROVENANCE, [answer(names[row], row) for row in rows], prompts if start == 0 else (), "Generator")


def answer(name: str, number: int) -> Response:
    """A response whose content depends on its number alone."""
    tokens = tuple(range(number, 2 * number + 1))
    return Response(name, tokens, f"Answer «{number}»", "stop", tuple(-token / 8 for token in tokens))


def read_responses(folder: Path) -> object:
    """All that a store says of its responses."""
    store = ResponseStore(folder)
    return [vars(response) for response in store.read(PROVENANCE).values()], store.shards(), read_rows(folder)


def read_rows(folder: Path) -> object:
    """Responses with their prompts."""
    catalog = open_store(str(folder))
    return list(stored_rows(catalog, list(catalog.provenances)))


def store_file(pattern: str) -> Callable[[Path], Path]:
    """Writes a store; returns the first of its files that match."""

    def write(folder: Path) -> Path:
        write_store(folder)
        return min(folder.glob(pattern))

    return write


def scores_file(pattern: str) -> Callable[[Path], Path]:
    """Writes a score cache; returns the first of its files that match."""

    def write(folder: Path) -> Path:
        cache, generator = ScoreCache(folder, COLUMNS, {"teacher": "0" * 16}), torch.Generator().manual_seed(0)
        lengths = [number % 7 for number in range(len(KEYS))]
        count = sum(lengths)
        logp, target = (-torch.rand(count, *shape, generator=generator) for shape in ((8,), ()))
        ids = torch.randint(0, 1000, (count, 8), generator=generator, dtype=torch.int32)
        cache.write(KEYS, lengths, {"logp": logp.half(), "ids": ids, "own": target})
        cache.flush()
        return min(folder.glob(pattern))

    return write


def read_scores(folder: Path) -> object:
    """All rows of a score cache, and which of them it has."""
    cache = ScoreCache(folder, COLUMNS, {"teacher": "0" * 16})
    if cache.missing(KEYS):
        return cache.missing(KEYS)
    return {name: tensor.view(torch.uint8).tolist() for name, tensor in cache.read(KEYS).items()}


def write_teacher(folder: Path) -> Path:
    """The metadata of a teacher."""
    write_metadata(folder, METADATA)
    return folder / "teacher.json"


def write_teacher_head(folder: Path) -> Path:
    """The output head of a teacher."""
    torch.manual_seed(0)
    write_head(folder, METADATA, OutputHead(nn.Linear(8, 64), 64, 1.0, 30.0))
    return folder / "head.safetensors"


def read_teacher_head(folder: Path) -> object:
    """Weights, bias and settings of a teacher's head."""
    head = read_head(folder, METADATA, torch.device("cpu"))
    assert head is not None
    return [parameter.tolist() for parameter in head.module.parameters()], head.scale, head.softcap


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint as a trainer's."""
    torch.manual_seed(0)
    content: dict[str, Any] = {"state_dict": {"weight": torch.randn(64)}, "epoch": 3, "loops": {"done": [1, 2]}}
    AtomicCheckpointIO().save_checkpoint(content, folder / "last.ckpt")
    return folder / "last.ckpt"


def read_checkpoint(folder: Path) -> object:
    """The content of a checkpoint."""
    content = AtomicCheckpointIO().load_checkpoint(folder / "last.ckpt", weights_only=True)
    return content | {"state_dict": {name: tensor.tolist() for name, tensor in content["state_dict"].items()}}


KINDS = {
    kind.name: kind
    for kind in (
        Kind("responses", store_file("shards/teacher-*.arrow"), read_responses),
        Kind("prompts", store_file("shards/prompts-*.arrow"), read_responses),
        Kind("manifest of a store", store_file("manifest-*.json"), read_responses),
        Kind("scores", scores_file("*.safetensors"), read_scores),
        Kind("manifest of scores", scores_file("manifest-*.json"), read_scores),
        Kind("teacher.json", write_teacher, read_metadata),
        Kind("head of a teacher", write_teacher_head, read_teacher_head),
        Kind("checkpoint", write_checkpoint, read_checkpoint),
    )
}
