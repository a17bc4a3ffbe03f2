"""Parts that kill their own process, so that a test knows where the run was."""

import os
import signal
import threading
from typing import Any

import torch
from lightning import Callback

from distillkit.errors import GenerationError, TrainingError
from distillkit.generators.transformers import TransformersGenerator
from distillkit.storage.checkpoint_io import AtomicCheckpointIO
from distillkit.types import Prompts, Response, Sampling


def kill(signum: int = int(signal.SIGKILL)) -> None:
    """Ends this process; by default without clean-up of any kind."""
    os.kill(os.getpid(), signum)


class KillAfterStep(Callback):
    """Kills the run at the first batch after optimizer step `step`."""

    def __init__(self, step: int, signum: int = int(signal.SIGKILL)) -> None:
        self.step, self.signum, self.done = step, signum, False

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not self.done:
            self.done = True
            kill(self.signum)


class EndsEarly(Callback):
    """Ends the process within training with the exit status of a success."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            os._exit(0)


class KilledGenerator(TransformersGenerator):
    """Kills the run when it is asked to write for the `call`-th time."""

    calls = 0  # of all copies

    def __init__(
        self, call: int, batch_size: int = 64, progress: bool = True, signum: int = int(signal.SIGKILL)
    ) -> None:
        super().__init__(batch_size=batch_size, progress=progress)
        self.call, self.signum = call, signum

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        KilledGenerator.calls += 1
        if KilledGenerator.calls == self.call:
            kill(self.signum)
        return super().generate(prompts, sampling)


class KilledOnce(TransformersGenerator):
    """Kills the first process that it is asked in to write, and no other; `marker` is a file that says that it did."""

    def __init__(self, marker: str, batch_size: int = 64, progress: bool = True) -> None:
        super().__init__(batch_size=batch_size, progress=progress)
        self.marker = marker

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return super().generate(prompts, sampling)
        kill()
        raise AssertionError("it is dead")


class GivesUp(TransformersGenerator):
    """Writes nothing."""

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        raise GenerationError("The ink ran out.")


class KilledSoon(TransformersGenerator):
    """Kills the run `delay` seconds after it is asked to write for the `call`-th time, or `after` it has written then.

    The clock runs in a thread of its own: the run may be anywhere, in the middle of a file too.
    """

    calls = 0  # of all copies

    def __init__(
        self, call: int, delay: float, after: bool = False, batch_size: int = 64, progress: bool = True
    ) -> None:
        super().__init__(batch_size=batch_size, progress=progress)
        self.call, self.delay, self.after = call, delay, after

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        KilledSoon.calls += 1
        wound = KilledSoon.calls == self.call
        if wound and not self.after:
            threading.Timer(self.delay, kill).start()
        responses = super().generate(prompts, sampling)
        if wound and self.after:
            threading.Timer(self.delay, kill).start()
        return responses


class Requeued(Callback):
    """What SLURM does with a job whose time is up: SIGUSR1 in a hook of a micro-batch, and soon an end without notice.

    Args:
        batch: The micro-batch, from 1.
        hook: The hook; `step` for none, since `InterruptedSGD` sends the signal.
    """

    def __init__(self, batch: int, hook: str) -> None:
        self.batch = batch
        if hook != "step":
            setattr(self, hook, self.requeue)

    def requeue(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch:
            kill(signal.SIGUSR1)

    def on_before_zero_grad(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch + 1:
            kill()


class InterruptedSGD(torch.optim.SGD):
    """Sends SIGUSR1 in the middle of a step: some weights are changed, others not yet."""

    def __init__(self, params: Any, lr: float = 0.1, at: int = 0) -> None:
        super().__init__(params, lr=lr)
        self.at, self.taken = at, 0

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.taken += 1
        for index, parameter in enumerate(self.param_groups[0]["params"]):
            if index == 1 and self.taken == self.at:
                kill(signal.SIGUSR1)
            parameter.data -= self.param_groups[0]["lr"] * parameter.grad
        return loss


class Spoil(Callback):
    """Makes the student worse in its second epoch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            for parameter in pl_module.student.parameters():
                parameter.data *= 20


class FailingRank(Callback):
    """Fails on one rank, in the second step."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 1 and trainer.global_rank == self.rank:
            raise TrainingError("This rank has failed: mend it.")


def killed_while_saving(path: str, when: str) -> None:
    """Saves a checkpoint and is killed before it is synced (`written`), or before it is renamed (`synced`)."""
    sync = os.fsync

    def killed(descriptor: int) -> None:
        if when == "synced":
            sync(descriptor)
        kill()

    os.fsync = killed
    AtomicCheckpointIO().save_checkpoint({"epoch": 4}, path)
