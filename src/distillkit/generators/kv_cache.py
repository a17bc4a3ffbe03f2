"""A cache of keys and values that grows in place.

Letters: R rows, G key heads, T tokens so far, d head width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64
"""Tokens that a layer has room for beyond what it holds, whenever it moves to a larger buffer."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values `[R, G, T, d]` of one layer, views of buffers with room for more tokens.

    transformers' own layer copies all it holds for each new token, and again when rows leave. Here a token is written
    into its place, and only rows that change places are moved.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds keys and values `[R, G, t, d]` of t more tokens; gives those of all, `[R, G, T + t, d]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < stop:
            self._buffers = (self._larger(self.keys, key_states, start), self._larger(self.values, value_states, start))
        keys, values = self._buffers
        keys[:, :, start:stop], values[:, :, start:stop] = key_states, value_states
        self.keys, self.values = keys[:, :, :stop], values[:, :, :stop]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices`."""
        if self._buffers is None:
            return
        length, count = self.get_seq_length(), len(indices)
        moved = (indices != torch.arange(count, device=indices.device)).nonzero().squeeze(-1)
        keys, values = (buffer[:count] for buffer in self._buffers)
        for kept, buffer in zip((keys, values), self._buffers, strict=True):
            kept[moved, :, :length] = buffer[indices[moved], :, :length]
        self._buffers, self.keys, self.values = (keys, values), keys[:, :, :length], values[:, :, :length]

    def _larger(self, held: Tensor, added: Tensor, length: int) -> Tensor:
        rows, heads, more, width = added.shape
        buffer = added.new_empty(rows, heads, length + more + ROOM, width)
        if length:
            buffer[:, :, :length] = held
        return buffer


def roomy_cache(config: Any) -> Any:
    """An empty cache for a model of this configuration; layers that are not plain attention are transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
