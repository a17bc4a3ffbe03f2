"""Work that a stopped run has saved, for the last lines of the command."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distillkit.devices.stopping import StopRequested
from distillkit.run_folder import CHECKPOINTS, CONFIG
from distillkit.storage.checkpoint_files import SUFFIX
from distillkit.storage.files import StoreFolder


@contextmanager
def saved_work(run: Path, store: str | Path, verb: str) -> Iterator[None]:
    """Has a signal that stops the block say what is saved, and which arguments the command needs to go on.

    Args:
        run: Folder of the run.
        store: Its response store.
        verb: Name of the verb, of which only `fit` goes on from a checkpoint.
    """
    try:
        yield
    except StopRequested as stop:
        checkpoint = _newest(run / CHECKPOINTS) if verb == "fit" else None
        stop.saved = [f"the checkpoint {_shown(checkpoint)}"] if checkpoint is not None else []
        folder = StoreFolder(store)
        if folder.local is None:  # not asked now: a network may take long
            stop.saved.append(f"the responses received so far in {store}")
        elif folder.stamps("manifest-"):
            stop.saved.append(f"the responses in {_shown(folder.local)}")
        if verb == "fit" and (run / CONFIG).exists():  # without it the folder would be refused: it contains a run
            stop.arguments = ("--ckpt_path", "last")
        raise


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint under its own name."""
    files = [path for path in folder.glob(f"*{SUFFIX}") if path.is_file() and not path.is_symlink()]
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=None)


def _shown(path: Path) -> str:
    """A path as it is shortest: relative if it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
