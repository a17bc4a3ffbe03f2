"""Signals within Lightning's trainer."""

import signal
from collections.abc import Callable
from types import FrameType

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from distillkit.callbacks.checkpoint import RunCheckpoint
from distillkit.devices import stopping


class SignalCallback(Callback):
    """Puts back the handlers that Lightning replaces: with its own, SIGTERM is a success and several ranks deadlock.

    In a job of SLURM the signal that has it queued again is Lightning's, which saves a checkpoint at once; while the
    optimizer changes the weights it waits. It must be the trainer's first callback.
    """

    def __init__(self) -> None:
        self._requeue: _Deferrable | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the handlers again, unless SLURM's automatic requeueing uses the signals."""
        if SLURMEnvironment.detect() and SLURMEnvironment().auto_requeue:
            handler = signal.getsignal(signal.SIGUSR1)
            if callable(handler) and not isinstance(handler, _Deferrable):
                self._requeue = _Deferrable(handler)
                signal.signal(signal.SIGUSR1, self._requeue)
        else:
            launcher = trainer.strategy.launcher
            stopping.install(None if launcher is None else launcher.kill)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Has a signal wait for the end of the step, where `RunCheckpoint` saves a checkpoint.

        Several ranks would not end after the same step, so with them a signal does not wait.
        """
        if trainer.world_size == 1 and any(isinstance(one, RunCheckpoint) for one in trainer.checkpoint_callbacks):
            stopping.defer()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
        """Has SLURM's signal wait."""
        if self._requeue is not None:
            self._requeue.is_deferred = True

    def on_train_batch_end(self, *_: object) -> None:
        """Ends the wait: weights, optimizer and learning rate are those of the step."""
        if self._requeue is not None:
            self._requeue.release()

    on_validation_start = on_test_start = on_sanity_check_start = on_train_start


class _Deferrable:
    """A handler of a signal that can wait.

    Args:
        handler: The handler.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], object]) -> None:
        self.handler, self.is_deferred = handler, False
        self._pending: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.is_deferred:
            self._pending = signum
        else:
            self.handler(signum, frame)

    def release(self) -> None:
        """Calls the handler if a signal came."""
        self.is_deferred, signum, self._pending = False, self._pending, None
        if signum is not None:
            self.handler(signum, None)
