"""Parts of a transformers causal language model, whatever its classes call them: body, configuration, layers."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def base_model(model: nn.Module) -> "PreTrainedModel":
    """The transformers model, also if peft has wrapped it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def is_causal_model(module: nn.Module) -> bool:
    """True for a transformers model, also if peft has wrapped it."""
    from transformers import PreTrainedModel  # here, for a fast start of the command line

    return isinstance(base_model(module), PreTrainedModel)


def text_config(module: nn.Module) -> "PreTrainedConfig":
    """Configuration of the text model: a part of the whole for models that also see or hear."""
    return base_model(module).config.get_text_config(decoder=True)


def text_body(model: nn.Module) -> nn.Module:
    """The model without its output head: it returns last hidden states.

    Args:
        model: A transformers causal language model, with adapters or without.

    Returns:
        The decoder that the model names, or its only part of transformers where it names itself, as Llama 4 does. A
        sharded model may have a function in its place.
    """
    from transformers import PreTrainedModel  # here, for a fast start of the command line

    base = base_model(model)
    body = base.get_decoder()
    if body is base:
        parts = [child for child in base.children() if isinstance(child, PreTrainedModel)]
        body = parts[0] if len(parts) == 1 else base
    return cast(nn.Module, body)


def last_states(body: Callable[..., Any], **inputs: object) -> Tensor:
    """Last hidden states `[B, T, D]` of a forward pass; inputs that the model has no argument for are left out."""
    names = _arguments(getattr(body, "forward", body))
    taken = {name: value for name, value in inputs.items() if names is None or name in names}
    output = body(**taken)
    hidden: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return hidden


def takes(body: Callable[..., Any], name: str) -> bool:
    """True if the body's forward pass names this argument; one that lands in `**kwargs` may be ignored."""
    function = getattr(body, "forward", body)
    return name in inspect.signature(function).parameters


def _arguments(function: Callable[..., Any]) -> frozenset[str] | None:
    return _arguments_of(getattr(function, "__func__", function))


@lru_cache
def _arguments_of(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of a function's arguments; None if it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


DEPTHS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
"""Names of the number of decoder layers in configurations, the more special first."""


def depth_setting(config: "PreTrainedConfig") -> str | None:
    """Name of the setting that holds the number of decoder layers; None if there is none."""
    return next((name for name in DEPTHS if isinstance(getattr(config, name, None), int)), None)


def decoder_layers(model: nn.Module) -> tuple[nn.Module, str] | None:
    """The module that holds the list of decoder layers, and the list's name, such as `layers` or `h`.

    Args:
        model: A transformers causal language model, with adapters or without.

    Returns:
        The outermost list of the body with as many members as the configuration has layers; None if there is none, or
        if there are several.
    """
    body = text_body(model)
    depth = depth_setting(text_config(model))
    if not isinstance(body, nn.Module) or depth is None:
        return None
    count = getattr(text_config(model), depth)
    lists = [
        (name.count("."), name)
        for name, module in body.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and any(True for _ in module.parameters())
    ]
    if not lists:
        return None
    outermost = [name for level, name in lists if level == min(lists)[0]]
    if len(outermost) > 1:
        return None
    parent, _, name = outermost[0].rpartition(".")
    return body.get_submodule(parent), name
