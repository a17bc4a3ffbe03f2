"""The checkpoint that a verb begins with: `last`, `best`, a path, or that of a job that SLURM queued again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning import Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint

from distillkit.callbacks.checkpoint import RunCheckpoint
from distillkit.errors import ConfigError
from distillkit.run_folder import CHECKPOINTS, last_checkpoint
from distillkit.storage.checkpoint_files import SUFFIX, newest_whole
from distillkit.training.checkpoint import Checkpoint


def requeued(root: Path) -> list[Path]:
    """Checkpoints that a job saved before SLURM queued it again; empty outside of such a job.

    Args:
        root: Folder of the run.
    """
    in_job = SLURMEnvironment.detect() and SLURMEnvironment().auto_requeue
    return list(root.glob("hpc_ckpt_*.ckpt")) if in_job else []


def resolve_checkpoint(trainer: Trainer, path: str | None, verb: str) -> str | None:
    """Returns the path of the checkpoint, or None to begin without one.

    Args:
        trainer: The trainer, whose callbacks saved the checkpoints of its run's folder.
        path: The setting: `last`, `best`, a path, or None.
        verb: Name of the verb. Only `fit` may begin without the `last` checkpoint, where none is saved yet.

    Raises:
        ConfigError: If there is no such checkpoint, or no callback that says which is the best.
        ModelError: If the checkpoint is damaged.
    """
    root = Path(trainer.default_root_dir)
    if path is None:
        waiting = requeued(root) if verb == "fit" else []
        return str(_newest(waiting + _last(trainer, root))) if waiting else None
    if path == "last":
        saved = _last(trainer, root) + requeued(root)
        if not saved and verb != "fit":
            raise ConfigError(
                f"--ckpt_path last: the run folder {root} has no checkpoint. Train it by `fit`, or leave --ckpt_path "
                "out to measure the student before training."
            )
        return str(_newest(saved)) if saved else None
    if path == "best":
        return _best(trainer, root)
    if path.startswith(("http:", "https:")):
        raise ConfigError(f"--ckpt_path {path} is an address: download the checkpoint, and name the file.")
    if "://" not in path and not Path(path).is_file():
        raise ConfigError(f"--ckpt_path {path}: there is no such file. Name a checkpoint, or `last`.")
    return path


def _last(trainer: Trainer, root: Path) -> list[Path]:
    """The newest checkpoint of each callback."""
    callbacks = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    of_callbacks = [Path(path) for one in callbacks for path in one._find_last_checkpoints(trainer)]
    return [path for path in [*of_callbacks, last_checkpoint(root)] if path.exists()]


def _newest(paths: list[Path]) -> Path:
    return max(paths, key=lambda path: path.stat().st_mtime_ns)


def _best(trainer: Trainer, root: Path) -> str:
    """The best checkpoint, by the callback that monitors a metric; it says so in the newest checkpoint of the run."""
    callbacks = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    monitors = [one for one in callbacks if one.monitor is not None and not isinstance(one, RunCheckpoint)]
    if not monitors:
        raise ConfigError(
            "--ckpt_path best needs a callback that says which is the best: add a ModelCheckpoint with a `monitor`, "
            "such as val/kl, to trainer.callbacks, or name a file."
        )
    last = _last(trainer, root)
    if not last:
        raise ConfigError(f"--ckpt_path best: the run folder {root} has no checkpoint. Train it by `fit`.")
    states = Checkpoint.read(_newest(last)).content.get("callbacks", {})
    for callback in monitors:
        best = states.get(callback.state_key, {}).get("best_model_path", "")
        if best and Path(best).is_file():
            return str(best)
    raise ConfigError(
        f"--ckpt_path best: {_newest(last)} names no checkpoint that is best by {monitors[0].monitor}, or it is gone. "
        "Name a file."
    )


_FOLDERS = (CHECKPOINTS, ".", f"*/version_*/{CHECKPOINTS}")
"""Folders of a run with checkpoints: ours, that of a requeued job, and those of Lightning's callback."""


def choose_checkpoint(source: str | Path, which: Literal["best", "last"] | None = None) -> tuple[Path, str]:
    """The checkpoint of a run whose student is to be used. It needs no trainer.

    Args:
        source: A checkpoint, or the folder of a run.
        which: `best` by the metric that a callback of the run monitors, or `last`, the newest that is whole; None is
            the best where the run has a monitor, as for Lightning's `test`, and otherwise the last.

    Returns:
        The checkpoint, and in words why it was chosen.

    Raises:
        ConfigError: If there is no such file or folder, no checkpoint, or none that is known to be the best.
        StoreError: If all checkpoints are damaged.
    """
    root = Path(source)
    if not root.is_dir():
        if which is not None:
            raise ConfigError(f"{root} is no run folder, of which `{which}` (--which) would name a checkpoint.")
        return root, "as named"
    saved = [path for folder in _FOLDERS for path in root.glob(f"{folder}/*{SUFFIX}") if path.exists()]
    newest = newest_whole(saved)
    if newest is None:
        reason = "is a model already" if (root / "config.json").exists() else "has no checkpoint"
        raise ConfigError(f"{root} {reason}. Name the folder of a run that saved one (RunCheckpoint), or a .ckpt file.")
    best = None if which == "last" else _monitored_best(root, Checkpoint.read(newest).content)
    if best is not None:
        return best
    if which == "best":
        raise ConfigError(
            f"The run {root} names no best checkpoint, or it is gone: that needs a ModelCheckpoint with a `monitor`, "
            "such as val/kl, in trainer.callbacks. Use `last`."
        )
    return newest.resolve(), "the newest"


def _monitored_best(root: Path, content: Mapping[str, Any]) -> tuple[Path, str] | None:
    """The best checkpoint by what the newest one says of the run's callbacks; its folder may have moved."""
    for key, state in content.get("callbacks", {}).items():
        monitor, best = state.get("monitor"), state.get("best_model_path")
        if not monitor or not best or key.startswith(RunCheckpoint.__name__):
            continue
        moved = [path for folder in _FOLDERS for path in root.glob(f"{folder}/{Path(best).name}")]
        path = next((path for path in [Path(best), *moved] if path.is_file()), None)
        if path is not None:
            return path, f"the best by {monitor}"
    return None
