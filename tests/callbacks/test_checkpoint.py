"""Which checkpoints a run keeps, and which of them is the last one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from distillkit.callbacks import RunCheckpoint
from distillkit.errors import ConfigError, StoreError
from distillkit.storage.checkpoint_io import AtomicCheckpointIO
from helpers.locks import locked
from helpers.runs import QUIET

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def fit(root: Path, epochs: int, callback: RunCheckpoint, resume: bool = False) -> lightning.Trainer:
    """Epochs of three steps."""
    options: dict[str, Any] = {
        "default_root_dir": root,
        "logger": False,
        "limit_train_batches": 3,
        "limit_val_batches": 1,
    }
    trainer = lightning.Trainer(**QUIET | options, max_epochs=epochs, callbacks=[callback])
    trainer.fit(BoringModel(), ckpt_path="last" if resume else None)
    return trainer


def names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("every", "keep", "steps"),
    [
        (None, 1, [6]),
        (None, 2, [3, 6]),
        (None, -1, [3, 6]),
        (2, 1, [6]),
        (2, 2, [4, 6]),
        (2, -1, [2, 4, 6]),
        (4, -1, [4, 6]),  # 6 is the end of the run
        (3, -1, [3, 6]),  # the end of an epoch
    ],
)
def test_it_keeps_the_newest(every: int | None, keep: int, steps: list[int], tmp_path: Path) -> None:
    fit(tmp_path, 2, RunCheckpoint(every, keep))
    assert names(tmp_path) == ["last.ckpt", *(f"step={step:07d}.ckpt" for step in steps)]
    assert (tmp_path / "checkpoints" / "last.ckpt").resolve().name == f"step={steps[-1]:07d}.ckpt"


@pytest.mark.parametrize("keep", [1, 2])
def test_a_resumed_run_has_one_last_checkpoint(keep: int, tmp_path: Path) -> None:
    fit(tmp_path, 1, RunCheckpoint(keep=keep))
    assert fit(tmp_path, 2, RunCheckpoint(keep=keep), resume=True).global_step == 6
    assert names(tmp_path) == ["last.ckpt", *[f"step={step:07d}.ckpt" for step in (3, 6)][-keep:]]


def test_the_newest_is_found_without_its_link(tmp_path: Path) -> None:
    fit(tmp_path, 1, RunCheckpoint())
    link = tmp_path / "checkpoints" / "last.ckpt"
    link.unlink()
    link.symlink_to("step=0000001.ckpt")  # what a kill between the removal of the old one and the new link leaves
    trainer = fit(tmp_path, 2, RunCheckpoint(), resume=True)
    assert trainer.global_step == 6
    assert Path(str(trainer.ckpt_path)).name == "step=0000003.ckpt"
    assert link.resolve().name == "step=0000006.ckpt"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every_n_steps": 0}, r"RunCheckpoint\.every_n_steps must be at least 1, got 0"),
        ({"keep": 0}, r"RunCheckpoint\.keep must be at least 1, or -1 for all, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunCheckpoint(**settings)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip], ids=["cut", "flipped"])
def test_the_newest_whole_one_is_taken_and_the_others_are_named(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, 3, RunCheckpoint(keep=-1))
    for step in (6, 9):
        damage(tmp_path / "checkpoints" / f"step={step:07d}.ckpt")
    trainer = fit(tmp_path, 3, RunCheckpoint(keep=-1), resume=True)
    assert Path(str(trainer.ckpt_path)).name == "step=0000003.ckpt"
    assert trainer.global_step == 9
    skipped = [message for message in caplog.messages if message.startswith("skipped")]
    assert [Path(message.split()[1].rstrip(",")).name for message in skipped] == [
        "step=0000009.ckpt",
        "step=0000006.ckpt",
    ]
    assert all("is damaged (it" in message and "step=0000003.ckpt is the newest" in message for message in skipped)


def test_if_all_are_damaged_the_run_does_not_start_anew_without_a_word(tmp_path: Path) -> None:
    fit(tmp_path, 1, RunCheckpoint())
    cut(tmp_path / "checkpoints" / "step=0000003.ckpt")
    with pytest.raises(
        StoreError, match=r"All checkpoints in .* are damaged: step=0000003\.ckpt \(it is cut.*remove them to"
    ):
        fit(tmp_path, 2, RunCheckpoint(), resume=True)


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    fit(tmp_path, 1, RunCheckpoint())
    (tmp_path / "checkpoints" / ".step=0000009.ckpt.123-0123abcd").touch()
    (tmp_path / "checkpoints" / ".step=0000009.note").touch()
    fit(tmp_path, 2, RunCheckpoint(), resume=True)
    assert names(tmp_path) == [".step=0000009.note", "last.ckpt", "step=0000006.ckpt"]


def test_a_folder_in_which_another_process_trains_is_refused_and_free_again_when_it_ends(tmp_path: Path) -> None:
    with (
        locked(tmp_path) as pid,
        pytest.raises(ConfigError, match=rf"in use: process {pid} on .*, since 2.* Wait until"),
    ):
        fit(tmp_path, 1, RunCheckpoint())
    assert not (tmp_path / "checkpoints").exists()
    fit(tmp_path, 1, RunCheckpoint())  # the other was killed

    class Failing(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("no")

    options: dict[str, Any] = {"default_root_dir": tmp_path, "max_epochs": 1}
    trainer = lightning.Trainer(**QUIET | options, logger=False, callbacks=[RunCheckpoint()])
    with pytest.raises(ValueError, match="no"):
        trainer.fit(Failing())
    for _ in range(2):  # neither a run that has ended nor one that has failed holds the folder
        with locked(tmp_path):
            pass


def test_a_checkpoint_plugin_of_ones_own_is_left_alone(tmp_path: Path) -> None:
    class Own(AtomicCheckpointIO):
        pass

    options: dict[str, Any] = {"default_root_dir": tmp_path, "logger": False, "limit_train_batches": 1}
    for plugins, expected in (([Own()], Own), (None, AtomicCheckpointIO)):
        trainer = lightning.Trainer(**QUIET | options, max_epochs=1, callbacks=[RunCheckpoint()], plugins=plugins)
        trainer.fit(BoringModel())
        assert type(trainer.strategy.checkpoint_io) is expected
