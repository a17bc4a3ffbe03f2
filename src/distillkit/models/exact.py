"""Forward passes in float32, whatever the type of the weights, to compare them without rounding in the way."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from distillkit.models.structure import decoder_layers, text_body

_NARROW = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Runs the body of a model in float32, one decoder layer at a time, without autocast and without TF32.

    A layer's weights are widened when it is called and narrowed afterwards, so that no second copy of the model is ever
    in memory; the model is unchanged when the context ends. The output head is left as it is.

    Args:
        model: A transformers causal language model, with adapters or without, on any device.
    """
    body = text_body(model)
    device = next(model.parameters()).device
    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        if isinstance(body, nn.Module) and any(parameter.dtype in _NARROW for parameter in body.parameters()):
            stack.enter_context(_widened(model, body))
        yield


@contextmanager
def _widened(model: nn.Module, body: nn.Module) -> Iterator[None]:
    location = decoder_layers(model)
    layers = list(getattr(*location)) if location is not None else []
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    tables = [module for module in body.modules() if isinstance(module, nn.Embedding)]
    in_tables = {id(module.weight) for module in tables}  # large, and a few rows of them are read
    rest = [parameter for parameter in body.parameters() if id(parameter) not in in_layers | in_tables]
    narrow: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def widen(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if type(parameter) is nn.Parameter and parameter.dtype in _NARROW and id(parameter) not in narrow:
                narrow[id(parameter)] = parameter, parameter.data
                parameter.data = parameter.data.float()

    def restore(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if id(parameter) in narrow:
                parameter.data = narrow.pop(id(parameter))[1]

    with ExitStack() as stack:
        stack.callback(lambda: restore([parameter for parameter, _ in list(narrow.values())]))
        for table in tables:
            stack.callback(table.register_forward_hook(lambda _, __, output: output.float()).remove)
        for layer in layers:
            inner = [parameter for parameter in layer.parameters() if id(parameter) not in in_tables]
            before = layer.register_forward_pre_hook(lambda *_, inner=inner: widen(inner))
            after = layer.register_forward_hook(lambda *_, inner=inner: restore(inner), always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        widen(rest)
        yield
