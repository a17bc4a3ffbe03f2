"""Rank, world size and barriers of a run; a run with a single process works too."""

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


def is_initialized() -> bool:
    """Returns True if a process group is initialized."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if is_initialized() else 1


def barrier() -> None:
    """Waits until all processes have reached this call."""
    if is_initialized():
        dist.barrier()


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Sums each of a list of numbers over all processes, in float64. Every rank must call this with as many numbers."""
    if not is_initialized():
        return list(values)
    on_host = dist.get_backend() in ("gloo", "mpi")
    device = torch.device("cpu") if on_host else torch.accelerator.current_accelerator()
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    totals: list[float] = sums.tolist()
    return totals


def thread_barrier() -> Callable[[], None]:
    """Returns a barrier for a second thread. It has its own process group: collectives of two threads must not mix."""
    if not is_initialized():
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))  # ranks may generate for hours
    return lambda: dist.barrier(group)
