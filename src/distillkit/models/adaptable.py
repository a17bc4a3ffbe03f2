"""Linear layers of a model that can't have an adapter, found by trying, and why."""

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from distillkit.models.equality import differs, logits, rounding_tolerance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYPASSED = "reads the weights of {} without calling the layer, so an adapter on it would have no effect in training"
IRREGULAR = "has more in its layer {} than a product with its weights, which an adapter can't be added to"
SHARED = "uses the weights of {} in several layers, so that the merged adapter of one would change the others too"


def unadaptable(model: "PreTrainedModel") -> dict[str, str]:
    """Linear layers of the language model on which an adapter would do nothing, fail, or be lost when it is merged.

    Args:
        model: A transformers causal language model without adapters; its weights are not changed.

    Returns:
        `BYPASSED`, `IRREGULAR` or `SHARED` by the layer's full name.
    """
    language = {id(module) for module in model.get_decoder().modules()}
    layers = {name: layer for name, layer in model.named_modules() if id(layer) in language and is_linear(layer)}
    calls: dict[int, bool] = {}
    """By layer: whether all its calls were products with its weights."""

    def check(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        calls[id(layer)] = calls.get(id(layer), True) and _is_product(layer, inputs, output)

    hooks = [layer.register_forward_hook(check) for layer in layers.values()]
    expected = logits(model)
    for hook in hooks:
        hook.remove()
    uncalled = {name: layer for name, layer in layers.items() if id(layer) not in calls}
    return {
        **dict.fromkeys(_shared(model, layers), SHARED),
        **dict.fromkeys((name for name, layer in layers.items() if not calls.get(id(layer), True)), IRREGULAR),
        **dict.fromkeys(_read(model, uncalled, expected), BYPASSED),
    }


def is_linear(module: nn.Module) -> bool:
    """True for a layer with a matrix of weights: PyTorch's, one derived from it, or GPT-2's."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _is_product(layer: nn.Module, inputs: tuple[object, ...], output: object) -> bool:
    """True if a layer's output is its input times its weights; of quantised weights the shape alone is compared."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor), "is_linear"
    if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
        return not inputs and isinstance(output, Tensor)  # an input that is passed by name is not seen
    states = inputs[0]
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return output.shape[:-1] == states.shape[:-1]
    matrix = weight if isinstance(layer, nn.Linear) else weight.T
    if states.shape[-1] != matrix.shape[1] or output.shape != (*states.shape[:-1], matrix.shape[0]):
        return False
    product = linear(states.to(weight.dtype), matrix, bias if isinstance(bias, Tensor) else None)
    return not differs(output.float(), product.float(), rounding_tolerance(weight.dtype))


def _read(model: "PreTrainedModel", layers: dict[str, nn.Module], expected: Tensor) -> list[str]:
    """The layers whose weights are used; the others are experts that no token was sent to.

    Args:
        model: The model.
        layers: Layers that are not called.
        expected: The model's logits.
    """
    groups: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    for name, layer in layers.items():
        groups[name.rpartition(".")[2]][name] = layer
    read: list[str] = []
    for group in groups.values():
        weights = list({id(layer.weight): layer.weight.data for layer in group.values()}.values())
        for weight in weights:
            weight.neg_()  # type: ignore[operator]
        if not torch.equal(logits(model), expected):
            read += group
        for weight in weights:
            weight.neg_()  # type: ignore[operator]  # exactly what it was
    return read


def _shared(model: "PreTrainedModel", layers: dict[str, nn.Module]) -> list[str]:
    """The layers that share their weights with another layer, as in Zamba's repeated block."""
    users: dict[int, set[tuple[int, str]]] = defaultdict(set)
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module):
            parent, _, attribute = name.rpartition(".")
            users[id(module.weight)].add((id(model.get_submodule(parent)), attribute))
    return [name for name, layer in layers.items() if len(users[id(layer.weight)]) > 1]
