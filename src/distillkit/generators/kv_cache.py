"""Key-value cache that grows in place.

Letters: R rows, G key heads, T tokens so far, d head width.
"""

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

HEADROOM = 64
"""Free token slots that a layer gets beyond its current length whenever it moves to a larger buffer."""


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values `[R, G, T, d]` of one layer, as views of buffers with room for more tokens.

    The transformers layer copies its whole content for each new token, and again when rows leave. This layer writes a
    new token into its slot, and moves only the rows whose index changes.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values `[R, G, t, d]` of t more tokens; returns those of all tokens, `[R, G, T + t, d]`."""
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
        for target, buffer in zip((keys, values), self._buffers, strict=True):
            target[moved, :, :length] = buffer[indices[moved], :, :length]
        self._buffers, self.keys, self.values = (keys, values), keys[:, :, :length], values[:, :, :length]

    def _larger(self, current: Tensor, new_states: Tensor, length: int) -> Tensor:
        rows, heads, num_new, width = new_states.shape
        buffer = new_states.new_empty(rows, heads, length + num_new + HEADROOM, width)
        if length:
            buffer[:, :, :length] = current
        return buffer


def preallocated_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model with this configuration; layers other than plain attention stay as transformers'."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: Cache, order: Tensor) -> None:
    """Keeps the rows of a cache with the indices `order` `[R]`, in the states of recurrent layers too."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):  # these lack `batch_select_indices`
            layer.reorder_cache(order)
        else:
            layer.batch_select_indices(order)
