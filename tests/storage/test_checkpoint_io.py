"""Checkpoint files: whole or not there, wherever a save is stopped, and compared with their checksum when loaded."""

import resource
import signal
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.core import url_to_fs
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from distillkit.errors import ConfigError, StoreError
from distillkit.storage.checkpoint_files import damage
from distillkit.storage.checkpoint_io import AtomicCheckpointIO
from helpers.killed import killed_while_saving
from helpers.runs import finish, process

CONTENT: dict[str, Any] = {"state_dict": {"weight": torch.arange(5000.0)}, "epoch": 3}


def load(path: Path | str) -> dict[str, Any]:
    return AtomicCheckpointIO().load_checkpoint(path, weights_only=True)


def assert_content(found: dict[str, Any]) -> None:
    assert found["epoch"] == 3
    assert torch.equal(found["state_dict"]["weight"], CONTENT["state_dict"]["weight"])


def test_a_checkpoint_is_read_by_this_plugin_by_lightnings_and_by_torch(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    for found in (load(path), TorchCheckpointIO().load_checkpoint(path), torch.load(path), torch.load(path, mmap=True)):
        assert_content(found)
    assert [file.name for file in path.parent.iterdir()] == ["a.ckpt"]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"distillkit xxh3 ")


def test_one_that_lightnings_plugin_wrote_is_read(tmp_path: Path) -> None:
    TorchCheckpointIO().save_checkpoint(CONTENT, tmp_path / "a.ckpt")
    assert_content(load(tmp_path / "a.ckpt"))
    data = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match=r"a\.ckpt is damaged \(it is cut, or no checkpoint\): resume from another"):
        load(tmp_path / "a.ckpt")


@pytest.mark.parametrize("kept", [0, 1, 21, 22, 100, 10_000, -60, -54, -53, -33, -32, -20, -1])
def test_a_cut_file_is_noticed(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    path.write_bytes(path.read_bytes()[:kept])
    if kept in (-1, -20, -32):  # all of what torch has written is there, and torch reads it
        assert_content(torch.load(path))
        return
    with pytest.raises(StoreError, match=r"a\.ckpt is damaged \(.*\): resume from another checkpoint"):
        load(path)


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no checkpoint .*a\.ckpt: correct ckpt_path"):
        load(tmp_path / "a.ckpt")


def test_other_file_systems_are_left_to_lightning(tmp_path: Path) -> None:
    address = f"memory://{tmp_path.name}/a.ckpt"
    try:
        AtomicCheckpointIO().save_checkpoint(CONTENT, address)
        assert_content(load(address))
        AtomicCheckpointIO().remove_checkpoint(address)
    finally:
        url_to_fs("memory://")[0].store.clear()
    assert list(tmp_path.iterdir()) == []


def test_the_temporary_folder_of_the_system_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "a.ckpt")
    assert damage(tmp_path / "a.ckpt") == ""


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files can't be larger than `size` bytes: a write beyond it is refused, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 10_000, 20_500])
def test_on_a_full_disk_the_file_before_stays_and_nothing_else(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    with (
        full_disk(size),
        pytest.raises(StoreError, match=r"a\.ckpt can't be written \(File too large\)\. Make room, .* as it was"),
    ):
        AtomicCheckpointIO().save_checkpoint(CONTENT | {"epoch": 4}, path)
    assert_content(load(path))
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cant_be_made_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file can't be made \(.*\): choose another folder"):
        AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "file" / "a.ckpt")


@pytest.mark.parametrize("when", ["written", "synced"])
def test_a_kill_leaves_the_file_before(when: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    with process(killed_while_saving, str(path), when) as child:
        assert finish(child) == -signal.SIGKILL
    assert_content(load(path))
    assert len(list(tmp_path.glob(".a.ckpt.*"))) == 1


def test_a_flipped_bit_of_a_checkpoint_without_our_checksum_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save({"weight": torch.arange(64.0)}, path)
    assert damage(path) == ""
    data = bytearray(path.read_bytes())
    data[data.index(torch.tensor([5.0, 6.0]).numpy().tobytes())] ^= 1
    changed = tmp_path / "changed.ckpt"
    changed.write_bytes(data)
    assert "differs" in damage(changed)
