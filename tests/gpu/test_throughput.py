"""What the callback measures by events of the device."""

import math
from pathlib import Path

import pytest
import torch

from distillkit.callbacks import Throughput, throughput
from distillkit.callbacks.flops import matrix_rate
from gpu.small import ON_CPU, data_of, fit, module_of, needs_cuda

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_speed_and_memory_are_positive_numbers(precision: str, models: tuple[str, str], tmp_path: Path) -> None:
    log = fit(
        tmp_path, module_of(models), data_of(tmp_path / "data"), [Throughput()], precision=precision, max_epochs=2
    )
    for name in ("tokens_per_s", "body_tokens_per_s", "mfu", "peak_memory_gb"):
        values = log.column(f"train/{name}")
        assert len(values) == 8, name
        assert all(math.isfinite(value) and value > 0 for value in values), name
    for tokens, body in zip(log.column("train/tokens_per_s"), log.column("train/body_tokens_per_s"), strict=True):
        assert tokens < body, "prompts go through the body too"
    assert max(log.column("train/mfu")) < 100
    peaks = log.column("train/peak_memory_gb")
    assert peaks == sorted(peaks)
    assert ON_CPU or peaks[-1] < torch.cuda.get_device_properties(0).total_memory / 1e9


@needs_cuda
def test_the_time_between_two_marks_is_that_of_the_device(device: torch.device) -> None:
    marks, cycles = [], 50_000_000
    for _ in range(3):
        start = throughput._mark(device)
        torch.cuda._sleep(cycles)
        marks.append((start, throughput._mark(device)))
    assert not marks[-1][1].query(), "nothing has waited"
    seconds = throughput._seconds(marks)
    assert 3 * cycles / 4e9 < seconds < 3 * cycles / 2e8, "at a clock of 0.2 to 4 GHz"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_the_device_is_measured(dtype: torch.dtype, device: torch.device) -> None:
    rate, width = matrix_rate(device, dtype)
    assert width in {256, 512, 1024, 2048, 4096, 8192}
    if ON_CPU:
        assert rate > 1e8
    else:
        assert width >= 2048
        assert 1e12 < rate < 1e16
