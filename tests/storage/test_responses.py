import json
import os
import random
import shutil
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pytest

from distillkit.errors import StoreError
from distillkit.storage import files as module
from distillkit.storage.responses import Provenance, ResponseStore
from distillkit.types import Prompt, Response, Sampling
from helpers.runs import finish, process
from helpers.stores import TEACHER, by_id, merge_into, responses, sign, stored, write_many


def test_gives_back_what_was_written(tmp_path):
    written = [
        Response("a", (0, 2**31 - 1), "one\ttwo «»", "stop", (-0.5, -2.25)),
        Response("b", (5,), "", "length"),
    ]
    ResponseStore(tmp_path / "new" / "folder").write(TEACHER, written)
    assert ResponseStore(tmp_path / "new" / "folder").read(TEACHER) == by_id(written)


def test_a_store_without_a_folder_is_empty_and_makes_none(tmp_path):
    store = ResponseStore(tmp_path / "none")
    assert store.read(TEACHER) == {}
    assert store.shards() == []
    assert not (tmp_path / "none").exists()


def test_several_shards_are_joined(tmp_path):
    store = ResponseStore(tmp_path)
    store.write(TEACHER, responses("a", "bb"))
    ResponseStore(tmp_path).write(TEACHER, responses("ccc"))
    assert store.read(TEACHER) == by_id(responses("a", "bb", "ccc"))


@pytest.mark.parametrize(
    "other",
    [
        Provenance("student", "abc", TEACHER.sampling, 0),
        Provenance("teacher", "xyz", TEACHER.sampling, 0),
        Provenance("teacher", "abc", Sampling(temperature=0.8, seed=8), 0),
        Provenance("teacher", "abc", Sampling(temperature=0.8, seed=7, top_k=3), 0),
        Provenance("teacher", "abc", TEACHER.sampling, 1),
    ],
    ids=["writer", "model", "seed", "top_k", "round"],
)
def test_each_provenance_has_responses_of_its_own(other, tmp_path):
    store = ResponseStore(tmp_path)
    store.write(TEACHER, responses("a"))
    assert store.read(other) == {}
    store.write(other, responses("a", "bb"))
    assert store.read(TEACHER).keys() == {"a"}
    assert store.read(other).keys() == {"a", "bb"}


def test_a_shard_says_where_its_responses_come_from(tmp_path):
    store = ResponseStore(tmp_path)
    store.write(TEACHER, responses("a", "bb"))
    (entry,) = store.shards()
    expected = {"writer": "teacher", "model": "abc", "round": 0, "responses": 2, "tokens": 6}
    assert {name: entry[name] for name in expected} == expected
    assert entry["sampling"] == {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "max_new_tokens": 256, "seed": 7}


def test_a_shard_can_be_read_without_this_package(tmp_path):
    store = ResponseStore(tmp_path)
    store.write(TEACHER, responses("a"))
    with pa.memory_map(str(tmp_path / store.shards()[0]["file"])) as source:
        table = pa.ipc.open_file(source).read_all()
    seed = TEACHER.sampling.seed_of(0, "a")
    row = {"prompt_id": "a", "token_ids": [2, 3, 1], "text": "text of a é\n", "finish": "stop", "seed": seed}
    assert table.drop_columns("id_hash").to_pylist() == [row | {"log_probs": []}]
    about = json.loads(table.schema.metadata[b"distillkit"])
    assert (about["schema"], about["model"], about["generator"]) == (3, "abc", "")
    assert about["versions"]["torch"] == metadata.version("torch")


def test_a_response_is_not_written_twice(tmp_path):
    store = ResponseStore(tmp_path)
    store.write(TEACHER, responses("a", "bb"))
    with pytest.raises(StoreError, match=r"already holds a response of teacher to prompt bb"):
        store.write(TEACHER, responses("bb", "ccc"))
    with pytest.raises(StoreError, match=r"already holds .* prompt a"):
        ResponseStore(tmp_path, rank=1).write(TEACHER, responses("a"))
    assert store.read(TEACHER).keys() == {"a", "bb"}


def test_ranks_read_what_all_of_them_wrote(tmp_path):
    stores = [ResponseStore(tmp_path, rank) for rank in range(3)]
    for store, name in zip(stores, ("a", "bb", "ccc"), strict=True):
        store.write(TEACHER, responses(name))
    assert len({shard["file"] for shard in stores[0].shards()}) == 3
    for store in (*stores, ResponseStore(tmp_path, rank=9)):
        assert store.read(TEACHER) == by_id(responses("a", "bb", "ccc"))


def killed_before_the_manifest(folder, monkeypatch, written):
    """Writes a shard and dies before a manifest names it."""
    write = module.write_atomically

    def die(path, data):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomically", die)
        with pytest.raises(KeyboardInterrupt):
            ResponseStore(folder).write(TEACHER, written)


def test_a_shard_that_no_manifest_names_does_not_exist_and_is_overwritten(tmp_path, monkeypatch):
    ResponseStore(tmp_path).write(TEACHER, responses("a"))
    killed_before_the_manifest(tmp_path, monkeypatch, responses("bb", "ccc"))
    orphans = set(tmp_path.rglob("*.arrow"))
    assert len(orphans) == 2
    store = ResponseStore(tmp_path)
    assert store.read(TEACHER).keys() == {"a"}
    store.write(TEACHER, responses("bb"))
    assert set(tmp_path.rglob("*.arrow")) == orphans
    assert ResponseStore(tmp_path).read(TEACHER) == by_id(responses("a", "bb"))


def test_a_kill_in_the_middle_of_a_file_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    def die(_):
        raise KeyboardInterrupt

    store = ResponseStore(tmp_path)
    store.write(TEACHER, responses("a"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        with pytest.raises(KeyboardInterrupt):
            store.write(TEACHER, responses("bb"))
    again = ResponseStore(tmp_path)
    assert again.read(TEACHER).keys() == {"a"}
    again.write(TEACHER, responses("bb"))
    assert ResponseStore(tmp_path).read(TEACHER).keys() == {"a", "bb"}


@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: b"", lambda text: b"\xff\xfe\x00"])
def test_a_damaged_manifest_is_an_error(damage, tmp_path):
    ResponseStore(tmp_path).write(TEACHER, responses("a"))
    manifest = tmp_path / "manifest-00000-00000.json"
    manifest.write_bytes(damage(manifest.read_bytes()))
    with pytest.raises(StoreError, match=r"-00000\.json is not valid JSON .* restore it or remove the store"):
        ResponseStore(tmp_path)
    with pytest.raises(StoreError, match=r"manifest-00000-00000\.json is not valid JSON"):
        ResponseStore(tmp_path, rank=1).read(TEACHER)


@pytest.mark.parametrize("text", ['{"schema": 1, "shards": []}', "{}", "[]", "null"])
def test_a_manifest_of_another_version_is_an_error(text, tmp_path):
    (tmp_path / "manifest-00000-00000.json").write_text(text)
    with pytest.raises(StoreError, match=r"has schema (1|None), this version reads 3: use another store folder"):
        ResponseStore(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "emptied", "removed"])
def test_a_damaged_shard_is_an_error(damage, tmp_path):
    store = ResponseStore(tmp_path)
    store.write(TEACHER, responses("a", "bb"))
    shard = tmp_path / store.shards()[0]["file"]
    if damage == "removed":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-30] if damage == "cut" else b"")
    problem = "can't be read" if damage == "removed" else "is damaged|can't be read"
    with pytest.raises(StoreError, match=rf"\.arrow ({problem}) .*: restore it or remove the store"):
        store.read(TEACHER)


@pytest.mark.parametrize(("change", "found"), [({"schema": 1}, "schema 1"), (None, "schema None")])
def test_a_shard_of_another_version_is_an_error(change, found, tmp_path):
    store = ResponseStore(tmp_path)
    store.write(TEACHER, responses("a"))
    path = tmp_path / store.shards()[0]["file"]
    with pa.OSFile(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    table = table.replace_schema_metadata(None if change is None else {"distillkit": json.dumps(change)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    sign(tmp_path)
    with pytest.raises(StoreError, match=rf"\.arrow is damaged \(it has {found}, this version reads 3\): restore"):
        ResponseStore(tmp_path).read(TEACHER)


def test_a_shard_with_fewer_rows_than_its_manifest_says_is_an_error(tmp_path):
    store = ResponseStore(tmp_path)
    store.write(TEACHER, responses("a", "bb"))
    other = ResponseStore(tmp_path / "other")
    other.write(TEACHER, responses("a"))
    (tmp_path / store.shards()[0]["file"]).write_bytes((tmp_path / "other" / other.shards()[0]["file"]).read_bytes())
    sign(tmp_path)
    with pytest.raises(StoreError, match=r"\.arrow is damaged \(it has 1 rows and its manifest says 2\)"):
        ResponseStore(tmp_path).read(TEACHER)


def test_what_was_read_does_not_change_when_more_is_written(tmp_path):
    store = ResponseStore(tmp_path)
    store.write(TEACHER, responses("a"))
    before = store.read(TEACHER)
    store.write(TEACHER, responses("bb"))
    assert list(before) == ["a"]
    assert "bb" not in before
    with pytest.raises(KeyError, match="bb"):
        before["bb"]


def test_responses_come_in_the_order_in_which_they_were_written(tmp_path):
    store = ResponseStore(tmp_path)
    names = [f"{number}" for number in random.Random(0).sample(range(100), 30)]
    for start in range(0, 30, 3):
        store.write(TEACHER, responses(*names[start : start + 3]))
    found = ResponseStore(tmp_path).read(TEACHER)
    assert list(found) == names
    assert len(found) == 30
    assert found.take(names[::-1]) == responses(*names[::-1])
    assert found.missing(["x", names[3], "y"]) == ["x", "y"]


def test_a_response_twice_in_one_call_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"already holds a response of teacher to prompt a"):
        ResponseStore(tmp_path).write(TEACHER, responses("a", "bb", "a"))
    assert ResponseStore(tmp_path).read(TEACHER) == {}


def test_prompts_are_kept_once(tmp_path):
    asked = [Prompt(name, ({"role": "user", "content": f"{name}?"},), (1, 2)) for name in ("a", "bb")]
    store, student = ResponseStore(tmp_path), Provenance("student", "abc", Sampling(), 0)
    store.write(TEACHER, responses("a"), asked[:1])
    store.write(student, responses("a", "bb"), asked)
    again = ResponseStore(tmp_path)
    again.write(student, responses("ccc"), [])
    files = sorted((tmp_path / "shards").glob("prompts-*.arrow"))
    found = []
    for file in files:
        with pa.OSFile(str(file)) as source:
            found += pa.ipc.open_file(source).read_all().drop_columns("id_hash").to_pylist()
    assert found == [{"prompt_id": name, "messages": [{"role": "user", "content": f"{name}?"}]} for name in ("a", "bb")]
    assert sum(shard["responses"] for shard in again.shards()) == 4, "prompts are no responses"


def test_two_runs_that_write_under_one_name_at_the_same_time_lose_nothing(tmp_path):
    one, two = ResponseStore(tmp_path), ResponseStore(tmp_path)
    for number in range(4):
        one.write(TEACHER, responses(f"one {number}"))
        two.write(TEACHER, responses(f"two {number}"))
    expected = {f"{name} {number}" for name in ("one", "two") for number in range(4)}
    for store in (one, two, ResponseStore(tmp_path)):
        assert store.read(TEACHER).keys() == expected


def test_two_processes_at_once_lose_nothing_of_one_store(tmp_path):
    with (
        process(write_many, str(tmp_path), "one") as one,
        process(write_many, str(tmp_path), "two") as two,
    ):
        assert finish(one) == finish(two) == 0
    expected = {f"{name} {number}" for name in ("one", "two") for number in range(30)}
    assert ResponseStore(tmp_path).read(TEACHER).keys() == expected
    assert set(stored(tmp_path).values()) == {1}


def test_two_merges_into_one_store_at_once_wait_for_each_other(tmp_path):
    sources = [tmp_path / name for name in ("one", "two")]
    for source in sources:
        write_many(source, source.name)
    ResponseStore(sources[1], part="more").write(TEACHER, responses("one 0"))  # both have it
    target = str(tmp_path / "target")
    with (
        process(merge_into, target, str(sources[0])) as one,
        process(merge_into, target, str(sources[1])) as two,
    ):
        assert finish(one) == finish(two) == 0
    assert ResponseStore(target).read(TEACHER).keys() == {
        f"{name} {number}" for name in ("one", "two") for number in range(30)
    }
    assert set(stored(Path(target)).values()) == {1}


def test_parts_and_ranks_write_files_of_different_names(tmp_path):
    stores = [ResponseStore(tmp_path, rank, part) for part in ("", "1of2", "2of2") for rank in (0, 1)]
    for number, store in enumerate(stores):
        store.write(TEACHER, responses(f"p{number}"))
    assert len(list(tmp_path.glob("manifest-*.json"))) == len(list(tmp_path.rglob("*.arrow"))) == 6
    assert len(ResponseStore(tmp_path).read(TEACHER)) == 6


def test_a_store_that_was_removed_is_empty_and_can_be_written_again(tmp_path):
    store = ResponseStore(tmp_path / "store")
    store.write(TEACHER, responses("a", "bb"))
    assert len(store.read(TEACHER)) == 2
    shutil.rmtree(tmp_path / "store")
    assert store.read(TEACHER) == {}
    store.write(TEACHER, responses("bb"))
    assert store.read(TEACHER) == by_id(responses("bb"))
