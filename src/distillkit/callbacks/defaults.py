"""Callbacks that every training run has: without them a run ends without a student, or with one of NaN."""

import logging

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar

from distillkit.callbacks.checkpoint import RunCheckpoint
from distillkit.callbacks.export import Export
from distillkit.callbacks.finite import FiniteLoss
from distillkit.callbacks.progress import with_run_metrics
from distillkit.devices.distributed import rank

_log = logging.getLogger(__name__)


def add_default_callbacks(trainer: Trainer, export: bool) -> None:
    """Adds `FiniteLoss`, `RunCheckpoint` and `Export` to a trainer, each unless it has one of its kind.

    `RunCheckpoint` takes the place of the `ModelCheckpoint` that Lightning adds by itself, not of one with settings;
    with `enable_checkpointing=False` there is none. A progress bar of Lightning shows the metrics of a run.

    Args:
        trainer: The trainer, before the run.
        export: Whether the student is exported.
    """
    callbacks: list[Callback] = [
        (isinstance(callback, ProgressBar) and with_run_metrics(callback)) or callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it through a connector
    ]
    saves = bool(trainer.checkpoint_callbacks)
    callbacks = [callback for callback in callbacks if not is_lightnings_own(callback)]
    if not _has(callbacks, FiniteLoss):
        callbacks.append(FiniteLoss())
    if export and not _has(callbacks, Export):
        callbacks.append(Export())
    if saves and not _has(callbacks, ModelCheckpoint):
        callbacks.append(RunCheckpoint())
    callbacks.sort(key=lambda callback: isinstance(callback, Checkpoint))  # a checkpoint has the state of all others
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def _has(callbacks: list[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def is_lightnings_own(callback: Callback) -> bool:
    """True for the checkpoint callback that a trainer adds if it is given none: it has no setting."""
    return type(callback) is ModelCheckpoint and _settings(callback) == _settings(ModelCheckpoint())


def _settings(callback: ModelCheckpoint) -> dict[str, object]:
    return {name: value for name, value in vars(callback).items() if isinstance(value, bool | int | str | None)}


def log_missing_export(trainer: Trainer) -> None:
    """Says after a run that no callback has exported the student, and how to get it.

    Args:
        trainer: The trainer of a run that has ended.
    """
    if rank() != 0 or trainer.fast_dev_run or _has(trainer.callbacks, Export):  # type: ignore[attr-defined]
        return
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if path:
        _log.info("No student folder was written: `distillkit export` writes one from %s.", path)
    else:
        _log.info(
            "Neither a student folder nor a checkpoint was written: the student is gone with this process. A run "
            "exports it unless enable_checkpointing or model.export is false."
        )
