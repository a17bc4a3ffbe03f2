"""Checkpoints in the run's folder."""

import warnings
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from distillkit.devices import stopping
from distillkit.devices.stopping import StopRequested
from distillkit.errors import ConfigError, check_range
from distillkit.run_folder import CHECKPOINTS
from distillkit.storage.atomic import remove_unfinished
from distillkit.storage.checkpoint_files import SUFFIX, newest_whole
from distillkit.storage.checkpoint_io import use_atomic_checkpoints
from distillkit.storage.locks import FolderLock


class RunCheckpoint(ModelCheckpoint):
    """Saves checkpoints to `checkpoints` in the run's folder; `--ckpt_path last` loads the newest that is whole.

    A checkpoint has a checksum and appears under its name only once it is on disk. While it trains, the run's folder is
    locked: another process that would train there is refused.

    Args:
        every_n_steps: Optimizer steps between checkpoints; None saves one at the end of each epoch. One is always saved
            at the end of the run.
        keep: Number of newest checkpoints to keep, at least 1; -1 keeps all.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(self, every_n_steps: int | None = None, keep: int = 1) -> None:
        check_range("RunCheckpoint.every_n_steps", every_n_steps, 1)
        if keep < 1 and keep != -1:
            raise ConfigError(f"RunCheckpoint.keep must be at least 1, or -1 for all, got {keep}.")
        monitor = "step" if keep > 1 else None
        super().__init__(
            filename="{step:07d}",
            auto_insert_metric_name=True,
            save_last="link",
            monitor=monitor,
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=every_n_steps is None or None,
            # A run that was killed after its first checkpoint would otherwise add a second `last`.
            enable_version_counter=False,
        )
        self._every_n_steps = every_n_steps
        self._lock: FolderLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the folder to the run's, and locks it for training.

        Raises:
            ConfigError: If another process trains in the folder.
        """
        self.dirpath = str(_folder(trainer))
        use_atomic_checkpoints(trainer)
        if stage == "fit" and trainer.is_global_zero:
            self._lock = FolderLock(trainer.default_root_dir)
            self._lock.acquire()
            remove_unfinished(_folder(trainer), SUFFIX)
        # Lightning asks the first of them for the `best` checkpoint, and for this callback that is the newest.
        other_callbacks = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*other_callbacks, self]  # type: ignore[attr-defined]  # Lightning sets it through a connector
        with warnings.catch_warnings():  # a folder with earlier checkpoints is the rule, not a reason to warn
            warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Frees the run's folder."""
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Saves a checkpoint if due; after an epoch's last step it waits for validation, to include its metrics.

        Raises:
            StopRequested: If a signal came during the step; a checkpoint has been saved then.
        """
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)
        if trainer.is_last_batch or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if stopping.is_pending():
            self._save(trainer)
        stopping.check()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves a checkpoint if a signal came between two steps, as while responses are generated; frees the folder."""
        if isinstance(exception, StopRequested) and trainer.world_size == 1 and trainer.training:
            progress = trainer.fit_loop.epoch_loop.batch_progress.current
            if 0 < progress.completed == progress.ready and not trainer.fit_loop.epoch_loop._should_accumulate():
                self._save(trainer)
        super().on_exception(trainer, pl_module, exception)
        self._unlock()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves a checkpoint if due.

        Raises:
            StopRequested: If a signal came during the epoch's last step or validation.
        """
        if self._every_n_steps is None:
            super().on_train_epoch_end(trainer, pl_module)
        elif trainer.global_step % self._every_n_steps == 0 or stopping.is_pending():
            self._save(trainer)
        stopping.check()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last checkpoint, so that the final metrics belong to the newest checkpoint."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):  # for example if this step has one already
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        # Lightning calls this before `setup` has set the folder. After a kill the link may point to a missing file.
        newest = newest_whole(path for path in _folder(trainer).glob(f"*{SUFFIX}") if path.exists())
        return set() if newest is None else {str(newest)}


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / CHECKPOINTS
