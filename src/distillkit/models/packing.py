"""Attention over a line of rows: each row sees itself and what it shares, and nothing is computed for padding.

It stands behind a name of its own in transformers' registry and hands every call that is not packed to the model's own
attention. Letters: L tokens in the line, H query heads, G key heads, d head width.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from distillkit.types import Packed, Segment

NAME = "distillkit"
_packed: ContextVar[bool] = ContextVar("packed", default=False)


def install(config: Any, body: Callable[..., Any], device: torch.device) -> str | None:
    """Puts packed attention in front of a model's own, if that changes nothing.

    Args:
        config: The configuration of a transformers text model.
        body: The model without its head, in evaluation mode.
        device: Where it is.

    Returns:
        None, or why the model can't be given packed rows; it then has its own attention back.
    """
    from transformers import AttentionInterface, AttentionMaskInterface  # here, for a fast start of the command line

    own = config._attn_implementation
    if own not in ("sdpa", NAME):
        return f"its attention is {own}, and only sdpa can be told who sees whom"
    rows, slots, line = _probe(device)
    padded = body(input_ids=rows, attention_mask=(slots >= 0).long(), use_cache=False).last_hidden_state[slots >= 0]
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _mask)
    config._attn_implementation = NAME
    try:
        packed = run(body, line)[slots[slots >= 0]]
        gap = float((packed - padded).float().norm() / padded.float().norm())
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        config._attn_implementation = own
        return f"packed ones fail with {type(error).__name__}: {str(error).splitlines()[0]}"
    if gap < 0.05:  # rounding of many layers in bfloat16 stays below, another row's tokens do not
        return None
    config._attn_implementation = own
    return f"packed ones change its hidden states by {gap:.3g} of their norm"


def run(body: Callable[..., Any], line: Packed) -> Tensor:
    """Last hidden states `[L, D]` of the tokens of a line."""
    token = _packed.set(True)  # no mask is made: the line's segments say who sees whom
    try:
        found = body(input_ids=line.input_ids, position_ids=line.position_ids, use_cache=False, line=line)
    finally:
        _packed.reset(token)
    hidden: Tensor = found.last_hidden_state[0]
    return hidden


def _probe(device: torch.device) -> tuple[Tensor, Tensor, Packed]:
    """A pair that shares three tokens and a single row: padded, each token's place in the line, and the line."""
    rows = torch.tensor([[0, 1, 2, 3, 1, 2], [0, 1, 2, 0, 3, 0], [3, 2, 1, 0, 0, 0]], device=device)
    slots = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7, -1], [8, 9, 10, -1, -1, -1]], device=device)
    line = Packed(
        input_ids=torch.tensor([[0, 1, 2, 3, 1, 2, 0, 3, 3, 2, 1]], device=device),
        position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2]], device=device),
        positions=torch.zeros(0, dtype=torch.long, device=device),
        segments=(Segment(0, 3, 0, 0), Segment(3, 6, 0, 3), Segment(6, 8, 0, 3), Segment(8, 11, 0, 0)),
    )
    return rows, slots, line


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    line: Packed | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: The attention layer.
        query: `[1, H, L, d]`.
        key: `[1, G, L, d]`.
        value: `[1, G, L, d]`.
        attention_mask: Not used for a line.
        dropout: Probability with which an attention weight is dropped.
        scaling: Multiplies the scores; None is 1/√d.
        line: The packed rows; None for a call that is not packed.
        sliding_window: How many tokens back a token sees, itself included; None for all.
        softcap: Bounds the scores to ± this value (Gemma 2).
        kwargs: Handed on where the call is not packed.

    Returns:
        `[1, L, H, d]`, and None for the weights.
    """
    if line is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    if query.is_cuda and softcap is None and dropout == 0.0 and kwargs.get("s_aux") is None:
        mask = block_mask(line, sliding_window)
        out = _compiled()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
        return out.transpose(1, 2), None
    parts = []
    for start, stop, first, last in line.segments:
        own = slice(start, stop)
        keys, values = key[:, :, own], value[:, :, own]
        if last > first:
            keys = torch.cat([key[:, :, first:last], keys], dim=2)
            values = torch.cat([value[:, :, first:last], values], dim=2)
        parts.append(_segment(query[:, :, own], keys, values, dropout, scaling, sliding_window, softcap))
    return torch.cat(parts, dim=2).transpose(1, 2), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of a segment's queries `[1, H, n, d]` to `[1, G, s + n, d]`, s shared tokens before its own."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    window = window if window is not None and window < num_keys else None
    if num_queries == num_keys and window is None and softcap is None:
        return scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    back = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None] - torch.arange(
        num_keys, device=query.device
    )
    seen = back >= 0
    if window is not None:
        seen = seen & (back < window)
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        key, value = (own.repeat_interleave(query.shape[1] // own.shape[1], dim=1) for own in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.dropout(weights, dropout, train=dropout > 0) @ value


def block_mask(line: Packed, window: int | None) -> BlockMask:
    """Who sees whom, for flex attention; made once for a line and window."""
    if window not in line.masks:
        device, length = line.input_ids.device, line.input_ids.shape[1]
        owner = torch.repeat_interleave(
            torch.arange(len(line.segments)), torch.tensor([stop - start for start, stop, *_ in line.segments])
        ).to(device)
        shared = torch.tensor([(first, last) for *_, first, last in line.segments], device=device)
        place = line.position_ids[0]

        def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = owner[query]
            in_shared = (key >= shared[own, 0]) & (key < shared[own, 1])
            allowed = (key <= query) & ((owner[key] == own) | in_shared)
            return allowed if window is None else allowed & (place[query] - place[key] < window)

        line.masks[window] = create_block_mask(sees, None, None, length, length, device=str(device))
    mask: BlockMask = line.masks[window]
    return mask


_flex: list[Any] = []


def _compiled() -> Any:
    if not _flex:
        _flex.append(torch.compile(flex_attention, dynamic=True))
    return _flex[0]


def _mask(*args: Any, **kwargs: Any) -> Any:
    from transformers.masking_utils import sdpa_mask

    return None if _packed.get() else sdpa_mask(*args, **kwargs)
