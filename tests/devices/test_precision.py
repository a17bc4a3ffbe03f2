import pytest
import torch

from distillkit.devices.precision import fast_dtype, has_native_matmul

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_processor_multiplies_in_full_precision(dtype):
    assert has_native_matmul(dtype, CPU)
    assert fast_dtype(dtype, CPU) is dtype


@pytest.mark.parametrize(
    ("dtype", "question"),
    [(torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported")],
)
@pytest.mark.parametrize("answer", [True, False])
def test_a_cpu_that_has_no_instructions_for_a_type_takes_float32(dtype, question, answer, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, question, lambda: answer)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert has_native_matmul(dtype, CPU) is answer
    assert fast_dtype(dtype, CPU) is (dtype if answer else torch.float32)


def test_without_kernels_of_its_own_torch_takes_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fast_dtype(torch.bfloat16, CPU) is torch.float32


def test_a_gpu_keeps_half_precision():
    assert fast_dtype(torch.bfloat16, torch.device("cuda")) is torch.bfloat16
