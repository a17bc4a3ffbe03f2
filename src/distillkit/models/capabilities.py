"""Capabilities of a model, found by trying: how its rows may be batched, and how long they may be.

Each row of a few tokens is run alone first: that is the reference. Then the rows are run together, padded and packed,
and must come out the same. Letters: B rows, T tokens, L tokens of the packed sequence, D hidden width.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distillkit.devices.streams import backend
from distillkit.errors import ModelError
from distillkit.models import packing
from distillkit.models.exact import in_float32
from distillkit.models.heads import attempted, check_head, summary
from distillkit.models.modes import evaluating
from distillkit.models.positions import Positions, Tables, configured_length, rotary_limits
from distillkit.models.structure import base_model, last_states, text_body, text_config
from distillkit.types import Packed, Segment

_log = logging.getLogger(__name__)

Layout = Literal["packed", "padded", "single"]

ROUNDING = 1e-4
"""Largest difference, as a share of a token's norm, that float32 rounding makes; measured: below 1e-5 in 80 layers."""

LEAK = 1e-5
"""Largest such difference where only other rows change: measured 0 to 3e-8, and 1.3e-4 and more where rows mix."""

KERNEL = 0.05
"""Limit on the difference that a GPU's attention kernel makes in the model's type, in all: bfloat16 in many layers."""

_SEGMENTS = (Segment(0, 3, 0, 0), Segment(3, 6, 0, 3), Segment(6, 8, 0, 3), Segment(8, 11, 0, 0))
"""Three rows of 6, 5 and 3 tokens, packed: the first two share their first three tokens."""
_SLOTS = ((0, 1, 2, 3, 4, 5), (0, 1, 2, 6, 7), (8, 9, 10))
"""Index of each row's tokens in the packed sequence."""


@dataclass(frozen=True)
class Capabilities:
    """The ways in which a model's rows may be run, all of which give what each row gives alone.

    Args:
        layout: `packed`: end to end without padding; `padded`: padded on the right; `single`: one at a time.
        reason: Why the layout is not a better one; empty for `packed`.
        positions: Limits on the length of a row.
    """

    layout: Layout
    reason: str
    positions: Positions


def capabilities(model: nn.Module, name: str | None = None) -> Capabilities:
    """The model's capabilities: tried at the first call, and remembered with the model.

    A model with a soft cap on attention scores, or with packed rows, gets the attention of `packing`; one whose
    attention has options that sdpa leaves out gets transformers' eager attention.

    Args:
        model: A transformers causal language model, with adapters or without.
        name: Name of the model in messages; None is its class.

    Raises:
        ModelError: If `heads.check_head` refuses the model, if rows can't be run, or if tokens attend to later ones.
    """
    base = base_model(model)
    if not hasattr(base, _ATTRIBUTE):
        check_head(model, name or type(base).__name__)
        with evaluating(model), torch.no_grad():
            result = _Trial(base, name or type(base).__name__).result()
        setattr(base, _ATTRIBUTE, result)
        if result.reason:
            rows = "padded rows" if result.layout == "padded" else "single rows"
            _log.info("%s runs on %s: %s", type(base).__name__, rows, result.reason)
    remembered: Capabilities = getattr(base, _ATTRIBUTE)
    return remembered


_ATTRIBUTE = "_distillkit_capabilities"


class _Trial:
    """One model's test passes."""

    def __init__(self, base: Any, name: str) -> None:
        self.base, self.name = base, name
        self.body, self.config = text_body(base), text_config(base)
        self.device = next(base.parameters()).device
        self.tokens, self.other_tokens = (probe_tokens(base, 11, shift).to(self.device) for shift in (0, 1))
        pad_id = getattr(self.config, "pad_token_id", None)
        if pad_id is not None and 0 <= pad_id < _input_tokens(base):  # -1 is how some configs say that there is none
            self.tokens[4] = pad_id  # rows may contain it, as where it is also the end of a turn
        self.alone = torch.empty(0)
        """`[14, D]` states of each row's tokens, run alone."""

    def result(self) -> Capabilities:
        """Runs the passes."""
        with in_float32(self.base):
            reason, calls, tables = self._choose_attention()
            self._run_alone()
            layout: Layout = "packed"
            padding_reason = self._padded()
            if padding_reason is None:
                with packing.exactly():
                    reason = reason or self._recurrent() or unusual_masks(calls) or self._packed()
        if padding_reason is not None:
            layout, reason = "single", padding_reason
        else:
            reason = reason or self._by_kernel()
            layout = "packed" if reason is None else "padded"
        if self.config._attn_implementation == packing.NAME and layout != "packed" and not calls.capped:
            self.config._attn_implementation = "sdpa"
        switch, dynamic = rotary_limits(self.base)
        positions = Positions(min(tables.limits, default=None), configured_length(self.base), switch, dynamic)
        return Capabilities(layout, reason or "", positions)

    def _choose_attention(self) -> tuple[str | None, packing.Calls, Tables]:
        """Sets the attention implementation: one that agrees with transformers' eager attention.

        Returns:
            The reason against packed rows or None, the calls of the attention, and the tables that a row reads.
        """
        tables, calls, original = Tables(6), packing.Calls(), self.config._attn_implementation
        if original not in ("sdpa", packing.NAME):  # the latter: of a model with the same configuration object
            try:
                self._first_row(original, tables)
            except ModelError as error:
                if original == "eager":
                    raise
                raise ModelError(
                    f"{self.name}: its test passes fail with attn_implementation {original}. Leave it out: sdpa is the "
                    "default, and packed rows run by flex attention on a GPU."
                ) from error
            return f"its attention implementation is {original}; only sdpa supports packed rows", calls, tables
        packing.register()
        with packing.as_sdpa(), packing.recorded() as calls:
            states = self._first_row("sdpa")
        try:
            distance = gap(states, self._first_row("eager"))
        except ModelError:  # there is no eager attention to compare with
            distance = 0.0
        reason: str | None = None
        if calls.ignored or distance > ROUNDING:
            ignored = ", ".join(sorted(calls.ignored)) or f"something: states differ by {distance:.3g} of their norm"
            reason, implementation = f"sdpa leaves out of its attention {ignored}; it is eager instead", "eager"
        elif not calls.windows:
            reason, implementation = "its layers don't use transformers' attention, which packed rows need", "sdpa"
        elif not self._takes_renamed_attention(states):
            implementation = "eager" if calls.capped else "sdpa"
            reason = "its code depends on the name of its attention implementation"
        else:
            implementation = packing.NAME
        self._first_row(implementation, tables)
        return reason, calls, tables

    def _takes_renamed_attention(self, states: Tensor) -> bool:
        """True if the first row has these states also by this package's attention under its name."""
        try:
            return gap(self._first_row(packing.NAME), states) <= ROUNDING
        except ModelError:
            return False

    def _first_row(self, implementation: str, tables: Tables | None = None) -> Tensor:
        """States of the first row by an attention implementation, which stays set."""
        self.config._attn_implementation = implementation
        with attempted(self.name, "a test pass over 6 tokens"):
            return self._states(_SLOTS[:1], context=nullcontext() if tables is None else tables)

    def _run_alone(self) -> None:
        """Runs each row alone, and checks that no token attends to a later one."""
        with attempted(self.name, "a test pass over 6 tokens"):
            self.alone = torch.cat([self._states([slots]) for slots in _SLOTS])
            changed = self._states(_SLOTS[:1], self._replaced(range(4, 6)))
        if not bool(self.alone.isfinite().all()):
            raise ModelError(f"{self.name}: a test pass over 6 tokens gives states that are not finite.")
        if gap(changed[:4], self.alone[:4]) > LEAK:
            raise ModelError(
                f"{self.name}: tokens of {type(self.base).__name__} attend to later ones, so as configured it is no "
                "causal language model (is_decoder in its config?). distillkit does not support it."
            )

    def _recurrent(self) -> str | None:
        """The reason against packed rows that the model's cache tells: a state that runs over the sequence."""
        from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

        try:
            layers = DynamicCache(config=self.base.config).layers
        except Exception:  # a model without a cache of transformers'
            return None
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
            return "some of its layers carry a state from each token to the next"
        return None

    def _padded(self) -> str | None:
        """The reason against padded rows, or None."""
        try:
            moved = gap(self._states(_SLOTS), self.alone)
        except Exception as error:  # the code of any architecture: it may raise anything
            return f"a test with padded rows fails with {summary(error)}"
        return f"padding changes its hidden states by {moved:.3g} of their norm" if moved > ROUNDING else None

    def _packed(self) -> str | None:
        """The reason against packed rows, or None."""
        try:
            states = self._packed_states(self.tokens)
            for changed in (range(3, 6), range(6, 11), range(8)):
                # Tokens 0 to 2 are a prefix that the first two rows attend to.
                rest = [index for index in range(11) if index not in changed and (index >= 8 or changed[0] > 0)]
                moved = gap(self._packed_states(self._replaced(changed))[rest], states[rest])
                if moved > LEAK:
                    return f"the tokens of a packed row change the states of another by {moved:.3g} of their norm"
        except Exception as error:  # the code of any architecture: it may raise anything
            return f"a test with packed rows fails with {summary(error)}"
        moved = gap(states[[index for slots in _SLOTS for index in slots]], self.alone)
        return f"packed rows change its hidden states by {moved:.3g} of their norm" if moved > ROUNDING else None

    def _by_kernel(self) -> str | None:
        """The reason against packed rows as the device runs them, in the model's type, or None."""
        if backend(self.device) is None:  # they run as they were tried
            return None
        try:
            states = self._packed_states(self.tokens)[[index for slots in _SLOTS for index in slots]]
            expected = self._states(_SLOTS)
        except Exception as error:  # the code of any architecture: it may raise anything
            return f"a test with packed rows on {self.device} fails with {summary(error)}"
        moved = float((states - expected).float().norm() / expected.float().norm())
        return (
            None if moved < KERNEL else f"packed rows on {self.device} change its states by {moved:.3g} of their norm"
        )

    def _replaced(self, changed: Sequence[int]) -> Tensor:
        """The tokens, with other ones at the indices `changed`."""
        tokens = self.tokens.clone()
        tokens[list(changed)] = self.other_tokens[list(changed)]
        return tokens

    def _states(
        self,
        rows: Sequence[Sequence[int]],
        tokens: Tensor | None = None,
        context: AbstractContextManager[object] = nullcontext(),  # noqa: B008 - it holds nothing
    ) -> Tensor:
        """States of the tokens of some rows, row after row, run as one batch that is padded on the right."""
        tokens = self.tokens if tokens is None else tokens
        width = max(len(row) for row in rows)
        ids = torch.stack([pad(tokens[list(row)], (0, width - len(row))) for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(width, device=self.device) < lengths[:, None]
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        with context:
            states = last_states(self.body, **inputs)
        return states[mask]

    def _packed_states(self, tokens: Tensor) -> Tensor:
        positions = torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2]], device=self.device)
        return packing.run(self.body, Packed(tokens[None], positions, positions[0, :0], _SEGMENTS))


def gap(states: Tensor, expected: Tensor) -> float:
    """Largest distance of a token's state from the expected one, as a share of its norm; NaN counts as infinite."""
    distance = (states - expected).float().norm(dim=-1) / expected.float().norm(dim=-1).clamp_min(1e-30)
    return float(distance.nan_to_num(nan=torch.inf).max())


def probe_tokens(model: nn.Module, count: int, shift: int = 0) -> Tensor:
    """Token ids `[count]` on the CPU that are not special, and no two of which follow one another.

    Args:
        model: A transformers causal language model.
        count: Number of tokens.
        shift: Another shift gives other tokens at every index.
    """
    base = base_model(model)
    config, special = text_config(base), set[object]()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        special |= set(value) if isinstance(value, list | tuple) else {value}  # Llama 3 has several end tokens
    ids = [token for token in range(min(_input_tokens(base), 97)) if token not in special]
    return torch.tensor([ids[(5 * index + 3 + 2 * shift) % len(ids)] for index in range(count)])


def _input_tokens(base: Any) -> int:
    """Number of tokens that have an input embedding."""
    return int(base.get_input_embeddings().weight.shape[0])


def unusual_masks(calls: packing.Calls) -> str | None:
    """The reason against packed rows that the model's attention masks tell, or None.

    Packed attention ignores masks and attends to all earlier tokens of a row within the sliding window. A model whose
    masks say anything else, such as attention within chunks, differs as soon as its rows are long enough.
    """
    causal: dict[tuple[int, int | None], bool] = {}  # by mask and window: the layers share them
    for mask, window in calls.windows:
        index = next((index for index, (built, _) in enumerate(calls.masks) if _same(built, mask)), None)
        if index is None:
            return "it changes the attention masks that transformers builds"
        if (index, window) not in causal:
            causal[index, window] = _is_causal(calls.masks[index][1], window)
        if not causal[index, window]:
            return "its attention masks are not causal ones with a sliding window alone"
    return None


def _same(built: Tensor, mask: Tensor | None) -> bool:
    return mask is not None and mask.shape == built.shape and mask.data_ptr() == built.data_ptr()


def _is_causal(function: Callable[..., Tensor], window: int | None) -> bool:
    """True if a mask function allows a query all earlier keys within the window, at any distance."""
    powers = [1 << exponent for exponent in range(18)]
    centers = [*powers, *([window] if window is not None else []), *(3 * power for power in powers)]
    ends = torch.tensor(sorted({0, *(center + step for center in centers for step in (-1, 0, 1))}))
    queries, keys = ends[:, None], ends[None, :]
    expected = keys <= queries
    if window is not None:
        expected = expected & (queries - keys < window)
    try:
        zero = torch.zeros((), dtype=torch.long)
        return bool((function(zero, zero, queries, keys).expand_as(expected) == expected).all())
    except Exception:  # of any architecture: it reads tables of the row's length, for example
        return False
