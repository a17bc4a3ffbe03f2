"""Prompts from folders, patterns, lists and revisions."""

import json
import lzma
import os
import re
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
    assert read("./folder", split="test") == [("held out", "./folder/test.jsonl line 1")]
    with pytest.raises(DataError, match=r"the folder \./folder can't be loaded with split 'val'"):
        read("./folder", split="val")


def test_files_of_a_folder_are_read_as_files_that_are_named():
    Path("folder").mkdir()
    text = "prompt,response\nCode of Namibia?,NA\nNothing in Python?,None\n007,8.0\n"
    Path("folder/a.csv").write_text(text, encoding="utf-8")
    records = Source("./folder").records()
    assert [record.messages[-1]["content"] for record in records] == ["NA", "None", "8.0"]
    assert [record.origin for record in records] == [f"./folder/a.csv row {number}" for number in (1, 2, 3)]
    jsonl("dates/a.jsonl", "2024-01-01")
    jsonl("dates/b.jsonl", "b")
    assert read("dates") == [("2024-01-01", "dates/a.jsonl line 1"), ("b", "dates/b.jsonl line 1")]
    status = Path("dates/b.jsonl").stat()
    jsonl("dates/b.jsonl", "c")
    os.utime("dates/b.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read("dates")[1][0] == "c", "nothing is remembered by a file's date"
    Path("dates/b.jsonl").write_text('{"prompt": "b')
    with pytest.raises(DataError, match=r"^dates/b\.jsonl line 1 is not valid JSON"):
        read("dates")


def test_a_part_of_a_split_of_a_folder_is_read():
    jsonl("folder/train.jsonl", *"abcdefghij")
    jsonl("folder/test.jsonl", "held out")
    assert [prompt for prompt, _ in read("folder", split="train[:20%]")] == ["a", "b"]
    assert read("folder", split="train[9:]+test")[0] == ("j", "folder/train.jsonl line 10")
    assert read("folder", split="train[9:]+test")[1][0] == "held out"
    for split in ("train[:x]", "none", "none[:5]"):
        with pytest.raises(DataError, match=rf"the folder folder can't be loaded with split '{re.escape(split)}'"):
            read("folder", split=split)


def test_a_folder_with_files_that_would_not_be_read_is_refused():
    jsonl("splits/train.jsonl", "a")
    jsonl("splits/extra.jsonl", "b")
    with pytest.raises(
        DataError, match=r"splits has files that belong to no split: extra\.jsonl; its splits are train"
    ):
        read("splits")
    card = "---\nconfigs:\n- config_name: default\n  data_files: extra.jsonl\n---\n"
    Path("splits/README.md").write_text(card)
    assert read("splits") == [("b", "splits/extra.jsonl line 1")]
    jsonl("formats/a.jsonl", "a")
    jsonl("formats/b.jsonl", "b")
    jsonl("formats/.hidden/d.jsonl", "d")
    Path("formats/c.csv").write_text("prompt\nc\n")
    with pytest.raises(DataError, match=r"formats has files that belong to no split: c\.csv; its splits are train"):
        read("formats")
    Path("formats/c.csv").unlink()
    assert [prompt for prompt, _ in read("formats")] == ["a", "b"]


def test_a_folder_is_read_through_links_and_no_link_in_it_is_left_out():
    jsonl("real/a.jsonl", "a")
    Path("link").symlink_to("real")
    for path in ("./link", "real/../link", str(Path("link").absolute())):
        assert read(path) == [("a", f"{path}/a.jsonl line 1")]
    jsonl("data/b.jsonl", "b")
    Path("data/sub").symlink_to("../real")
    with pytest.raises(DataError, match=r"data has files that belong to no split: sub/a\.jsonl"):
        read("data")
    Path("data/sub").unlink()
    Path("data/a.jsonl").symlink_to("../real/a.jsonl")
    assert [prompt for prompt, _ in read("data")] == ["a", "b"]
    Path("real/a.jsonl").unlink()
    with pytest.raises(DataError, match=r"data/a\.jsonl is a link to a file that is not there"):
        read("data")


def test_a_folder_without_all_its_shards_is_refused():
    jsonl("folder/train-00000-of-00003.jsonl", "a")
    jsonl("folder/train-00002-of-00003.jsonl", "c")
    with pytest.raises(DataError, match=r"has 2 of the 3 files of train: number 00001 is missing"):
        read("folder")
    jsonl("folder/train-00001-of-00003.jsonl", "b")
    assert [prompt for prompt, _ in read("folder")] == ["a", "b", "c"]


def test_files_that_the_datasets_library_reads_are_read_with_the_reason_of_an_error():
    Path("folder").mkdir()
    packed = Path("folder/a.json.xz")
    packed.write_bytes(lzma.compress(json.dumps([{"prompt": "a"}, {"prompt": "b"}]).encode()))
    assert read("folder") == [("a", "folder train row 1"), ("b", "folder train row 2")]
    packed.write_bytes(lzma.compress(b'{"prompt": "a'))
    with pytest.raises(DataError, match=r"the folder folder can't be loaded .*JSON parse error"):
        read("folder")


def test_a_hub_dataset_of_csv_files_keeps_texts_that_look_like_nothing(monkeypatch):
    class Rows(list):
        builder_name = "csv"

    def load_dataset(*_, keep_default_na=True, **__):
        return Rows([{"prompt": "a", "response": None if keep_default_na else "NA"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert Source("owner/name").records()[0].messages[-1]["content"] == "NA"


def test_a_saved_format_hides_no_column():
    rows = datasets.Dataset.from_dict({"prompt": ["a"], "response": ["b"]})
    rows.set_format(columns=["prompt"])
    rows.save_to_disk("saved")
    assert [message["content"] for message in Source("saved").records()[0].messages] == ["a", "b"]


def test_a_broken_link_among_files_of_a_pattern_is_refused():
    jsonl("data/a.jsonl", "a")
    Path("data/b.jsonl").symlink_to("none.jsonl")
    with pytest.raises(DataError, match=r"data/b\.jsonl is a link to a file that is not there"):
        Source("data/*.jsonl").check()
    Path("data/none.jsonl").write_text('{"prompt": "b"}\n')
    assert [prompt for prompt, _ in read("data/[ab].jsonl")] == ["a", "b"]


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
