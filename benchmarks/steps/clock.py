"""Time and memory of a training loop's steps, taken at the same places in every loop."""

import time
from pathlib import Path
from typing import Any

import torch
from measure import PeakMemory
from torch import Tensor


class StepClock:
    """Takes the time from the end of one step to the end of the next: all that a loop does between is in it.

    Args:
        device: `cpu` or `cuda`, which is waited for at the end of each step.

    Attributes:
        wall: Seconds of each step, from the second on.
        cpu: Seconds of all threads, likewise.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._memory: PeakMemory | None = None
        self._losses: list[Tensor] = []
        self._last: tuple[float, float] | None = None

    def begin(self) -> None:
        """The first step begins and the models are loaded: memory is counted from here. Later calls do nothing."""
        if self._memory is None:
            self._memory = PeakMemory(self.device)
            self._memory.__enter__()

    def end(self, loss: Tensor) -> None:
        """A step with this loss has ended."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter(), time.process_time()
        self._losses.append(loss.detach().clone())
        if self._last is not None:
            self.wall.append(now[0] - self._last[0])
            self.cpu.append(now[1] - self._last[1])
        self._last = now

    def result(self) -> dict[str, Any]:
        """The measurements: losses in nats, times in seconds, memory in bytes."""
        assert self._memory is not None, "the first step never began"
        assert self._losses, "no step has ended"
        peak = self._peak()
        self._memory.__exit__(None, None, None)
        return {
            "losses": [float(loss) for loss in self._losses],
            "wall": self.wall,
            "cpu": self.cpu,
            "peak": peak,
            "extra": self._memory.extra,
            "memory_method": self._memory.method,
        }

    def _peak(self) -> int:
        """Highest memory since `begin`, what was in use then included."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
