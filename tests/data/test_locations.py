"""Prompts from folders, patterns, lists and revisions."""

import json
from pathlib import Path

import datasets
import pytest

from distillkit import DistillData
from distillkit.data.chat import encode
from distillkit.data.records import Source
from distillkit.errors import ConfigError, DataError
from distillkit.generators.file import FileGenerator
from distillkit.testing import tiny_tokenizer
from distillkit.types import Prompts, Sampling


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def jsonl(name, *prompts):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return name


def read(path, **settings):
    return [(record.messages[0]["content"], record.origin) for record in Source(path, **settings).records()]


def spellings(name):
    """The ways to name a folder in the current one."""
    return [name, f"./{name}", f"{name}/", str(Path(name).absolute())]


def test_a_saved_dataset_is_read_however_its_folder_is_named():
    datasets.Dataset.from_dict({"prompt": ["a", "b"], "response": [None, "c"]}).save_to_disk("saved")
    for path in spellings("saved"):
        assert read(path) == [("a", f"{path} train row 1"), ("b", f"{path} train row 2")]


def test_the_split_of_saved_datasets_is_a_choice():
    splits = {name: datasets.Dataset.from_dict({"prompt": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk("saved")
    assert read("./saved", split="test") == [("test", "./saved test row 1")]
    with pytest.raises(DataError, match=r"Source\.split: the saved dataset \./saved has train, test, not 'val'"):
        read("./saved", split="val")


def test_a_damaged_saved_dataset_is_one_error():
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk("saved")
    Path("saved/state.json").write_text("{")
    with pytest.raises(DataError, match=r"the folder saved is no readable dataset") as caught:
        read("saved")
    assert "\n" not in str(caught.value)


def test_a_folder_of_data_files_is_read_split_by_split():
    jsonl("folder/train-00000.jsonl", "a")
    jsonl("folder/train-00001.jsonl", "b")
    jsonl("folder/test.jsonl", "held out")
    for path in spellings("folder"):
        assert [prompt for prompt, _ in read(path)] == ["a", "b"]
    assert read("./folder", split="test") == [("held out", "./folder test row 1")]
    with pytest.raises(DataError, match=r"the folder \./folder can't be loaded with split 'val'"):
        read("./folder", split="val")


def test_a_pattern_names_files_in_the_order_of_their_names():
    jsonl("data/b.jsonl", "b")
    jsonl("data/a.jsonl", "a", "A")
    jsonl("data/deep/c.jsonl", "c")
    assert read("data/*.jsonl") == [
        ("a", "data/a.jsonl line 1"),
        ("A", "data/a.jsonl line 2"),
        ("b", "data/b.jsonl line 1"),
    ]
    assert [prompt for prompt, _ in read("data/**/*.jsonl")] == ["a", "A", "b", "c"]
    assert len(read("data/*.jsonl", limit=1)) == 1
    with pytest.raises(DataError, match=r"Source\.path: no file matches none/\*\.jsonl"):
        Source("none/*.jsonl").check()
    Path("data/x.txt").write_text("")
    with pytest.raises(DataError, match=r"data/x\.txt has an unknown format"):
        Source("data/*").check()


def test_a_file_whose_name_looks_like_a_pattern_is_that_file():
    assert read(jsonl("data[1].jsonl", "a")) == [("a", "data[1].jsonl line 1")]


def test_a_list_is_read_in_its_order():
    paths = [jsonl("b.jsonl", "b"), jsonl("a.jsonl", "a")]
    assert read(paths) == [("b", "b.jsonl line 1"), ("a", "a.jsonl line 1")]
    assert DistillData(paths).sources["train"] == paths
    with pytest.raises(DataError, match=r"there is no file none\.jsonl"):
        Source(["a.jsonl", "none.jsonl"]).check()
    with pytest.raises(ConfigError, match="empty list"):
        Source([])


def test_a_revision_is_that_of_a_hub_dataset(monkeypatch):
    asked = []

    def load_dataset(*args, **settings):
        asked.append((args, settings))
        return [{"prompt": "a"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read("owner/name", revision="v1") == [("a", "owner/name train row 1")]
    assert asked == [(("owner/name", None), {"split": "train", "revision": "v1"})]
    with pytest.raises(ConfigError, match=r"Source\.revision chooses within the hub, but a\.jsonl is no hub dataset"):
        Source("a.jsonl", revision="v1")


def test_responses_may_come_from_several_files():
    for name, prompt in (("a.jsonl", "a"), ("b.jsonl", "b")):
        Path(name).write_text(json.dumps({"prompt": prompt, "response": prompt.upper()}) + "\n")
    both, one = FileGenerator(["a.jsonl", "b.jsonl"]), FileGenerator("a.jsonl")
    assert both.identity() == FileGenerator("*.jsonl").identity() != one.identity()
    both.refresh(None, tokenizer := tiny_tokenizer())
    prompts = [encode(record, tokenizer, (1,), chat=False) for record in Source(["a.jsonl", "b.jsonl"]).records()]
    assert [response.text for response in both.generate(Prompts(tuple(prompts)), Sampling())] == ["A", "B"]
    Path("folder").mkdir()
    for path in ("owner/name", "folder"):
        with pytest.raises(ConfigError, match=rf"FileGenerator\.path must be a file, got '{path}'"):
            FileGenerator(path)
