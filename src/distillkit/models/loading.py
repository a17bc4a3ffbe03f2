"""Causal language models: loading, moving to a device, and compiling."""

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from distillkit.devices.precision import fast_dtype
from distillkit.errors import ConfigError, ModelError
from distillkit.models.checkpoint import read_model
from distillkit.models.options import DEFAULT, SourceOptions
from distillkit.models.sources import prepare
from distillkit.models.structure import base_model, decoder_layers, text_body

_log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]

Compile = bool | Literal["reduce-overhead", "max-autotune"]

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


RESERVED = ("attn_implementation", "dtype", "torch_dtype", "revision", "trust_remote_code", "output_loading_info")
"""Arguments of `from_pretrained` that `model_kwargs` can't set: most have a setting of their own."""


def check_model_kwargs(name: str, model_kwargs: Mapping[str, object] | None) -> None:
    """Refuses `model_kwargs` that other settings determine.

    Args:
        name: Class whose setting it is, for the error.
        model_kwargs: Further arguments of transformers' `from_pretrained`; None has none.

    Raises:
        ConfigError: If one of them is reserved.
    """
    reserved = sorted(set(model_kwargs or {}) & set(RESERVED))
    if reserved:
        raise ConfigError(f"{name}.model_kwargs can't set {reserved[0]}: set it beside model_kwargs.")


def load_model(
    source: str,
    dtype: Dtype,
    attn_implementation: str | None = None,
    options: SourceOptions = DEFAULT,
    model_kwargs: Mapping[str, object] | None = None,
) -> nn.Module:
    """Loads a causal language model onto the CPU, in eval mode.

    Args:
        source: A hub id, a folder, a `.gguf` file, or `wheel:NAME==VERSION/PATH/IN/WHEEL.gguf#sha256=HEX`.
        dtype: Type of the parameters.
        attn_implementation: Attention implementation that transformers uses, such as `sdpa`; None is transformers'
            default.
        options: Revision, and whether the model's own code may run.
        model_kwargs: Further arguments of transformers' `from_pretrained`; None has none.

    Returns:
        A transformers causal language model.

    Raises:
        ModelError: If the source can't be read, or its tensors are not exactly those that its config asks for.
    """
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    arguments = {**attention, **(model_kwargs or {}), **options.as_arguments()}
    model: nn.Module = read_model(prepare(source, options), source, DTYPES[dtype], **arguments)
    return model


def for_inference(model: nn.Module, device: torch.device, name: str) -> nn.Module:
    """Moves a model to `device`, in eval mode and frozen.

    Parameters are converted to float32, and a log line says so, if the device multiplies matrices of their type far
    more slowly than float32.

    Args:
        model: A transformers causal language model.
        device: Device to run on.
        name: Name of the model in the log.
    """
    slow_dtypes = {param.dtype for param in model.parameters() if fast_dtype(param.dtype, device) != param.dtype}
    for dtype in slow_dtypes:
        _log.info("%s: this processor has no instructions for %s, so it runs in float32", name, str(dtype)[6:])
        for param in model.parameters():
            param.data = param.data.to(fast_dtype(param.dtype, device))
    return model.to(device).eval().requires_grad_(False)


VARIANTS = 64
"""Compiled variants that dynamo may make of the same code; its own limit is 8."""


def compile_layers(model: nn.Module, mode: Compile) -> None:
    """Compiles the decoder layers with `torch.compile`, in place; parameter names and weights do not change.

    All layers share the code that is compiled for the first. Packed attention is not compiled. A mode other than True
    records CUDA graphs. A graph's memory is overwritten by the next call of any separately compiled function, so the
    layers are then compiled together as one function.

    Args:
        model: A transformers causal language model, with adapters or without.
        mode: True for `torch.compile`'s default mode, in which one kernel serves all batch lengths, or the name of a
            mode. `reduce-overhead` records a CUDA graph for every batch length: `data.bucket` limits their number.

    Raises:
        ModelError: If the model has no list of decoder layers.
    """
    base, location = base_model(model), decoder_layers(model)
    if location is None:
        raise ModelError(f"{type(base).__name__} has no list of decoder layers to compile: set compile to false.")
    # Code is compiled per length, model, gradient mode and kind of layer; past the limit dynamo runs it uncompiled.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * VARIANTS)
    if mode is not True:
        text_body(model).compile(mode=mode, dynamic=False)
        setattr(base, _GRAPHS, True)
        return
    for layer in getattr(*location):
        layer.compile(dynamic=True)


_GRAPHS = "_distillkit_graphs"


def records_graphs(model: nn.Module | None) -> bool:
    """True if the model runs as CUDA graphs. They share one memory pool and must not run on two streams at once."""
    return model is not None and hasattr(base_model(model), _GRAPHS)
