"""Lightning's checkpoint plugin for files that are whole or do not exist, and are checked when they are loaded."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning import Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from distillkit.errors import ConfigError, StoreError
from distillkit.remote import consent
from distillkit.storage.atomic import atomic_path
from distillkit.storage.checkpoint_files import HashedFile, damage


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin for local files that a killed process or a full disk can't leave half-written.

    A file is written beside the target, synced and renamed; Lightning's own plugin writes to `$TMPDIR` and moves, which
    is a copy between file systems. Other file systems, such as `s3://…`, are left to Lightning's.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes a checkpoint.

        Raises:
            StoreError: If it can't be written, for example because the disk is full. Earlier ones stay.
        """
        local = _local(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{local.parent} can't be made ({error.strerror}): choose another folder.") from error
        with atomic_path(local) as temporary, temporary.open("wb") as file:
            _write(checkpoint, file)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint, as tensors and plain data unless `weights_only` is False.

        Raises:
            ConfigError: If it does not exist, or is an address of the web, or code in it would run without the user's
                consent.
            StoreError: If it is cut, damaged or no checkpoint.
        """
        if str(path).startswith(("http:", "https:")):
            raise ConfigError(f"{path} is an address: download the checkpoint, and name the file.")
        if weights_only is False:
            consent.require("pickle", f"`weights_only: false` runs code in the checkpoint {path}")
        local = _local(path)
        if local is not None and not local.exists():
            raise ConfigError(f"There is no checkpoint {path}: correct ckpt_path.")
        if local is not None and local.is_file():
            reason = damage(local)
            if reason:
                raise StoreError(f"{path} is damaged ({reason}): resume from another checkpoint.")
        try:
            return super().load_checkpoint(path, map_location, weights_only is not False)
        except (EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise StoreError(
                f"{path} is not a checkpoint, is damaged, or contains more than tensors and plain data."
            ) from error


def use_atomic_checkpoints(trainer: Trainer) -> None:
    """Lets a trainer write and read checkpoints with `AtomicCheckpointIO`, unless it was given another plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def _write(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    writer = HashedFile(file)
    try:
        torch.save(checkpoint, cast(IO[bytes], writer))
    except RuntimeError as error:  # torch's own, after it could not write
        raise writer.error or error from error
    writer.seal()


def _local(path: str | Path) -> Path | None:
    """The path of a local file; None for another file system."""
    filesystem, name = url_to_fs(str(path))
    return Path(name) if isinstance(filesystem, LocalFileSystem) else None
