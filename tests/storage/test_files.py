import pytest
from fsspec.core import url_to_fs

from distillkit.errors import StoreError
from distillkit.storage.responses import ResponseStore
from distillkit.types import Response
from helpers.stores import TEACHER, by_id, responses


def test_what_a_killed_writer_left_beside_its_files_is_removed_and_that_of_others_is_not(tmp_path):
    ResponseStore(tmp_path).write(TEACHER, responses("a"))
    own, others = tmp_path / "shards" / ".x-00000-000001.arrow.77", tmp_path / "shards" / ".x-1of2.00000-000001.arrow.7"
    for path in (own, others):
        path.touch()
    ResponseStore(tmp_path).write(TEACHER, responses("bb"))
    assert not own.exists()
    assert others.exists()


@pytest.fixture
def elsewhere(tmp_path):
    """An address that fsspec opens, and that only this test uses."""
    address = f"memory://{tmp_path.name}/store"
    yield address
    url_to_fs("memory://")[0].store.clear()


def test_a_store_may_be_anywhere_that_fsspec_can_open(elsewhere, tmp_path):
    one, two = ResponseStore(elsewhere), ResponseStore(elsewhere)
    assert one.read(TEACHER) == {}
    written = [Response("a", (1, 2), "one", "stop", (-0.5, -1.0)), Response("bb", (3,), "", "length")]
    one.write(TEACHER, written)
    assert two.read(TEACHER) == by_id(written)
    two.write(TEACHER, responses("ccc"))
    with pytest.raises(StoreError, match=rf"{elsewhere} already holds .* prompt ccc"):
        one.write(TEACHER, responses("ccc"))
    assert one.read(TEACHER).keys() == {"a", "bb", "ccc"}
    assert list(tmp_path.iterdir()) == []


def test_damage_elsewhere_is_an_error_that_names_the_file(elsewhere):
    store = ResponseStore(elsewhere)
    store.write(TEACHER, responses("a"))
    filesystem, root = url_to_fs(elsewhere)
    shard = store.shards()[0]["file"]
    filesystem.pipe_file(f"{root}/{shard}", filesystem.cat_file(f"{root}/{shard}")[:-9])
    with pytest.raises(StoreError, match=rf"{elsewhere}/{shard} is damaged \(it has \d+ bytes and its manifest"):
        ResponseStore(elsewhere).read(TEACHER)
    filesystem.rm(f"{root}/{shard}")
    with pytest.raises(StoreError, match=rf"{elsewhere}/{shard} can't be read"):
        ResponseStore(elsewhere).read(TEACHER)
    (manifest,) = filesystem.glob(f"{root}/manifest-*.json")
    filesystem.pipe_file(manifest, b"{")
    with pytest.raises(StoreError, match=rf"{elsewhere}/manifest-.* is not valid JSON"):
        ResponseStore(elsewhere)


def test_a_file_address_is_the_local_folder(tmp_path):
    ResponseStore(f"file://{tmp_path}/store").write(TEACHER, responses("a"))
    assert ResponseStore(tmp_path / "store").read(TEACHER) == by_id(responses("a"))
    ResponseStore(tmp_path / "store").write(TEACHER, responses("bb"))
    assert [path.name for path in (tmp_path / "store").glob("manifest-*")] == ["manifest-00000-00000.json"]


def test_an_address_that_nothing_opens_is_an_error():
    with pytest.raises(StoreError, match=r"nowhere://x can't be opened as a store \(Protocol not known"):
        ResponseStore("nowhere://x")
