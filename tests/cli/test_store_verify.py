"""`distillkit store verify`: every stored file below a path is read, and those that are damaged are named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.core import url_to_fs
from torch import nn

from distillkit.chunked.output_head import OutputHead
from distillkit.cli.main import main
from distillkit.storage.checkpoint_io import AtomicCheckpointIO
from distillkit.storage.responses import ResponseStore
from distillkit.storage.score_shards import Column
from distillkit.storage.scores import ScoreCache
from distillkit.teachers.metadata import TeacherMetadata, write_head, write_metadata
from distillkit.types import Prompt
from helpers.stores import TEACHER, responses, sign

METADATA = TeacherMetadata("name", "0" * 16, 9)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a store, a teacher cache and a checkpoint."""
    folder = tmp_path / "run"
    prompt = Prompt("a", ({"role": "user", "content": "A?"},), (1,))
    ResponseStore(folder / "responses").write(TEACHER, responses("a", "bb"), [prompt])
    write_metadata(folder / "scores", METADATA)
    write_head(folder / "scores" / "hidden", METADATA, OutputHead(nn.Linear(4, 9), 9, 1.0, None))
    columns = {"hidden": Column(torch.bfloat16, (4,)), "own": Column(torch.float32)}
    cache = ScoreCache(folder / "scores" / "hidden", columns, {"teacher": "x"})
    cache.write([bytes(16), bytes([1] * 16)], [2, 1], {"hidden": torch.ones(3, 4).bfloat16(), "own": torch.ones(3)})
    cache.flush()
    AtomicCheckpointIO().save_checkpoint({"weight": torch.ones(9)}, folder / "checkpoints" / "step=3.ckpt")
    (folder / "checkpoints" / "last.ckpt").symlink_to("step=3.ckpt")
    return folder


def verify(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, list[str], list[str]]:
    """Exit status, and the lines on standard output and on standard error."""
    status = main(["store", "verify", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_whole_files_are_counted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = "1 whole files of checkpoints, 3 whole files of responses, 4 whole files of scores"
    assert verify(capsys, run) == (0, [f"{run}: {counts}"], [])
    assert verify(capsys, run.parent) == (0, [f"{run.parent}: {counts}"], [])
    store = run / "responses"
    assert verify(capsys, store) == (0, [f"{store}: 3 whole files of responses"], [])
    hidden = run / "scores" / "hidden"
    assert verify(capsys, hidden) == (0, [f"{hidden}: 3 whole files of scores"], [])
    status, lines, _ = verify(capsys, run / "checkpoints", "--all")
    assert (status, lines[0]) == (0, f"{run}/checkpoints/step=3.ckpt is whole")


SHARDS = ["responses/shards/teacher-*.arrow", "responses/shards/prompts-*.arrow", "scores/hidden/0*.safetensors"]
FILES = [*SHARDS, "responses/manifest-*.json", "scores/teacher.json", "scores/hidden/manifest-*.json"]
FILES += ["scores/hidden/head.safetensors", "checkpoints/step=3.ckpt"]


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [*((pattern, damage) for pattern in FILES for damage in (flip, empty)), *((path, Path.unlink) for path in SHARDS)],
)
def test_a_damaged_file_is_named_and_the_exit_status_is_1(
    pattern: str, damage: Callable[[Path], None], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = run.glob(pattern)
    damage(path)
    status, (line,), (error,) = verify(capsys, run)
    assert status == 1
    assert line.startswith(f"{path} ")
    assert any(words in line for words in ("damaged", "is not valid JSON", "can't be read"))
    assert error.startswith(f"distillkit store: error: 1 files in {run} are damaged; ")


def test_a_file_that_no_manifest_lists_is_no_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "responses" / "shards" / "teacher-x-00000-000009.arrow").write_bytes(b"half")
    status, lines, _ = verify(capsys, run / "responses")
    assert status == 0
    assert "000009.arrow is in no manifest, so nothing reads it" in lines[0]


def test_a_forged_store_is_damaged_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sign(run / "responses", lambda manifest: manifest["shards"][0].update(file="../../other.arrow"))
    status, lines, _ = verify(capsys, run / "responses")
    assert status == 1
    assert "file must be a path such as shards/NAME.arrow, relative to the store" in lines[0]


def test_a_store_elsewhere_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"memory://{tmp_path.name}/store"
    try:
        store = ResponseStore(address)
        store.write(TEACHER, responses("a"))
        assert verify(capsys, address) == (0, [f"{address}: 2 whole files of responses"], [])
        filesystem, root = url_to_fs(address)
        filesystem.pipe_file(f"{root}/{store.shards()[0]['file']}", b"")
        assert verify(capsys, address)[0] == 1
    finally:
        url_to_fs("memory://")[0].store.clear()


@pytest.mark.parametrize(
    ("name", "words"), [("empty", "has no store, teacher cache or checkpoint"), ("none", "is no folder")]
)
def test_where_there_is_nothing_is_an_error(
    name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    status, _, errors = verify(capsys, tmp_path / name)
    assert status == 1
    assert words in errors[0]
