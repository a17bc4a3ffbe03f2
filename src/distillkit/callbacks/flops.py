"""FLOPs of a step, counted from shapes, and the measured matrix-multiplication rate of a device.

Counted as by Kaplan et al. 2020 (arXiv 2001.08361, section 2.1) and for MFU by Chowdhery et al. 2022 (PaLM, arXiv
2204.02311, appendix B): matrix products only, each counted once, so that gradient checkpointing adds none. Where PaLM
counts attention of every token to the full sequence, we count the tokens that it attends to.

Letters: N response positions, D hidden width, V vocabulary, H query heads, d head width.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from distillkit.models.scoring import packs
from distillkit.models.structure import base_model, text_body
from distillkit.types import Batch

WIDTHS = {"cuda": 8192, "cpu": 1024}
"""Width of the square matrices used to measure the rate: large enough for the device's best rate. Other devices use the
width of `cpu`."""

CALIBRATION_SECONDS = 0.25
"""Seconds of the measurement; matrices are smaller for a type for which the device has no fast kernels."""


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a model in a step, forward and, if it is trained, backward.

    Args:
        token: FLOPs of the body's linear layers, per token.
        pair: FLOPs of attention in all layers, per token and token that it attends to, itself included.
        position: FLOPs of the output embedding, per response position (N).
        packed: Whether the model is given packed rows if the batch has them.
    """

    token: float = 0.0
    pair: float = 0.0
    position: float = 0.0
    packed: bool = False

    def of(self, batch: Batch) -> float:
        """FLOPs of a batch, including padding that passes through the body."""
        return self.token * self.tokens(batch) + self.pair * self._pairs(batch) + self.position * batch.num_tokens

    def tokens(self, batch: Batch) -> int:
        """Tokens of a batch that pass through the body."""
        packed = batch.packed if self.packed else None
        return batch.input_ids.numel() if packed is None else packed.input_ids.numel()

    def _pairs(self, batch: Batch) -> float:
        """Pairs of a token and one that it attends to, counted on the host; sliding windows are ignored."""
        packed = batch.packed if self.packed else None
        if packed is None:
            rows, length = batch.input_ids.shape
            return rows * length * (length + 1) / 2
        lengths = [(stop - start, last - first) for start, stop, first, last in packed.segments]
        return sum(length * shared + length * (length + 1) / 2 for length, shared in lengths)


def model_flops(model: nn.Module | None, trained: bool, packed: bool | None = None) -> ModelFlops:
    """Returns the FLOPs of a model.

    A weight costs 2 FLOPs forward, a product and a sum, and as many backward for the gradient of its input; 2 more for
    its own gradient if it is trainable, which a weight under LoRA is not. Attention costs 4·H·d per pair and layer,
    half of it for the scores and half for the values, and twice as much backward.

    Args:
        model: A transformers causal language model, with peft or without; or an output embedding; or None if no model
            runs in this process.
        trained: Whether gradients are computed.
        packed: Whether its rows are packed; None tries the model, which needs its weights.
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
        token=_linear(text_body(model), trained, config),
        pair=4.0 * width * config.num_hidden_layers * (3 if trained else 1),
        position=_linear(base.get_output_embeddings(), trained),
        packed=packs(model) if packed is None else packed,
    )


def _linear(module: nn.Module, trained: bool, config: object = None) -> float:
    """FLOPs per token in the linear layers of `module`."""
    return sum(
        share * weight.numel() * (2 + trained * (2 + 2 * weight.requires_grad))
        for weight, share in _weights(module, config)
    )


def _weights(module: nn.Module, config: object) -> Iterator[tuple[nn.Parameter, float]]:
    """The weight matrices of a module, each with the share of it that a single token uses."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    active = getattr(config, "num_experts_per_tok", None) or 1
    for part in module.modules():
        if not isinstance(part, nn.Embedding):
            for weight in part.parameters(recurse=False):
                if weight.ndim == 2:
                    yield weight, 1.0
                elif weight.ndim == 3 and weight.shape[0] == experts:  # transformers stacks the experts of a layer
                    yield weight, active / experts


def arithmetic_type(weight: torch.Tensor, context: AbstractContextManager[object]) -> torch.dtype:
    """The type in which matrices of `weight`'s type are multiplied within `context`, such as autocast."""
    with torch.no_grad(), context:
        sample = torch.zeros(8, 8, dtype=weight.dtype, device=weight.device)
        return (sample @ sample).dtype


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """FLOPs per second of a product of two square matrices, the best of several, and their width.

    Args:
        device: The device to measure.
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
    """A product of two random square matrices."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)  # does not advance the run's random state
        self.matrix = torch.randn(width, width, device=device, generator=generator).to(dtype)
        self.out = torch.empty_like(self.matrix)

    def seconds(self) -> float:
        """Runs the product once and returns the seconds it took."""
        start = time.perf_counter()
        torch.mm(self.matrix, self.matrix, out=self.out)
        if self.matrix.device.type != "cpu":
            torch.accelerator.synchronize(self.matrix.device)
        return time.perf_counter() - start
