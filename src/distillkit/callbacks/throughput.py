"""How fast training goes, and what it makes of the device."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback

from distillkit.evaluation.flops import ModelFlops, arithmetic_type, matrix_rate, model_flops
from distillkit.types import Batch

_log = logging.getLogger(__name__)


class Throughput(Callback):
    """Logs how fast training goes: means over the log interval, of one rank, without validation and generation.

    `train/tokens_per_s` counts response positions, and `train/body_tokens_per_s` all tokens that go through the
    student's body: with prompts, and with padding where it is given padded rows. `train/mfu` is the share, in percent,
    of the rate at which the device multiplies large matrices, measured when training starts, that the FLOPs of student
    and teacher reach (`distillkit.evaluation.flops` counts them); a teacher whose scores are on disk has those of its
    head alone. `train/peak_memory_gb` is the most memory used so far, in 10⁹ bytes: of the GPU by tensors, or of the
    machine by the process (on Linux).
    """

    def __init__(self) -> None:
        self._student, self._teacher = ModelFlops(), ModelFlops()
        self._rate = 0.0
        self._marks: list[tuple[Any, Any]] = []  # start and end of each micro-batch of the interval
        self._positions, self._tokens, self._flops = 0, 0, 0.0
        self._step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Counts what a token costs, and measures the device."""
        student, teacher = pl_module.student, pl_module.teacher if pl_module.loss.needs_teacher else None
        self._student = model_flops(student, trained=True)
        self._teacher = model_flops(None if teacher is None else teacher.scorer, trained=False)
        weight = next(student.parameters())
        dtype = arithmetic_type(weight, trainer.precision_plugin.forward_context())
        self._rate, width = matrix_rate(weight.device, dtype)
        name = str(dtype).removeprefix("torch.")
        _log.info("a product of two %d × %d matrices in %s: %.4g TFLOP/s", width, width, name, self._rate / 1e12)
        self._start_over(trainer.global_step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Starts the clock."""
        self._marks.append((_mark(pl_module.device), None))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Stops it, and logs if this was the last micro-batch of an interval: nothing waits for a GPU before that."""
        self._marks[-1] = (self._marks[-1][0], _mark(pl_module.device))
        self._positions += batch.num_tokens
        self._tokens += self._student.tokens(batch)
        self._flops += self._student.of(batch) + self._teacher.of(batch)
        step, interval = trainer.global_step, trainer.log_every_n_steps
        if step != self._step and interval and step % interval == 0:
            for name, value in self._figures(pl_module.device).items():
                # On the host: the progress bar reads its figures after each micro-batch.
                pl_module.log(f"train/{name}", torch.tensor(value), prog_bar=name == "tokens_per_s")
            self._start_over(step)

    def _figures(self, device: torch.device) -> dict[str, float]:
        seconds = _seconds(self._marks)
        figures = {
            "tokens_per_s": self._positions / seconds,
            "body_tokens_per_s": self._tokens / seconds,
            "mfu": 100.0 * self._flops / seconds / self._rate,
        }
        peak = _peak_memory(device)
        return figures if peak is None else figures | {"peak_memory_gb": peak / 1e9}

    def _start_over(self, step: int) -> None:
        self._marks, self._positions, self._tokens, self._flops = [], 0, 0, 0.0
        self._step = step


def _mark(device: torch.device) -> Any:
    """Now: on a GPU an event, which happens when what was queued before it is done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(marks: list[tuple[Any, Any]]) -> float:
    """The sum of the times between two marks; waits for the last."""
    if isinstance(marks[-1][1], float):
        return float(sum(end - start for start, end in marks))
    marks[-1][1].synchronize()
    return float(sum(start.elapsed_time(end) for start, end in marks)) / 1e3


def _peak_memory(device: torch.device) -> float | None:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else None
