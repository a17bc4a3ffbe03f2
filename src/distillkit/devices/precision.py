"""Data types that a processor multiplies fast, and the default device."""

import torch

_CPU_CHECKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def has_native_matmul(dtype: torch.dtype, device: torch.device) -> bool:
    """Returns True if `device` has native instructions for matrix products in `dtype`.

    A CPU without them still multiplies in half precision, but many times slower than in float32. Devices other than
    CPUs are assumed to have them.
    """
    if device.type != "cpu" or dtype not in _CPU_CHECKS:
        return True
    has_kernels: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_kernels and bool(getattr(torch.ops.mkldnn, _CPU_CHECKS[dtype])())


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns `dtype` if `device` multiplies natively in it, else float32."""
    return dtype if has_native_matmul(dtype, device) else torch.float32


def default_device() -> torch.device:
    """Returns the device that models run on by default: CUDA if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
