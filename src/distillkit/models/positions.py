"""Positions that a model has: tables that end, rotary frequencies that change with the length of a row.

Letters: T tokens of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distillkit.errors import ModelError
from distillkit.models.structure import text_config


@dataclass(frozen=True)
class Positions:
    """Limits on the length of a row, in tokens.

    Args:
        table: Positions that the model has a learned or computed entry for; None if it has no such table.
        configured: Positions that the configuration names, which rotary models may pass; None if it names none.
        switch: Length past which all rotary frequencies of a row are others (longrope); None if they never change.
        dynamic: Length past which each length has other rotary frequencies (dynamic NTK); None if they never change.
    """

    table: int | None = None
    configured: int | None = None
    switch: int | None = None
    dynamic: int | None = None

    def check(self, length: int, name: str, what: str) -> str | None:
        """Compares the longest row with the limits.

        Args:
            length: Tokens of the longest row.
            name: Name of the model in the message.
            what: The row in the message, such as `the longest prompt and its 128 new tokens`.

        Returns:
            A warning, or None.

        Raises:
            ModelError: If the model has no position for the row's last token, or if that position depends on the other
                rows of a batch.
        """
        if self.table is not None and length > self.table:
            raise ModelError(
                f"{name} has {self.table} positions, and {what} takes {length}: shorten the rows (data.max_length, "
                "max_new_tokens), or choose a model with more positions."
            )
        if self.dynamic is not None and length > self.dynamic:
            raise ModelError(
                f"{name} scales its rotary positions by the longest row of a batch (dynamic NTK) past {self.dynamic} "
                f"tokens, and {what} takes {length}: shorten the rows (data.max_length, max_new_tokens) to "
                f"{self.dynamic} tokens."
            )
        if self.configured is not None and length > self.configured:
            return (
                f"{name} was made for {self.configured} positions (max_position_embeddings), and {what} takes {length}:"
                " expect poor predictions past them."
            )
        return None


class Tables(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the tables that a forward pass of rows of T tokens reads at consecutive positions.

    Args:
        length: T. The token ids must not be consecutive numbers.
    """

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = length
        self.limits: list[int] = []
        """Rows of T tokens and more up to this length find their entries, one limit per table."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation, and looks at the indices that it reads."""
        for size, indices in _reads(func, args):
            first = self._first(indices)
            if first is not None and size > self.length + first:  # a table of T entries belongs to the row itself
                self.limits.append(size - first)
        return func(*args, **(kwargs or {}))

    def _first(self, indices: Tensor) -> int | None:
        """The smallest index, if each row of `indices` counts up T positions from it."""
        if indices.dtype not in (torch.int32, torch.int64) or indices.numel() % self.length or not indices.numel():
            return None
        rows = indices.reshape(-1, self.length)
        first = int(rows[0, 0])
        counted = torch.arange(first, first + self.length, device=rows.device, dtype=rows.dtype)
        return first if first >= 0 and bool((rows == counted).all()) else None


def _reads(func: Any, args: tuple[Any, ...]) -> Iterator[tuple[int, Tensor]]:
    """Size of the dimension that is read, and the indices, of an operation that reads a table."""
    aten = torch.ops.aten
    if func is aten.embedding.default:
        yield args[0].shape[0], args[1]
    elif func is aten.index_select.default:
        yield args[0].shape[args[1]], args[2]
    elif func is aten.gather.default:
        indices = args[2].movedim(args[1], -1)
        yield args[0].shape[args[1]], indices
    elif func is aten.index.Tensor:
        for dim, indices in enumerate(args[1]):
            if indices is not None:
                yield args[0].shape[dim], indices


def rotary_limits(model: nn.Module) -> tuple[int | None, int | None]:
    """Lengths past which the rotary frequencies change: all at once (longrope), and with each length (dynamic NTK)."""
    switches, dynamic = [], []
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        for layer_type, rope_type in (types if isinstance(types, dict) else {None: types}).items():
            if rope_type == "longrope":
                switches.append(_original_length(module, layer_type))
            elif isinstance(rope_type, str) and "dynamic" in rope_type:
                dynamic.append(int(module.original_max_seq_len))  # type: ignore[arg-type]
    return min(switches, default=None), min(dynamic, default=None)


def _original_length(module: nn.Module, layer_type: str | None) -> int:
    parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
    return int((parameters if layer_type is None else parameters[layer_type])["original_max_position_embeddings"])


def configured_length(model: nn.Module) -> int | None:
    """Positions that the configuration names; None if it names none."""
    length = getattr(text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
