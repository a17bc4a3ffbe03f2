"""A smaller student by keeping some of a model's decoder layers."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distillkit.errors import ModelError

# Config entries of transformers with one value per decoder layer.
_PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "activation_sparsity_pattern",
    "intermediate_size",
)


def keep_layers(model: nn.Module, layers: Sequence[int]) -> None:
    """Drops every decoder layer of `model` but `layers`, in place.

    Weights, config, cache positions and per-layer settings are those of a model of that depth: it saves, reloads and
    generates as any other.

    Args:
        model: A transformers causal language model whose decoder holds its layers in `layers`, such as Llama.
        layers: Numbers of the layers that stay, ascending, each in [0, number of layers).

    Raises:
        ModelError: If a number is out of range, or the architecture can't lose layers.
    """
    decoder = _decoder(model)
    count = len(decoder.layers)
    wrong = [number for number in layers if not 0 <= number < count]
    if wrong or not layers:
        raise ModelError(
            f"Student.keep_layers must name some of the model's {count} layers, 0 to {count - 1}, got {list(layers)}."
        )
    decoder.layers = nn.ModuleList(decoder.layers[number] for number in layers)
    for place, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    # The model's config and its decoder's are one object in most architectures, and two in some.
    configs = {id(config): config for config in (_text_config(model), _text_config(decoder))}
    for config in configs.values():
        _shrink(config, layers, count)
    _require_reloadable(model)


def _decoder(model: Any) -> Any:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ModelError(
            f"Student.keep_layers needs a decoder with a list of layers, as Llama, Qwen and Gemma have; "
            f"{type(model).__name__} has none."
        )
    return decoder


def _text_config(module: Any) -> Any:
    return module.config.get_text_config(decoder=True)


def _shrink(config: Any, layers: Sequence[int], count: int) -> None:
    for name in _PER_LAYER:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(config, name, [value[number] for number in layers])
    config.num_hidden_layers = len(layers)


def _require_reloadable(model: Any) -> None:
    """Compares the model with one built from its config alone, on the meta device, which costs no memory."""
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config)).state_dict()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in fresh.items()}:
        raise ModelError(
            f"Student.keep_layers can't be used with {type(model).__name__}: its layers depend on their place in a way "
            "that its config doesn't say, so that the smaller model could not be loaded again."
        )
