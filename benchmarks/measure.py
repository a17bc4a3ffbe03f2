"""Shared by the benchmarks: inputs, child processes, time and peak memory.

Letters: N positions, V vocabulary, D hidden width.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, TypeVar

import torch
from results import add_output_options
from torch import Tensor, nn

from distillkit.testing import make_batch
from distillkit.types import Batch

Result = TypeVar("Result")
Job = dict[str, Any]

ROW_POSITIONS = 128
"""Response tokens of a row."""

_CHILD = "--child"
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")

# glibc raises its mmap threshold (up to 32 MiB) to the size of the largest buffer that was freed, and keeps freed
# buffers below it in the heap; each thread may have a heap of its own. A process then holds memory that no tensor
# uses, and how much depends on what ran before. Fixed thresholds and one heap give each freed buffer back at once, so
# that peak memory is the peak of what is alive. It costs page faults: time is taken in processes without this.
_GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class ChildError(Exception):
    """A measurement that ended without a result."""


def run_child(script: str, job: Job, give_back: bool = False) -> Job:
    """Runs `script` with `job` in a process of its own and returns what it reports.

    Args:
        script: Path of a benchmark, which calls `child_job` and `report`.
        job: What the child does, plain values.
        give_back: Whether the child's allocator returns freed memory to the system at once.

    Raises:
        ChildError: If the child fails or is killed.
    """
    env = {**os.environ, **(_GIVE_BACK if give_back else {})}
    done = subprocess.run([sys.executable, script, _CHILD, json.dumps(job)], env=env, capture_output=True, text=True)
    if done.returncode < 0:
        raise ChildError(f"killed by signal {-done.returncode}")
    if done.returncode:
        raise ChildError(done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}")
    return json.loads(done.stdout.strip().rpartition("\n")[2])


def child_job() -> Job | None:
    """The job of this process, or None in the parent."""
    return json.loads(sys.argv[2]) if sys.argv[1:2] == [_CHILD] else None


def report(result: Mapping[str, Any]) -> None:
    """Hands a child's result to its parent."""
    print(json.dumps(result))


class PeakMemory:
    """Highest memory within a `with` block, over what was in use at its start.

    On the CPU this is resident memory: the kernel's own high-water mark, reset at the start, or where that is not
    permitted, samples of a thread. Elsewhere it is what torch's allocator of the device handed out.

    Attributes:
        extra: Bytes, once the block has ended.
        method: How it was found.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.extra = 0
        self.method = "torch.cuda" if device.type == "cuda" else "VmHWM"
        self._start = self._seen = 0
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        _trim_heap()
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:
            self.method = "samples"
            self._sampler.start()
        self._start = self._seen = _status_bytes("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        elif self.method == "samples":
            self._over.set()
            self._sampler.join()
            peak = self._seen
        else:
            peak = _status_bytes("VmHWM")
        self.extra = peak - self._start

    def _sample(self) -> None:
        while not self._over.wait(0.001):
            self._seen = max(self._seen, _status_bytes("VmRSS"))


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ChildError(f"{_STATUS} has no {name}: peak memory on the CPU needs Linux")


def _trim_heap() -> None:
    """Gives back what was freed before, which the measured part would otherwise take for nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@dataclass(frozen=True)
class Usage:
    """Cost of a piece of work: wall-clock seconds, CPU seconds of all threads, peak bytes."""

    wall: float
    cpu: float
    extra: int
    method: str


def measured(work: Callable[[], Result], device: torch.device) -> tuple[Usage, Result]:
    """Runs `work` once, with what it took."""
    with PeakMemory(device) as memory:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Usage(wall, cpu, memory.extra, memory.method), result


@dataclass(frozen=True)
class Inputs:
    """Inputs of the loss from both models: hidden states `[N, D]`, heads `[V, D]`, the batch of the N positions."""

    student_hidden: Tensor
    student: nn.Linear
    teacher_hidden: Tensor
    teacher: nn.Linear
    batch: Batch

    def gradient_bytes(self) -> int:
        """Bytes of the gradients that every implementation ends with."""
        return sum(tensor.nbytes for tensor in (self.student_hidden, self.student.weight))


def make_inputs(positions: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Two related models whose logits have a standard deviation of about 2, as untrained pairs of one family have.

    The batch has rows of about `ROW_POSITIONS` positions, written by the teacher and the student in turn.
    """
    draw = torch.Generator(device).manual_seed(0)

    def drawn(rows: int) -> Tensor:
        return torch.randn(rows, width, generator=draw, device=device)

    teacher_hidden = drawn(positions)
    student_hidden = 0.8 * teacher_hidden + 0.6 * drawn(positions)
    weight = drawn(vocab).mul_(2 / width**0.5)
    heads = []
    for noise in (0.3, 0.0):
        head = nn.Linear(width, vocab, bias=False, device="meta")
        head_weight = weight if noise == 0 else weight + noise * 2 / width**0.5 * drawn(vocab)
        head.weight = nn.Parameter(head_weight.to(dtype), requires_grad=noise > 0)
        heads.append(head)
    rows = -(-positions // ROW_POSITIONS)
    lengths = [positions // rows + (row < positions % rows) for row in range(rows)]
    writers = [("teacher", "student")[row % 2] for row in range(rows)]
    batch = make_batch(lengths, writers, [row // 2 for row in range(rows)], vocab).to(device)
    hidden = student_hidden.to(dtype).requires_grad_()
    return Inputs(hidden, heads[0], teacher_hidden.to(dtype), heads[1], batch)


def alternate(script: str, jobs: Mapping[str, Job], repeats: int) -> dict[str, Job]:
    """Runs each job of `jobs` in turn, `repeats` times for its time and once more for its memory.

    Returns:
        Of each job a row: the job, what its last run reported, the median `wall` and `cpu` of the others, and these
        others as `runs`; or the job and the reason why it was `skipped`.
    """
    runs: dict[str, list[Job]] = {name: [] for name in jobs}
    rows: dict[str, Job] = {}
    for repeat in range(repeats + 1):
        for name in [name for name in jobs if name not in rows]:
            try:
                runs[name].append(run_child(script, jobs[name], give_back=repeat == repeats))
            except ChildError as error:
                rows[name] = {**jobs[name], "skipped": str(error)}
    for name in [name for name in jobs if name not in rows]:
        *timed, sized = runs[name]
        middle = {key: median(run[key] for run in timed) for key in ("wall", "cpu")}
        rows[name] = {**jobs[name], **sized, **middle, "wall_giving_back": sized["wall"], "runs": timed}
    return {name: rows[name] for name in jobs}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent b of the least-squares fit y = a·xᵇ, NaN where it is not defined."""
    if len(set(x)) < 2 or min(y) <= 0:
        return math.nan
    log_x, log_y = ([math.log(value) for value in values] for values in (x, y))
    mean_x, mean_y = sum(log_x) / len(log_x), sum(log_y) / len(log_y)
    spread = sum((value - mean_x) ** 2 for value in log_x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True)) / spread


def add_common_options(parser: argparse.ArgumentParser, json_name: str) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--device", default="cpu", help="where the tensors live: cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of hidden states and head")
    parser.add_argument("--repeats", type=int, default=3, help="processes that each median is taken over")
    add_output_options(parser, json_name)
