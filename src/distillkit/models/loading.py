"""Loading a causal language model, as student and teacher do, and getting rid of its adapters."""

import copy
import logging
from typing import Any, Literal

import torch
from torch import nn

from distillkit.hardware import native
from distillkit.models.checkpoint import read_model
from distillkit.models.sources import prepare

_log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]

Compile = bool | Literal["reduce-overhead", "max-autotune"]

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(source: str, dtype: Dtype, attn_implementation: str | None = None) -> nn.Module:
    """Loads a causal language model onto the CPU, in eval mode.

    Args:
        source: A hub id, a folder, a `.gguf` file, or `wheel:NAME==VERSION/PATH/IN/WHEEL.gguf#sha256=HEX`.
        dtype: Type of the parameters.
        attn_implementation: Attention kernel by transformers' name, such as `sdpa`; None lets transformers choose.

    Returns:
        A transformers causal language model.

    Raises:
        ModelError: If the source can't be read, or its tensors are not exactly those that its config asks for.
    """
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model: nn.Module = read_model(prepare(source), source, DTYPES[dtype], **options)
    return model


def for_inference(model: nn.Module, device: torch.device, what: str) -> nn.Module:
    """Moves a model to `device`, in eval mode and frozen.

    Parameters in a type that the device multiplies far more slowly than float32 keep their values and become float32,
    and the log says so.

    Args:
        model: A transformers causal language model.
        device: Where it is to run.
        what: What the log calls it.
    """
    for dtype in {own.dtype for own in model.parameters() if native(own.dtype, device) != own.dtype}:
        _log.info("%s: this processor has no instructions for %s, so it runs in float32", what, str(dtype)[6:])
        for own in model.parameters():
            own.data = own.data.to(native(own.dtype, device))
    return model.to(device).eval().requires_grad_(False)


def compile_layers(model: nn.Module, mode: Compile) -> None:
    """Has `torch.compile` make kernels of each decoder layer, in place: names and weights stay as they are.

    Layers are alike, so that what is made of the first serves all. Attention over packed rows stays outside.

    Args:
        model: A transformers causal language model, with adapters or without.
        mode: A mode of `torch.compile`. With `reduce-overhead`, which records CUDA graphs, every length of a batch is
            made anew: `data.bucket` keeps them few. True is the default mode, in which one kernel serves all lengths.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    for layer in base.get_decoder().layers:
        layer.compile(dynamic=True) if mode is True else layer.compile(mode=mode, dynamic=False)


def merge_lora(model: nn.Module) -> nn.Module:
    """The model without adapters, ready for `save_pretrained`.

    Args:
        model: A transformers causal language model, with LoRA adapters or without.

    Returns:
        `model` itself if it has no adapters, else a merged copy: training can go on with `model`.
    """
    from peft import PeftModel  # here, for a fast start of the command line

    if not isinstance(model, PeftModel):
        return model
    merged: nn.Module = copy.deepcopy(model).merge_and_unload()
    return merged
