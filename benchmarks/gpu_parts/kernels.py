"""Shares of the device's time by kind of kernel, from torch's profiler."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from gpu_parts.cases import CaseError, Row

KINDS = {
    "attention": r"flash|fmha|flex|attention|sdpa|mha_",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|matmul|::mm$|::addmm|::bmm|::linear$|mkldnn",
    "optimizer": r"adam|multi_tensor|foreach|unscale",
    "copies": r"memcpy|memset|copy|::to$|::clone|::cat$|CatArray|fill",
    "softmax and elementwise": r"softmax|elementwise|reduce|triton|norm|::(mul|add|sub|div|exp|log|sum|silu|mean|pow)",
}
"""Kinds of kernels by their names, the first that matches; every other is `other`."""

TOP = 2
"""Kernels that are named."""


def make_profiler(device: str) -> Any:
    """A profiler of the device's kernels, or of torch's operators on the CPU."""
    return torch.profiler.profile(
        activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU], acc_events=True
    )


def synchronize(device: str) -> None:
    """Waits for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def shares(profiler: Any, device: str, seconds: float) -> Iterator[Row]:
    """Ten rows: what each kind of kernel takes of the device's time, and how long the device is idle.

    Raises:
        CaseError: If the profiler has seen nothing.
    """
    device_type = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    events = [
        event
        for event in profiler.events()
        if event.device_type == device_type and not getattr(event, "is_user_annotation", False)
    ]
    if not events:
        raise CaseError("the profiler has recorded no kernel")
    names: Counter[str] = Counter()
    for event in events:
        is_gpu = device == "cuda"
        names[event.name] += event.time_range.elapsed_us() if is_gpu else event.self_cpu_time_total
    kinds: Counter[str] = Counter()
    for name, microseconds in names.items():
        kinds[kind_of(name)] += microseconds
    total = sum(names.values())
    busy = union([(event.time_range.start, event.time_range.end) for event in events])
    idle = max(0.0, 1 - busy / (1e6 * seconds))
    for kind in [*KINDS, "other"]:
        yield {"kind": kind, "share": 100 * kinds[kind] / total, "ms": kinds[kind] / 1e3}
    for name, microseconds in names.most_common(TOP):
        yield {"kind": f"· {name[:60]}", "share": 100 * microseconds / total, "ms": microseconds / 1e3}
    yield {"kind": "all kernels", "share": 100.0, "ms": total / 1e3}
    most = ", ".join(f"{kind} {100 * part / total:.0f} %" for kind, part in kinds.most_common(3))
    yield {
        "kind": "idle, of the time",
        "share": 100 * idle,
        "ms": 1e3 * seconds * idle,
        "figure": f"{most}; idle {100 * idle:.0f} %",
    }


def union(intervals: Sequence[tuple[float, float]]) -> float:
    """Length that the intervals cover together."""
    covered, reach = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return covered
