"""Which checkpoints a run keeps, and which of them is the last one."""

from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from distillkit.callbacks import RunCheckpoint
from distillkit.errors import ConfigError
from tiny_runs import QUIET

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


@pytest.mark.parametrize(("every", "keep", "steps"), [
    (None, 1, [6]),
    (None, 2, [3, 6]),
    (None, -1, [3, 6]),
    (2, 1, [6]),
    (2, 2, [4, 6]),
    (2, -1, [2, 4, 6]),
    (4, -1, [4, 6]),  # 6 is the end of the run
    (3, -1, [3, 6]),  # the end of an epoch
])  # fmt: skip
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


@pytest.mark.parametrize(("settings", "words"), [
    ({"every_n_steps": 0}, r"RunCheckpoint\.every_n_steps must be at least 1, got 0"),
    ({"keep": 0}, r"RunCheckpoint\.keep must be at least 1, or -1 for all, got 0"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunCheckpoint(**settings)
