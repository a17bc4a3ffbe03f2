"""Throughput of training: tokens per second, model FLOPs utilisation and peak memory."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from lightning import Callback, Trainer

from distillkit.callbacks.flops import ModelFlops, arithmetic_type, matrix_rate, model_flops
from distillkit.devices.streams import backend
from distillkit.types import Batch

if TYPE_CHECKING:
    from distillkit.callbacks.run import RunModule

_log = logging.getLogger(__name__)

_Mark: TypeAlias = Any
"""A point in time: seconds as a float on the CPU, an event of the device elsewhere."""


class Throughput(Callback):
    """Logs the training throughput: means over the log interval, of one rank, without validation and generation.

    `train/tokens_per_s` counts response positions, and `train/body_tokens_per_s` all tokens that pass through the
    student's body, including prompts and the padding of padded rows. `train/mfu` is the FLOP rate of student and
    teacher (counted by `distillkit.callbacks.flops`) in percent of the rate at which the device multiplies large
    matrices, measured when training starts; a teacher with scores on disk counts only its head.
    `train/peak_memory_gb` is the peak memory so far, in 10⁹ bytes: of tensors on the GPU, or of the process on the CPU
    (on Linux).
    """

    def __init__(self) -> None:
        self._student, self._teacher = ModelFlops(), ModelFlops()
        self._rate = 0.0
        self._marks: list[tuple[_Mark, _Mark]] = []  # start and end of each micro-batch of the interval
        self._positions, self._tokens, self._flops = 0, 0, 0.0
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: "RunModule") -> None:
        """Counts the FLOPs per token, and measures the device's rate."""
        student, teacher = pl_module.student, pl_module.teacher if pl_module.loss.needs_teacher else None
        self._student = model_flops(student, trained=True)
        self._teacher = model_flops(None if teacher is None else teacher.scoring_module, trained=False)
        weight = next(student.parameters())
        dtype = arithmetic_type(weight, trainer.precision_plugin.forward_context())
        self._rate, width = matrix_rate(weight.device, dtype)
        name = str(dtype).removeprefix("torch.")
        _log.info("Multiplying two %d × %d matrices in %s reaches %.4g TFLOP/s.", width, width, name, self._rate / 1e12)
        self._start_over(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: "RunModule", batch: Batch, batch_idx: int) -> None:
        """Starts the clock."""
        self._marks.append((_mark(pl_module.device), None))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: "RunModule", outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Stops the clock, and logs after the last micro-batch of an interval: only then does it wait for a GPU."""
        self._marks[-1] = (self._marks[-1][0], _mark(pl_module.device))
        self._positions += batch.num_tokens
        self._tokens += self._student.tokens(batch)
        self._flops += self._student.of(batch) + self._teacher.of(batch)
        step = trainer.global_step
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it through a connector
        if step != self._step and interval and step % interval == 0:
            for name, value in self._metrics(pl_module.device).items():
                # On the host: the progress bar reads its metrics after each micro-batch.
                pl_module.log(f"train/{name}", torch.tensor(value))
                if name == "tokens_per_s":
                    pl_module.log("tokens/s", torch.tensor(value), prog_bar=True, logger=False)
            self._start_over(step)

    def _metrics(self, device: torch.device) -> dict[str, float]:
        seconds = _seconds(self._marks)
        metrics = {
            "tokens_per_s": self._positions / seconds,
            "body_tokens_per_s": self._tokens / seconds,
            "mfu": 100.0 * self._flops / seconds / self._rate,
        }
        peak = _peak_memory(device)
        return metrics if peak is None else metrics | {"peak_memory_gb": peak / 1e9}

    def _start_over(self, step: int) -> None:
        self._marks, self._positions, self._tokens, self._flops = [], 0, 0, 0.0
        self._step = step


def _mark(device: torch.device) -> _Mark:
    """The current time; on a GPU an event that is reached once the work queued before it is done."""
    module = backend(device)
    if module is None:
        return time.perf_counter()
    event = module.Event(enable_timing=True)
    event.record(module.current_stream(device))
    return event


def _seconds(marks: list[tuple[_Mark, _Mark]]) -> float:
    """The sum of the seconds between each pair of marks; waits for the last mark."""
    if isinstance(marks[-1][1], float):
        return float(sum(end - start for start, end in marks))
    marks[-1][1].synchronize()
    return float(sum(start.elapsed_time(end) for start, end in marks)) / 1e3


def _peak_memory(device: torch.device) -> float | None:
    """Peak memory in bytes; None if it can't be measured."""
    module = backend(device)
    if module is not None:
        peak: float = module.max_memory_allocated(device)
        return peak
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else None
