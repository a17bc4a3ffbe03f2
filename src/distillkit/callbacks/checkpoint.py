"""Checkpoints in the run's folder."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from distillkit.errors import ConfigError


class RunCheckpoint(ModelCheckpoint):
    """Keeps the newest checkpoint in `checkpoints` of the run's folder; `--ckpt_path last` finds it.

    Args:
        every_n_steps: Optimizer steps between two checkpoints; None writes one at the end of each epoch. There is
            always one at the end of the run.
        keep: How many checkpoints are kept, at least 1; -1 keeps all.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(self, every_n_steps: int | None = None, keep: int = 1) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"RunCheckpoint.every_n_steps must be at least 1, got {every_n_steps}.")
        if keep < 1 and keep != -1:
            raise ConfigError(f"RunCheckpoint.keep must be at least 1, or -1 for all, got {keep}.")
        monitor = "step" if keep > 1 else None
        super().__init__(
            filename="{step:07d}", auto_insert_metric_name=True, save_last="link", monitor=monitor, mode="max",
            save_top_k=keep, every_n_train_steps=every_n_steps, save_on_train_epoch_end=every_n_steps is None or None,
            # A run killed after its first checkpoint would otherwise begin a second `last` beside the first.
            enable_version_counter=False,
        )  # fmt: skip
        self._every_n_steps = every_n_steps

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Puts the folder into the run's."""
        self.dirpath = str(_folder(trainer))
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        """Writes one if it is due; that of an epoch's last step waits for validation, whose figures it then has."""
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *rest)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes one if it is due."""
        if self._every_n_steps is None:
            super().on_train_epoch_end(trainer, pl_module)
        elif trainer.global_step % self._every_n_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes the last one: the figures at the end of a run are those of its newest checkpoint."""
        self._save(trainer)

    def _save(self, trainer: Any) -> None:
        if not self._should_skip_saving_checkpoint(trainer):  # as if there is one of this step
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _find_last_checkpoints(self, trainer: Any) -> set[str]:
        # Lightning asks before `setup` has put the folder into the run's. A kill may leave the link pointing nowhere.
        folder = _folder(trainer)
        found = {path.name: str(path) for path in folder.glob("*.ckpt") if path.exists()}
        return {found["last.ckpt"]} if "last.ckpt" in found else set(found.values())


def _folder(trainer: Any) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"
