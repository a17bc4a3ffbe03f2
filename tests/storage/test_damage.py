"""Forged files: nothing that a shard or a manifest says is taken for granted, though its checksum fits."""

import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from distillkit.errors import StoreError
from distillkit.storage import shards
from distillkit.storage.responses import ResponseStore
from distillkit.types import Response
from helpers.stores import TEACHER, responses, sign

# ── forged shards ─────────────────────────────────────────────────────────────────────────────────────────────────────


def forged(folder: Path, **columns: pa.Array) -> None:
    """A store with one response, some columns of which are replaced; the checksums fit."""
    store = ResponseStore(folder)
    store.write(TEACHER, responses("a"))
    path = folder / store.shards()[0]["file"]
    with pa.OSFile(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    for name, column in columns.items():
        index = table.schema.get_field_index(name)
        table = table.set_column(index, pa.field(name, column.type), column)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    sign(folder)


TOKENS = pa.int32()
FORGED = {
    "a negative token": {"token_ids": pa.array([[2, -3, 1]], pa.list_(TOKENS))},
    "a missing token": {"token_ids": pa.array([[2, None, 1]], pa.list_(TOKENS))},
    "a missing text": {"text": pa.array([None], pa.string())},
    "text that is not UTF-8": {"text": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())},
    "log-probabilities of other tokens": {"log_probs": pa.array([[-1.0, -1.0]], pa.list_(pa.float32()))},
    "a log-probability above 0": {"log_probs": pa.array([[-1.0, 0.5, -1.0]], pa.list_(pa.float32()))},
    "a log-probability that is none": {"log_probs": pa.array([[-1.0, float("nan"), -1.0]], pa.list_(pa.float32()))},
    "another end": {"finish": pa.array(["maybe"])},
    "other numbers": {"token_ids": pa.array([[2, 3, 1]], pa.list_(pa.int64()))},
    "text instead of numbers": {"token_ids": pa.array(["2 3 1"])},
}


@pytest.mark.parametrize("columns", FORGED.values(), ids=FORGED)
def test_a_forged_shard_is_refused_before_it_is_used(columns: dict[str, pa.Array], tmp_path: Path) -> None:
    forged(tmp_path, **columns)
    with pytest.raises(
        StoreError, match=r"teacher-.*\.arrow is damaged \(.*\): restore it or remove the store"
    ) as error:
        list(ResponseStore(tmp_path).read(TEACHER).values())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("offsets", [(0, 1_000_000), (-100_000, 77), (77, 0), (2**31 - 1, -(2**31))])
def test_patched_offsets_are_refused_before_they_are_used(offsets: tuple[int, int], tmp_path: Path) -> None:
    store = ResponseStore(tmp_path)
    store.write(TEACHER, [Response("a", tuple(range(77)), "text", "stop")])
    path = tmp_path / store.shards()[0]["file"]
    data = bytearray(path.read_bytes())
    start = data.rindex(struct.pack("<ii", 0, 77))  # behind the header, which has the 77 as well
    data[start : start + 8] = struct.pack("<ii", *offsets)
    path.write_bytes(data)
    sign(tmp_path)
    with pytest.raises(StoreError, match=r"\.arrow is damaged \(.*\): restore it or remove the store"):
        list(ResponseStore(tmp_path).read(TEACHER).values())


def test_an_id_under_another_hash_is_noticed(tmp_path: Path) -> None:
    forged(tmp_path, prompt_id=pa.array(["b"]))
    store = ResponseStore(tmp_path)
    for read in (lambda: store.read(TEACHER)["a"], lambda: list(store.read(TEACHER))):
        with pytest.raises(StoreError, match=r"is damaged \(a prompt's id and its hash differ\)"):
            read()


# ── forged manifests ──────────────────────────────────────────────────────────────────────────────────────────────────

OUTSIDE = ["/etc/passwd", "../shard.arrow", "shards/../../shard.arrow", "shards/.arrow", "shards/a\0.arrow", "a.arrow"]
ENTRIES: list[tuple[str, Any]] = [
    *(("file", path) for path in OUTSIDE),
    ("file", 3),
    ("responses", -1),
    ("file", "shards/a\ud83d.arrow"),
    ("responses", 0),
    ("responses", True),
    ("responses", 1.5),
    ("responses", 2**70),
    ("tokens", None),
    ("bytes", "12"),
    ("checksum", "x"),
    ("key", "another"),
    ("generator", []),
    ("more", 1),
]


@pytest.mark.parametrize(("name", "value"), ENTRIES)
def test_what_a_manifest_says_of_a_shard_is_checked(name: str, value: Any, tmp_path: Path) -> None:
    ResponseStore(tmp_path).write(TEACHER, responses("a"))
    sign(tmp_path, lambda manifest: manifest["shards"][0].update({name: value}))
    with pytest.raises(StoreError, match=r"manifest-00000-00000\.json, shard 0.* restore the manifest"):
        ResponseStore(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": None},
        {"shards": {"a": 1}},
        {"shards": ["a"]},
        {"provenances": []},
        {"provenances": {"a": {}}},
        {"provenances": {"a": {"writer": "x", "model": "y", "round": 0, "sampling": {}}}},
    ],
)
def test_what_a_manifest_says_besides_is_checked(change: dict[str, Any], tmp_path: Path) -> None:
    ResponseStore(tmp_path).write(TEACHER, responses("a"))
    sign(tmp_path, lambda manifest: manifest.update(change))
    with pytest.raises(StoreError, match=r"manifest-00000-00000\.json.*: restore the manifest"):
        ResponseStore(tmp_path)


def test_a_provenance_under_another_key_is_refused(tmp_path: Path) -> None:
    ResponseStore(tmp_path).write(TEACHER, responses("a"))
    sign(tmp_path, lambda manifest: manifest["provenances"][TEACHER.key].update(model="another"))
    with pytest.raises(StoreError, match=rf"provenance {TEACHER.key} is not the hash of its fields"):
        ResponseStore(tmp_path)


def test_the_schema_is_the_one_that_is_written() -> None:
    assert shards.SCHEMA_VERSION == 3
    assert shards.RESPONSE_COLUMNS.names == ["prompt_id", "id_hash", "token_ids", "text", "finish", "seed", "log_probs"]
