"""Checkpoints in the run's folder."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Keeps the newest checkpoint in `checkpoints` of the run's folder; `--ckpt_path last` finds it.

    Args:
        every_n_steps: Optimizer steps between two checkpoints; None writes one at the end of each epoch.
        keep: How many checkpoints are kept, at least 1; -1 keeps all.
    """

    def __init__(self, every_n_steps: int | None = None, keep: int = 1) -> None:
        monitor = "step" if keep > 1 else None
        super().__init__(
            filename="{step:07d}", auto_insert_metric_name=True, save_last="link", monitor=monitor, mode="max",
            save_top_k=keep, every_n_train_steps=every_n_steps, save_on_train_epoch_end=every_n_steps is None or None,
        )  # fmt: skip

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Puts the folder into the run's."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)
