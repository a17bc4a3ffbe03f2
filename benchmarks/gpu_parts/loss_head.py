"""The loss with both output heads, forward and backward, beside other libraries and beside the bare matrix products.

Letters: N positions, V vocabulary, D hidden width.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from statistics import median
from time import perf_counter
from typing import Any

import torch
from loss_memory import DIVERGENCES, IMPLEMENTATIONS, fingerprint
from measure import Inputs, PeakMemory, make_inputs
from torch import Tensor

from distillkit.callbacks import matrix_rate
from gpu_parts.cases import CaseError, Row, Settings

ALLOWED = 2e-2
"""Largest relative deviation of value and gradient norms from the plain formula's, in bfloat16."""
GIB = 2**30
SECONDS = 1.0
"""How long a measurement is repeated."""
LEAST_REPEATS, MOST_REPEATS = 3, 20

Size = tuple[int, int, int]


def products(settings: Settings, size: Size) -> Iterator[Row]:
    """The four matrix products of the two heads: logits of student and teacher, gradients by states and by head."""
    device = torch.device(settings.device)
    inputs = drawn(size, device)
    positions, vocab, width = size
    states, head = inputs.student_hidden.detach(), inputs.student.weight.detach()
    logits, teacher_logits = (torch.empty(positions, vocab, dtype=states.dtype, device=device) for _ in range(2))
    states_grad, head_grad = torch.empty_like(states), torch.empty_like(head)

    def work() -> None:
        torch.mm(states, head.T, out=logits)
        torch.mm(inputs.teacher_hidden, inputs.teacher.weight.T, out=teacher_logits)
        torch.mm(logits, head, out=states_grad)
        torch.mm(logits.T, states, out=head_grad)

    milliseconds = median(timed(work, device))
    rate = 8.0 * positions * vocab * width / milliseconds * 1e3
    best, _ = matrix_rate(device, torch.bfloat16)
    yield {
        **described(size),
        "implementation": "matrix products",
        "ms": milliseconds,
        "tflops": rate / 1e12,
        "matrix_rate_tflops": best / 1e12,
        "figure": f"{milliseconds:.1f} ms, {rate / 1e12:.0f} TFLOP/s of {best / 1e12:.0f}",
    }


def head(settings: Settings, size: Size, divergence: str, implementation: str, compiled: bool = False) -> Iterator[Row]:
    """One implementation of a divergence."""
    yield from verified(measure(settings, size, divergence, implementation, compiled), settings, size, divergence)


def fastest_liger(settings: Settings, size: Size, divergence: str, chunk_sizes: list[int]) -> Iterator[Row]:
    """Liger's loss, compiled, with the chunk size that makes it fastest."""
    rows = [
        measure(settings, size, divergence, "liger", True, chunk_size=min(chunk_size, size[0]))
        for chunk_size in chunk_sizes
    ]
    fastest = min(rows, key=lambda row: row["ms"])
    fastest["chunk_ms"] = {str(row["chunk_size"]): row["ms"] for row in rows}
    fastest["figure"] += f", chunks of {fastest['chunk_size']}"
    yield from verified(fastest, settings, size, divergence)


def measure(
    settings: Settings, size: Size, divergence: str, implementation: str, compiled: bool = False, **options: Any
) -> Row:
    """Time, memory, value and gradients of an implementation."""
    device = torch.device(settings.device)
    inputs, entry = drawn(size, device), DIVERGENCES[divergence]
    run = IMPLEMENTATIONS[implementation].run
    arguments = options | ({"compiled": compiled} if implementation in ("distillkit", "liger") else {})

    def work() -> Tensor:
        inputs.student_hidden.grad = inputs.student.weight.grad = None
        value = run(inputs, entry, **arguments)
        value.backward()
        return value.detach()

    if compiled:  # dynamo gives up after some sizes of the same code
        torch.compiler.reset()
    work()  # kernels are compiled and chosen
    work()
    inputs.student_hidden.grad = inputs.student.weight.grad = None
    with PeakMemory(device) as memory:
        value = work()
    figures = result(inputs, value)
    extra = memory.extra - inputs.gradient_bytes()
    milliseconds = median(timed(work, device))
    return {
        **described(size),
        "divergence": divergence,
        "implementation": implementation,
        "compiled": compiled,
        **options,
        **figures,
        "ms": milliseconds,
        "extra_gib": extra / GIB,
        "figure": f"{milliseconds:.1f} ms, {extra / GIB:.2f} GiB extra",
    }


def verified(row: Row, settings: Settings, size: Size, divergence: str) -> Iterator[Row]:
    """The row with its deviation from the plain formula.

    Raises:
        CaseError: If it is too large.
    """
    if row["implementation"] == "textbook":
        yield row
        return
    expected = reference(settings.device, tuple(size), divergence)
    row["deviation"] = max(abs(row[name] / expected[name] - 1) for name in ("value", "hidden_norm", "head_norm"))
    row["figure"] += f", dev {row['deviation']:.0e}"
    yield row
    if not row["deviation"] <= ALLOWED or not math.isfinite(row["value"]):
        values = {name: (row[name], expected[name]) for name in ("value", "hidden_norm", "head_norm")}
        raise CaseError(f"differs from the formula by {row['deviation']:.1e}, allowed is {ALLOWED:g}: {values}")


@cache
def reference(device: str, size: Size, divergence: str) -> dict[str, float]:
    """Value and gradients of the plain formula."""
    inputs = drawn(size, torch.device(device))
    value = IMPLEMENTATIONS["textbook"].run(inputs, DIVERGENCES[divergence])
    value.backward()
    return result(inputs, value.detach())


def result(inputs: Inputs, value: Tensor) -> dict[str, float]:
    """The value and what identifies the gradients."""
    assert inputs.student_hidden.grad is not None, "no gradient of the hidden states"
    assert inputs.student.weight.grad is not None, "no gradient of the head"
    return {
        "value": float(value),
        **fingerprint("hidden", inputs.student_hidden.grad),
        **fingerprint("head", inputs.student.weight.grad),
    }


def drawn(size: Size, device: torch.device) -> Inputs:
    """States and heads, drawn on the device."""
    positions, vocab, width = size
    return make_inputs(positions, vocab, width, torch.bfloat16, device)


def described(size: Size) -> Row:
    """The size as columns."""
    return dict(zip(("positions", "vocab", "width"), size, strict=True))


def timed(work: Callable[[], Any], device: torch.device) -> list[float]:
    """Milliseconds of each of several runs, by events on a GPU."""
    work()
    times: list[float] = []
    end = perf_counter() + SECONDS
    while len(times) < LEAST_REPEATS or (perf_counter() < end and len(times) < MOST_REPEATS):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            begin = perf_counter()
            work()
            times.append(1e3 * (perf_counter() - begin))
    return times
