"""Decoding of a batch of rows, token by token, with a cache if it gives what a full forward pass gives, else without.

Letters: R rows that are still generating, T tokens so far, D hidden width.
"""

import logging
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distillkit.models.capabilities import ROUNDING, capabilities, gap, probe_tokens
from distillkit.models.exact import in_float32
from distillkit.models.heads import summary
from distillkit.models.modes import evaluating
from distillkit.models.scoring import batchable, row_states
from distillkit.models.structure import base_model, last_states, takes, text_body, text_config

_log = logging.getLogger(__name__)

CacheUse = Literal["padded", "equal", "none"]
"""Rows that a cache can serve: of any lengths, padded on the left; of equal lengths only; none."""


class Rows(Protocol):
    """Rows that grow by a token at a time."""

    def read(self) -> Tensor:
        """The last hidden state `[R, D]` of each row."""

    def select(self, order: Tensor) -> None:
        """Keeps the rows with the indices `order` `[R]`."""

    def append(self, tokens: Tensor) -> None:
        """Adds a token to each row, `[R]`."""


def start_rows(model: nn.Module, ids: Sequence[Sequence[int]]) -> Rows:
    """Rows that begin with the given token ids, decoded with a cache if the model's cache is right.

    Args:
        model: A transformers causal language model, in evaluation mode, with adapters or without.
        ids: Token ids of each row; one group of `decodable`.
    """
    return UncachedRows(model, ids) if cache_use(model) == "none" else CachedRows(model, ids)


def decodable(model: nn.Module, lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the rows that may be decoded as one batch.

    Args:
        model: A transformers causal language model.
        lengths: Tokens of each row so far.
    """
    switch = capabilities(model).positions.switch
    groups = batchable(lengths, False, switch)
    if cache_use(model) != "equal":
        return groups
    return [
        [row for row in group if lengths[row] == length]
        for group in groups
        for length in sorted({lengths[row] for row in group})
    ]


def cache_use(model: nn.Module) -> CacheUse:
    """Rows that the model's cache can serve: tried at the first call, and remembered with the model.

    Three rows of different lengths are read and continued by three tokens, one leaves after the first, and each state
    is compared with that of a forward pass over the row alone.
    """
    base = base_model(model)
    if not hasattr(base, _ATTRIBUTE):
        use, reason = _tried(model)
        setattr(base, _ATTRIBUTE, use)
        if use != "padded":
            rows = "without a cache, which is slower" if use == "none" else "for prompts of equal lengths together"
            _log.info("%s generates %s: %s", type(base).__name__, rows, reason)
    remembered: CacheUse = getattr(base, _ATTRIBUTE)
    return remembered


_ATTRIBUTE = "_distillkit_cache_use"


class CachedRows:
    """Rows padded on the left, whose keys, values and states are in a cache.

    Args:
        model: A transformers causal language model.
        ids: Token ids of each row.
    """

    def __init__(self, model: nn.Module, ids: Sequence[Sequence[int]]) -> None:
        from distillkit.generators.kv_cache import preallocated_cache  # imports transformers, which takes a second

        base = base_model(model)
        self.body, device = text_body(model), base.device
        self.cache_name = "past_key_values" if takes(self.body, "past_key_values") else "cache_params"
        self.cache = preallocated_cache(base.config)
        width = max(len(row) for row in ids)
        self.step_ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in ids], device=device)  # [R, T]
        self.mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)  # [R, T]
        self.positions = (self.mask.cumsum(-1) - 1).clamp_min(0)

    def read(self) -> Tensor:
        """The last hidden state `[R, D]` of each row; the tokens since the last call go into the cache."""
        inputs = {"input_ids": self.step_ids, "position_ids": self.positions}
        if self.cache_name == "past_key_values" or self.step_ids.shape == self.mask.shape:
            inputs["attention_mask"] = self.mask  # models of state alone (Mamba) mask the tokens that they read
        # `[R, D]`: a strided `[R, 1, D]` makes the head's product copy its weight R times.
        return last_states(self.body, **inputs, **{self.cache_name: self.cache}, use_cache=True)[:, -1]

    def select(self, order: Tensor) -> None:
        """Keeps the rows with the indices `order` `[R]`."""
        from distillkit.generators.kv_cache import select_rows

        select_rows(self.cache, order)
        self.mask, self.positions = self.mask[order], self.positions[order]

    def append(self, tokens: Tensor) -> None:
        """Adds a token to each row, `[R]`."""
        self.step_ids, self.positions = tokens[:, None], self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=-1)  # [R, T + 1]


class UncachedRows:
    """Rows that are read from the first token to the last at each step.

    Args:
        model: A transformers causal language model.
        ids: Token ids of each row.
    """

    def __init__(self, model: nn.Module, ids: Sequence[Sequence[int]]) -> None:
        self.model, device = model, base_model(model).device
        width = max(len(row) for row in ids)
        self.ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in ids], device=device)  # [R, T]
        self.lengths = torch.tensor([len(row) for row in ids], device=device)

    def read(self) -> Tensor:
        """The last hidden state `[R, D]` of each row."""
        mask = torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]
        return row_states(self.model, self.ids, mask)[torch.arange(len(self.ids)), self.lengths - 1]

    def select(self, order: Tensor) -> None:
        """Keeps the rows with the indices `order` `[R]`."""
        self.ids, self.lengths = self.ids[order], self.lengths[order]

    def append(self, tokens: Tensor) -> None:
        """Adds a token to each row, `[R]`."""
        self.ids = pad(self.ids, (0, 1)).scatter(1, self.lengths[:, None], tokens[:, None])
        self.lengths = self.lengths + 1


_LENGTHS, _STEPS = (5, 2, 4), 3
"""Tokens of the rows that the cache is tried on, and tokens that they are continued by."""


@torch.no_grad()
def _tried(model: nn.Module) -> tuple[CacheUse, str]:
    """Rows that the model's cache can serve, and why not others."""
    body = text_body(model)
    capabilities(model)  # first: it sets the attention that the rows are run with
    if not takes(body, "past_key_values") and not takes(body, "cache_params"):
        return "none", "its layers take no cache"
    with evaluating(model), in_float32(model):
        reason = (
            "the positions of its attention count padding" if _counts_columns(model) else _mismatch(model, _LENGTHS)
        )
        if reason is None:
            return "padded", ""
        equal_reason = _mismatch(model, (max(_LENGTHS),) * len(_LENGTHS))
    return ("equal", reason) if equal_reason is None else ("none", equal_reason)


def _counts_columns(model: nn.Module) -> bool:
    """True if attention is scaled by the index in the padded row instead of the position, far beyond the test rows."""
    return bool(getattr(text_config(model), "attn_temperature_tuning", False))  # Llama 4


def _mismatch(model: nn.Module, lengths: Sequence[int]) -> str | None:
    """The reason against a cache for rows of these lengths, or None."""
    device = base_model(model).device
    rows = [probe_tokens(model, length + _STEPS, shift).tolist() for shift, length in enumerate(lengths)]
    alive, largest = list(range(len(rows))), 0.0
    try:
        cached = CachedRows(model, [row[:length] for row, length in zip(rows, lengths, strict=True)])
        for step in range(_STEPS + 1):
            for state, row in zip(cached.read(), alive, strict=True):
                ids = torch.tensor([rows[row][: lengths[row] + step]], device=device)
                expected = row_states(model, ids, torch.ones_like(ids, dtype=torch.bool))[0, -1]
                largest = max(largest, gap(state[None], expected[None]))
            if step == _STEPS:
                break
            if step == 1:
                alive = [2, 0]  # the second row leaves, and the remaining ones change places
                cached.select(torch.tensor(alive, device=device))
            cached.append(torch.tensor([rows[row][lengths[row] + step] for row in alive], device=device))
    except Exception as error:  # the code of any architecture: it may raise anything
        return f"a test of its cache fails with {summary(error)}"
    return f"its cache changes its hidden states by {largest:.3g} of their norm" if largest > ROUNDING else None
