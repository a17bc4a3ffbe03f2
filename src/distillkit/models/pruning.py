"""Depth pruning: a smaller student made of some of a model's decoder layers."""

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distillkit.errors import ModelError
from distillkit.models.capabilities import probe_tokens
from distillkit.models.equality import SAME_ARITHMETIC, differs, logits, rebuilt
from distillkit.models.heads import summary
from distillkit.models.modes import evaluating
from distillkit.models.structure import decoder_layers, depth_setting, last_states, text_body, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Config entries of transformers with one value per decoder layer.
_PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "attention_layers",
    "no_rope_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "activation_sparsity_pattern",
    "intermediate_size",
    "moe_layer_freq",
    "indexer_types",
)

# Config entries that list the indices of some layers.
_INDICES = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "ple_layer_ids")


def keep_layers(model: nn.Module, layers: Sequence[int]) -> None:
    """Drops all decoder layers of `model` except `layers`, in place.

    Weights, config, cache positions and per-layer settings are adjusted to the new depth, so that the model saves,
    reloads and generates like any other.

    Args:
        model: A transformers causal language model whose decoder has one list of layers, such as Llama or GPT-2.
        layers: Indices of the layers that remain, ascending, each in [0, number of layers).

    Raises:
        ModelError: If an index is out of range, or the architecture does not support fewer layers.
    """
    location = decoder_layers(model) if hasattr(model, "get_decoder") else None
    if location is None:
        raise ModelError(
            "Student.keep_layers needs a decoder with one list of layers, as Llama, Qwen, Gemma and GPT-2 have; "
            f"{type(model).__name__} has none."
        )
    parent, name = location
    modules = getattr(parent, name)
    count = len(modules)
    wrong = [index for index in layers if not 0 <= index < count]
    if wrong or not layers:
        raise ModelError(
            f"Student.keep_layers must name some of the model's {count} layers, 0 to {count - 1}, got {list(layers)}."
        )
    setattr(parent, name, nn.ModuleList(modules[index] for index in layers))
    for index, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            _renumber(module, ("layer_idx", "layer_id", "layer_number"), index)
    _renumber(parent, ("num_layers", "n_layer"), len(layers))
    try:
        # In most architectures the model and its decoder share one config object; some have two.
        for config in {id(config): config for config in (text_config(model), text_config(text_body(model)))}.values():
            _shrink(config, layers, count)
        _require_reloadable(model)
        with evaluating(model), torch.no_grad():
            last_states(text_body(model), input_ids=probe_tokens(model, 4)[None], use_cache=False)
    except ModelError:
        raise
    except Exception as error:  # the code of any architecture: it may raise anything
        raise ModelError(
            f"Student.keep_layers can't be used with {type(model).__name__}: a model of {len(layers)} of its layers "
            f"can't be built from its config or run ({summary(error)}). Leave keep_layers out."
        ) from error


def _renumber(module: nn.Module, names: Sequence[str], number: int) -> None:
    for name in names:
        if isinstance(vars(module).get(name), int):
            setattr(module, name, number)


def _shrink(config: "PreTrainedConfig", layers: Sequence[int], count: int) -> None:
    for name in _PER_LAYER:
        value = _stored(config, name)
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(config, name, [value[index] for index in layers])
    for name in _INDICES:
        value = _stored(config, name)
        if isinstance(value, list | tuple) and value:
            setattr(config, name, [layers.index(index) for index in value if index in layers])
    if isinstance(_stored(config, "attention_types"), list):  # GPT-Neo's is expanded to `attention_layers`
        config.attention_types = [[list(config.attention_layers), 1]]
    overrides = config.to_dict().get("per_layer_config")  # of layers that differ from the rest of the config
    if overrides:
        config.per_layer_config = None
    depth = depth_setting(config)
    assert depth is not None, "decoder_layers has read it"
    setattr(config, depth, len(layers))
    if overrides:
        config.per_layer_config = {
            layers.index(int(index)): settings for index, settings in overrides.items() if int(index) in layers
        }


def _stored(config: "PreTrainedConfig", name: str) -> object:
    """A setting of the config that can be changed, None if there is none: some are computed from the depth."""
    return None if isinstance(getattr(type(config), name, None), property) else vars(config).get(name)


def _require_reloadable(model: "PreTrainedModel") -> None:
    """Compares the model with one built from its config: settings on the meta device, then logits.

    A setting that a layer derives from its index need not show in the logits of short rows, such as a window.
    """
    config = type(model.config).from_dict(copy.deepcopy(model.config).to_dict())  # as it is saved and read
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        fresh = type(model)(config)
    contents, required = dict(_contents(model)), dict(_contents(fresh))
    # What the model alone has, such as frequencies of a kind of layer that is gone, is unused; parameters are listed.
    different = [name for name in required if name not in contents or not _agrees(contents[name], required[name])]
    different += sorted(model.state_dict().keys() - fresh.state_dict().keys())
    if not different and differs(logits(rebuilt(model)), logits(model), SAME_ARITHMETIC):
        different = ["its logits change"]
    if different:
        raise ModelError(
            f"Student.keep_layers can't be used with {type(model).__name__}: its layers depend on their index in a "
            f"way that its config does not record ({different[0]}), so the smaller model could not be reloaded. Leave "
            "keep_layers out."
        )


def _contents(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Shapes of the tensors, and numbers, texts and lists of them that the modules hold, by name.

    Windows, kinds of layers, scales and indices are among them.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        yield name, tensor.shape
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") and key != "training" and _is_plain(value):
                yield f"{name}.{key}", value


def _agrees(value: object, required: object) -> bool:
    if isinstance(value, list) and isinstance(required, list) and all(isinstance(item, str) for item in value):
        return set(required) <= set(value)  # kinds of layers, of which some may be gone
    return value == required


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(member) for member in value)
    return value is None or isinstance(value, bool | int | float | str)
