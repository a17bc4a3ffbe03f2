"""Floating-point operations of a step, counted from shapes, and the rate at which a device multiplies matrices.

Counted as by Kaplan et al. 2020 (arXiv 2001.08361, section 2.1) and for MFU by Chowdhery et al. 2022 (PaLM, arXiv
2204.02311, appendix B): products of matrices alone, and nothing twice, so that gradient checkpointing adds none. Where
PaLM has every token attend to the whole sequence, we count the tokens that it sees.

Letters: N response positions, D hidden width, V vocabulary, H query heads, d head width.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distillkit.models.scoring import base_model, packs
from distillkit.types import Batch

WIDTHS = {"cuda": 8192, "cpu": 1024}
"""Width of the square matrices that the rate is measured with: large enough for the device's best rate. Other devices
get that of `cpu`."""

CALIBRATION_SECONDS = 0.25
"""How long that takes; a type for which the device has no kernels gets smaller matrices."""


@dataclass(frozen=True)
class ModelFlops:
    """What a model costs in a step, forward and, if it is trained, backward.

    Args:
        token: FLOPs of the body's linear layers, for each token that goes through it.
        pair: FLOPs of attention in all layers, for each token and token that it sees, itself included.
        position: FLOPs of the output embedding, for each of the N response positions.
        packed: Whether it is given rows end to end where a batch has them.
    """

    token: float = 0.0
    pair: float = 0.0
    position: float = 0.0
    packed: bool = False

    def of(self, batch: Batch) -> float:
        """FLOPs of a batch; padding that goes through the body counts."""
        return self.token * self.tokens(batch) + self.pair * self._pairs(batch) + self.position * batch.num_tokens

    def tokens(self, batch: Batch) -> int:
        """Tokens of a batch that go through the body."""
        line = batch.packed if self.packed else None
        return batch.input_ids.numel() if line is None else line.input_ids.numel()

    def _pairs(self, batch: Batch) -> float:
        """Pairs of a token and one that it sees, known on the host; a sliding window is not taken into account."""
        line = batch.packed if self.packed else None
        if line is None:
            rows, length = batch.input_ids.shape
            return rows * length * (length + 1) / 2
        own = [(stop - start, last - first) for start, stop, first, last in line.segments]
        return sum(length * shared + length * (length + 1) / 2 for length, shared in own)


def model_flops(model: nn.Module | None, trained: bool) -> ModelFlops:
    """The cost of a model.

    A weight costs 2 FLOPs forward, a product and a sum, and as many backward for the gradient by its input; 2 more for
    its own gradient if it has one, which a weight under LoRA has not. Attention costs 4·H·d a pair and layer, half of
    it for the scores and half for the values, and twice as much backward.

    Args:
        model: A transformers causal language model, peft's or not; an output embedding alone; None for what does not
            run in this process.
        trained: Whether a gradient is taken.
    """
    if model is None:
        return ModelFlops()
    base = base_model(model)
    if not hasattr(base, "get_decoder"):
        return ModelFlops(position=_linear(base, trained))
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    return ModelFlops(
        token=_linear(base.get_decoder(), trained, config),
        pair=4.0 * width * config.num_hidden_layers * (3 if trained else 1),
        position=_linear(base.get_output_embeddings(), trained),
        packed=packs(model),
    )


def _linear(module: nn.Module, trained: bool, config: Any = None) -> float:
    """FLOPs that a token costs in the linear layers of `module`."""
    return sum(
        share * weight.numel() * (2 + trained * (2 + 2 * weight.requires_grad))
        for weight, share in _weights(module, config)
    )


def _weights(module: nn.Module, config: Any) -> Iterator[tuple[nn.Parameter, float]]:
    """The matrices that tokens are multiplied by, and the share of each that one token meets."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    for part in module.modules():
        if not isinstance(part, nn.Embedding):
            for weight in part.parameters(recurse=False):
                if weight.ndim == 2:
                    yield weight, 1.0
                elif weight.ndim == 3 and weight.shape[0] == experts:  # transformers stacks the experts of a layer
                    yield weight, chosen / experts


def arithmetic_type(weight: torch.Tensor, context: AbstractContextManager[Any]) -> torch.dtype:
    """The type in which matrices of `weight`'s type are multiplied within `context`, such as autocast."""
    with torch.no_grad(), context:
        sample = torch.zeros(8, 8, dtype=weight.dtype, device=weight.device)
        return (sample @ sample).dtype


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """FLOPs per second of a product of two square matrices, the best of several, and their width.

    Args:
        device: Where.
        dtype: Type of the matrices.
    """
    width, largest = 256, WIDTHS.get(device.type, WIDTHS["cpu"])
    while True:
        product = _Product(width, device, dtype)
        product.seconds()  # warms up
        seconds = product.seconds()
        if width == largest or 8 * seconds > CALIBRATION_SECONDS / 4:  # twice the width takes 8 times as long
            break
        width *= 2
    end = time.perf_counter() + CALIBRATION_SECONDS
    while time.perf_counter() < end:
        seconds = min(seconds, product.seconds())
    return 2.0 * width**3 / seconds, width


class _Product:
    """A product of two random matrices of this width."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        own = torch.Generator(device).manual_seed(0)  # the run's random numbers stay as they are
        self.matrix = torch.randn(width, width, device=device, generator=own).to(dtype)
        self.out = torch.empty_like(self.matrix)

    def seconds(self) -> float:
        """How long it takes this time."""
        start = time.perf_counter()
        torch.mm(self.matrix, self.matrix, out=self.out)
        if self.matrix.device.type != "cpu":
            torch.accelerator.synchronize(self.matrix.device)
        return time.perf_counter() - start
