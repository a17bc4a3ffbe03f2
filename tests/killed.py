"""Parts that kill their own process, so that a test knows where the run was."""

import os
import signal
import threading
from typing import Any

from lightning import Callback

from distillkit.errors import GenerationError
from distillkit.generators.in_process import TransformersGenerator
from distillkit.types import Prompts, Response, Sampling


def kill() -> None:
    """No clean-up of any kind."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillAfterStep(Callback):
    """Kills the run at the first batch after optimizer step `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            kill()


class KilledGenerator(TransformersGenerator):
    """Kills the run when it is asked to write for the `call`-th time."""

    calls = 0  # of all copies

    def __init__(self, call: int, batch_size: int = 64, progress: bool = True) -> None:
        super().__init__(batch_size=batch_size, progress=progress)
        self.call = call

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        KilledGenerator.calls += 1
        if KilledGenerator.calls == self.call:
            kill()
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
