import json
import random

from distillkit.storage import files as store_files
from distillkit.storage import index as store_index
from distillkit.storage.index import Index, digests, find
from distillkit.storage.responses import ResponseStore
from distillkit.types import Prompt
from helpers.stores import TEACHER, by_id, responses


def test_the_index_finds_what_a_dictionary_finds():
    generator, index, expected = random.Random(1), Index(), {}
    for number in range(200):
        names = [str(generator.randrange(2000)) for _ in range(generator.randrange(1, 30))]
        index.add([(number, digests(names))])
        for row, name in enumerate(names):
            expected.setdefault(name, (number, row))  # of two answers the first
    every = [str(number) for number in range(2000)]
    found = [tuple(place) for place in find(index.runs, digests(every)).tolist()]
    assert found == [expected.get(name, (-1, -1)) for name in every]
    assert len(index) == len(expected) > 1000
    assert len(index.runs) < 12, "runs are merged"
    assert any(name.endswith(b"\0") for name in map(store_index.digest, every)), "or a zero at the end is not tested"


class Reads:
    """Counts which files are read."""

    def __init__(self, monkeypatch):
        self.files = []
        for name in ("read", "buffer"):
            monkeypatch.setattr(store_files.StoreFolder, name, self.counted(getattr(store_files.StoreFolder, name)))

    def counted(self, method):
        def read(folder, name):
            self.files.append(name)
            return method(folder, name)

        return read


def test_writing_and_reading_more_reads_nothing_again(tmp_path, monkeypatch):
    first, second = ResponseStore(tmp_path), ResponseStore(tmp_path, rank=1)
    for number in range(5):
        first.write(TEACHER, responses(f"first {number}"))
        second.write(TEACHER, responses(f"second {number}"))
    assert len(first.read(TEACHER)) == len(second.read(TEACHER)) == 10
    reads = Reads(monkeypatch)
    first.read(TEACHER).missing(["first 1", "x"])
    assert reads.files == []
    first.write(TEACHER, responses("first 5"))
    assert [name.rpartition("-")[2] for name in reads.files] == [], "what it wrote itself is known"
    first.read(TEACHER)
    assert len(reads.files) == 1, "the new shard"
    reads.files.clear()
    assert len(second.read(TEACHER)) == 11
    assert sorted(name.partition("-")[0] for name in reads.files) == ["manifest", "shards/teacher"]


def test_a_manifest_names_a_bounded_number_of_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(store_index, "SHARDS_PER_MANIFEST", 3)
    prompts = [Prompt(f"p{number}", ({"role": "user", "content": f"{number}?"},), (1,)) for number in range(8)]
    for half in (prompts[:4], prompts[4:]):
        store = ResponseStore(tmp_path)
        for prompt in half:
            store.write(TEACHER, responses(prompt.id), [prompt] if prompt.id in ("p1", "p2", "p5") else [])
    manifests = [json.loads(path.read_text())["shards"] for path in sorted(tmp_path.glob("manifest-*.json"))]
    assert [len(shards) for shards in manifests] == [3, 3, 3, 2]
    files = [shard["file"] for shards in manifests for shard in shards]
    assert sorted({tmp_path / file for file in files}) == sorted(tmp_path.rglob("*.arrow"))
    assert len(files) == 11
    assert ResponseStore(tmp_path).read(TEACHER) == by_id(responses(*(prompt.id for prompt in prompts)))
