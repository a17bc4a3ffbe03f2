import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distillkit.errors import StoreError
from distillkit.storage import atomic
from distillkit.storage import scores as module
from distillkit.storage.scores import Column, ScoreCache

COLUMNS = {
    "hidden": Column(torch.bfloat16, (3,)),
    "ids": Column(torch.uint16, (2,)),
    "own": Column(torch.float32),
}
SETTINGS = {"teacher": "abc", "keep": "hidden"}
MANIFEST = "manifest-00000.json"


def cache(folder, rank=0, **settings):
    return ScoreCache(folder, COLUMNS, SETTINGS | settings, rank)


def key(number):
    """A key that ends in zeros, as one in 256 does."""
    return number.to_bytes(2, "big") + bytes(14)


def rows(lengths, seed=0):
    """Tensors of rows of these lengths, as the columns want them."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    return {
        "hidden": torch.randn(count, 3, generator=generator).bfloat16(),
        "ids": torch.randint(0, 2**16, (count, 2), generator=generator).to(torch.uint16),
        "own": torch.randn(count, generator=generator),
    }


def filled(folder, numbers, lengths, seed=0, rank=0):
    """A cache to which these rows were added, and their tensors."""
    tensors = rows(lengths, seed)
    found = cache(folder, rank)
    found.write([key(number) for number in numbers], lengths, tensors)
    found.flush()
    return found, tensors


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_gives_back_what_was_written_in_the_order_asked_for(tmp_path):
    found, tensors = filled(tmp_path / "new" / "folder", [7, 1, 300], [2, 5, 1])
    for again in (found, cache(tmp_path / "new" / "folder")):
        assert_same(again.read([key(7), key(1), key(300)]), tensors)
        order = torch.tensor([7, 2, 3, 4, 5, 6, 7])
        picked = {
            name: tensor.view(torch.int16)[order].view(torch.uint16) if name == "ids" else tensor[order]
            for name, tensor in tensors.items()
        }
        assert_same(again.read([key(300), key(1), key(300)]), picked)
        assert_same(again.read([]), rows([0]))


def test_missing_names_each_unknown_key_once_in_order(tmp_path):
    found, _ = filled(tmp_path, [1, 2], [1, 1])
    assert found.missing([key(3), key(1), key(0), key(3)]) == [key(3), key(0)]
    assert cache(tmp_path / "none").missing([key(1), key(1)]) == [key(1)]
    assert not (tmp_path / "none").exists()
    assert found.missing([]) == []


def test_a_shard_is_written_once_enough_has_come_together(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 6 * 14)  # 14 bytes a position
    found = cache(tmp_path)
    for number in range(5):
        found.write([key(number)], [2], rows([2], seed=number))
    shards = json.loads((tmp_path / MANIFEST).read_text())["shards"]
    assert [(shard["file"], shard["rows"], shard["positions"]) for shard in shards] == [
        ("00000-00000.safetensors", 3, 6)
    ]
    assert shards[0]["bytes"] == (tmp_path / shards[0]["file"]).stat().st_size
    assert found.missing([key(4)]) == [], "what is not on disk yet counts as known"
    assert cache(tmp_path).missing([key(number) for number in range(5)]) == [key(3), key(4)]
    assert_same(
        found.read([key(4), key(0)]),
        {
            name: torch.cat(
                [rows([2], seed=4)[name].view(torch.uint8), rows([2], seed=0)[name].view(torch.uint8)]
            ).view(column.dtype)
            for name, column in COLUMNS.items()
        },
    )
    assert cache(tmp_path).missing([key(number) for number in range(5)]) == []


def test_a_row_without_positions_may_be_kept(tmp_path):
    found, tensors = filled(tmp_path, [1, 2, 3], [2, 0, 1])
    assert_same(found.read([key(2)]), rows([0]))
    assert_same(found.read([key(1), key(2), key(3)]), tensors)


def test_a_row_is_not_written_twice(tmp_path):
    found, _ = filled(tmp_path, [1, 2], [1, 1])
    with pytest.raises(StoreError, match=f"already holds the row {key(2).hex()}"):
        found.write([key(3), key(2)], [1, 1], rows([1, 1]))
    with pytest.raises(StoreError, match=f"already holds the row {key(4).hex()}"):
        found.write([key(4), key(4)], [1, 1], rows([1, 1]))
    found.write([key(5)], [1], rows([1]))
    with pytest.raises(StoreError, match=f"already holds the row {key(5).hex()}"):
        found.write([key(5)], [1], rows([1]))


def test_a_row_that_is_not_there_is_an_error(tmp_path):
    found, _ = filled(tmp_path, [1], [1])
    with pytest.raises(StoreError, match=f"has no scores of the row {key(9).hex()}"):
        found.read([key(1), key(9)])


def test_ranks_see_what_others_wrote_after_refresh(tmp_path):
    first, second = cache(tmp_path, 0), cache(tmp_path, 1)
    tensors = rows([2, 1])
    for own, rank in ((first, 0), (second, 1)):
        part = slice(0, 2) if rank == 0 else slice(2, 3)
        own.write([key(rank)], [2 - rank], {name: tensor[part] for name, tensor in tensors.items()})
        own.flush()
    assert first.missing([key(0), key(1)]) == [key(1)]
    first.refresh()
    assert_same(first.read([key(0), key(1)]), tensors)
    assert_same(cache(tmp_path, 5).read([key(0), key(1)]), tensors)


def test_two_runs_that_write_into_one_folder_lose_nothing(tmp_path):
    one, other = cache(tmp_path), cache(tmp_path)
    one.write([key(1), key(2)], [1, 1], rows([1, 1], seed=1))
    other.write([key(2), key(3)], [1, 1], rows([1, 1], seed=2))
    one.flush()
    other.flush()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    again = cache(tmp_path)
    assert again.missing([key(1), key(2), key(3)]) == []
    assert torch.equal(again.read([key(2)])["hidden"], rows([1, 1], seed=1)["hidden"][1:]), "the first one's"
    one.refresh()
    assert_same(one.read([key(3)]), again.read([key(3)]))


def test_a_shard_can_be_read_without_this_package(tmp_path):
    _, tensors = filled(tmp_path, [2, 1], [1, 2])
    found = load_file(tmp_path / "00000-00000.safetensors")
    assert bytes(found.pop("keys")[0].tolist()) == key(2)
    assert found.pop("starts").tolist() == [0, 1, 3]
    assert found.pop("checksums").shape == (2,)
    assert_same(found, tensors)


def test_a_shard_that_no_manifest_names_does_not_exist_and_is_overwritten(tmp_path, monkeypatch):
    write = atomic.write_atomically

    def die(path, data):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, data)

    filled(tmp_path, [1], [1])
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomically", die)
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path, [2], [2])
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert cache(tmp_path).missing([key(1), key(2)]) == [key(2)]
    filled(tmp_path, [2], [2])
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert cache(tmp_path).missing([key(1), key(2)]) == []


def test_a_kill_in_the_middle_of_a_file_leaves_the_cache_as_it_was(tmp_path, monkeypatch):
    def die(_):
        raise KeyboardInterrupt

    filled(tmp_path, [1], [1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path, [2], [2])
    assert cache(tmp_path).missing([key(1), key(2)]) == [key(2)]


@pytest.mark.parametrize("damage", ["cut", "emptied", "removed"])
def test_a_damaged_shard_is_an_error(damage, tmp_path):
    filled(tmp_path, [1], [9])
    shard = tmp_path / "00000-00000.safetensors"
    if damage == "removed":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-30] if damage == "cut" else b"")
    with pytest.raises(StoreError, match=r"\.safetensors can't be read \(.*\): restore it or remove the teacher cache"):
        cache(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": 2, "sha', r"is not valid JSON .* restore it or remove the teacher cache"),
        ('{"schema": 9, "shards": []}', r"has schema 9, this version reads 2: use another teacher cache folder"),
    ],
)
def test_a_damaged_manifest_or_one_of_another_version_is_an_error(text, words, tmp_path):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(StoreError, match=words) as caught:
        cache(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_settings_are_an_error_that_names_them(tmp_path):
    filled(tmp_path, [1], [1])
    with pytest.raises(StoreError, match=r"with teacher abc, and this run has xyz: use another teacher cache folder"):
        cache(tmp_path, teacher="xyz")
    with pytest.raises(StoreError, match=r"with vocab None, and this run has 5"):
        cache(tmp_path, vocab=5)
    with pytest.raises(StoreError, match=r"with columns .*bfloat16.*, and this run has .*float32"):
        ScoreCache(tmp_path, COLUMNS | {"hidden": Column(torch.float32, (3,))}, SETTINGS)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell memory from mapped files")
def test_memory_does_not_grow_with_the_cache(tmp_path):
    """32 MiB in 8 shards; a row of each is read. Mapped pages are the system's to drop and don't count."""
    wide, length = {"hidden": Column(torch.float32, (2**10,))}, 2**10
    written = ScoreCache(tmp_path, wide, SETTINGS)
    for number in range(8):
        written.write([key(number), key(100 + number)], [length - 1, 1], {"hidden": torch.zeros(length, 2**10)})
        written.flush()
    before = own_memory()
    found = ScoreCache(tmp_path, wide, SETTINGS)
    assert found.read([key(100 + number) for number in range(8)])["hidden"].shape == (8, 2**10)
    assert own_memory() - before < 4 * 2**10


def own_memory():
    """KiB of this process that no file holds."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])
