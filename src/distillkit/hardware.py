"""What the processor at hand can do."""

import torch

_QUESTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` multiplies matrices of `dtype` by instructions of its own.

    A CPU without them still multiplies in half precision, many times slower than in float32. Other devices are taken at
    their word.
    """
    if device.type != "cpu" or dtype not in _QUESTIONS:
        return True
    has_kernels: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_kernels and bool(getattr(torch.ops.mkldnn, _QUESTIONS[dtype])())


def native(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype` if `device` multiplies in it, else float32."""
    return dtype if multiplies(dtype, device) else torch.float32


def default_device() -> torch.device:
    """Where models run if nobody says otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
