"""Attention over packed rows: a token attends to its own row and to the prefix that rows share; no padding is computed.

It is registered with transformers under the name `distillkit` and passes every call that is not packed on to sdpa.
Letters: L tokens in the packed sequence, H query heads, G key heads, d head width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from distillkit.devices.streams import Ready, backend, send
from distillkit.types import Packed

NAME = "distillkit"

HONOURED = frozenset({"is_causal", "position_bias", "position_ids", "cache_position", "use_cache", "output_attentions"})
"""Options of transformers' attention calls, besides those that `attention` names, that sdpa honours or may ignore."""


def register() -> None:
    """Makes the attention known to transformers, for models whose attention implementation is set to `NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface  # here, for a fast start of the command line

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


@contextmanager
def as_sdpa() -> Iterator[None]:
    """Puts the attention in the place of transformers' own for sdpa, to see the calls that models make of that."""
    from transformers import AttentionInterface, AttentionMaskInterface

    with ExitStack() as stack:
        for interface, function in ((AttentionInterface, attention), (AttentionMaskInterface, mask)):
            stack.callback(interface.register, "sdpa", interface._global_mapping["sdpa"])
            interface.register("sdpa", function)
        yield


@dataclass
class Calls:
    """Calls of the attention during `recorded`.

    Args:
        masks: Each mask that transformers built, with the function that says which tokens attend to which.
        windows: Of each call, the mask that it got and its sliding window.
        ignored: Names of options that were set and that sdpa leaves out, such as attention sinks.
        capped: Whether a call had a soft cap.
    """

    masks: list[tuple[Tensor, Callable[..., Tensor]]] = field(default_factory=list)
    windows: list[tuple[Tensor | None, int | None]] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    capped: bool = False


_calls: ContextVar[Calls | None] = ContextVar("calls", default=None)


@contextmanager
def recorded() -> Iterator[Calls]:
    """Records the calls of the attention in this thread."""
    token = _calls.set(calls := Calls())
    try:
        yield calls
    finally:
        _calls.reset(token)


_exact: ContextVar[bool] = ContextVar("exact", default=False)


@contextmanager
def exactly() -> Iterator[None]:
    """Runs packed attention in this thread segment by segment also on a GPU, whose kernel rounds float32 products."""
    token = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(token)


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask of a call that is not packed, as transformers builds it for sdpa."""
    from transformers.masking_utils import sdpa_mask

    calls = _calls.get()
    if calls is None:
        unrecorded: Tensor | None = sdpa_mask(*args, **kwargs)
        return unrecorded
    built: Tensor = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    calls.masks.append((built, kwargs["mask_function"]))
    return built


def run(body: Callable[..., Any], packed: Packed) -> Tensor:
    """Last hidden states `[L, D]` of the packed tokens."""
    # Given a mask of four dimensions, transformers neither builds one nor waits for the device to detect packed rows.
    # `attention` ignores it: the segments say which tokens attend to which.
    unused_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packed.input_ids.device)
    output = body(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        attention_mask=unused_mask,
        use_cache=False,
        packed=packed,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed: Packed | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Packed attention, with the signature that transformers calls.

    Args:
        module: The attention layer.
        query: `[1, H, L, d]`.
        key: `[1, G, L, d]`.
        value: `[1, G, L, d]`.
        attention_mask: Mask of a call that is not packed, True or 0 where a query attends to a key, None for a causal
            one; ignored for packed rows.
        dropout: Probability with which an attention weight is dropped.
        scaling: Multiplies the scores; None is 1/√d.
        packed: The packed rows; None for a call that is not packed.
        sliding_window: Number of most recent tokens that a token attends to, itself included; None for all.
        softcap: Bounds the scores to ± this value (Gemma 2), for packed rows and others.
        kwargs: Further arguments, passed on if the call is not packed.

    Returns:
        `[1, L, H, d]`, and None in place of the attention weights.
    """
    calls = _calls.get()
    if calls is not None:
        calls.windows.append((attention_mask, sliding_window))
        calls.capped |= softcap is not None
        calls.ignored |= {name for name, option in kwargs.items() if name not in HONOURED and _is_set(option)}
    if packed is None:
        if softcap is not None:  # transformers' function for sdpa leaves it out
            return _capped(query, key, value, attention_mask, dropout, scaling, softcap), None
        if _shares_heads(query, key, attention_mask, kwargs):
            attended = scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
            )
            return attended.transpose(1, 2).contiguous(), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output
    if backend(query.device) is not None and softcap is None and dropout == 0.0 and not _exact.get():
        grouped = query.shape[1] != key.shape[1]
        # Under autocast rotary embeddings leave query and key in float32, and a kernel takes a single type.
        query, key = query.to(value.dtype), key.to(value.dtype)
        attended = _flex(query, key, value, block_mask(packed, sliding_window), scaling, grouped)
        return attended.transpose(1, 2).contiguous(), None  # as transformers' own functions return it
    # `split`, not a slice for each segment: the gradient of a slice is as large as the whole sequence.
    sizes = [stop - start for start, stop, *_ in packed.segments]
    spans = {(start, stop): index for index, (start, stop, *_) in enumerate(packed.segments)}
    queries, all_keys, all_values = (torch.split(heads, sizes, dim=2) for heads in (query, key, value))
    parts = []
    for segment, keys, values, (_, _, first, last) in zip(queries, all_keys, all_values, packed.segments, strict=True):
        if last > first:
            prefix = spans[first, last]
            keys = torch.cat([all_keys[prefix], keys], dim=2)
            values = torch.cat([all_values[prefix], values], dim=2)
        parts.append(_segment(segment, keys, values, dropout, scaling, sliding_window, softcap).transpose(1, 2))
    return torch.cat(parts, dim=1), None


def _shares_heads(query: Tensor, key: Tensor, attention_mask: Tensor | None, options: Mapping[str, object]) -> bool:
    """True if a masked call can leave keys and values as they are, where transformers repeats them for each query head.

    The repetition is a copy of the whole cache at each token. The processor's kernel gives the same numbers without
    it; a GPU has no such kernel for a mask, and gradients are left to transformers.
    """
    return (
        query.device.type == "cpu"
        and attention_mask is not None
        and query.shape[1] != key.shape[1]
        and not query.requires_grad
        and not any(_is_set(options.get(name)) for name in ("position_bias", "cache", "output_attentions"))
    )


_FLOAT32_QUERIES = 256
"""Queries up to which a processor's attention kernel with its gradient is faster in float32 than in half precision."""


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
    """Attention of a segment's n queries `[1, H, n, d]` to keys `[1, G, s + n, d]`: s of the shared prefix, then n."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if query.requires_grad and query.dtype.itemsize == 2 and num_queries <= _FLOAT32_QUERIES and query.is_cpu:
        wide = (heads.float() for heads in (query, key, value))
        attended: Tensor = _segment(*wide, dropout, scaling, window, softcap)
        return attended.to(query.dtype)
    window = window if window is not None and window < num_keys else None
    if num_queries == num_keys and window is None and softcap is None:
        return scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    distance = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None] - torch.arange(
        num_keys, device=query.device
    )
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
    return _softcapped(query, key, value, allowed, dropout, scaling, softcap)


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention `[R, T, H, d]` with capped scores for a call that is not packed."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    else:
        allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    return _softcapped(query, key, value, allowed, dropout, scaling, softcap).transpose(1, 2)


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention `[R, H, n, d]` with scores bounded to ± `softcap`, as in transformers' eager attention."""
    if query.shape[1] != key.shape[1]:
        key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1) for heads in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    # A finite value: a padding token attends to nothing, and its state must not be NaN.
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.dropout(weights, dropout, train=dropout > 0) @ value


def _is_set(option: object) -> bool:
    return option is not None and option is not False


@torch.compiler.disable  # type: ignore[untyped-decorator]
def block_mask(packed: Packed, window: int | None) -> BlockMask:
    """Block mask of flex attention: which tokens attend to which. Built once per batch and window, then cached."""
    mask: BlockMask
    if window not in packed.masks:
        device, length = packed.input_ids.device, packed.input_ids.shape[1]
        # Built on the host and copied without waiting: the device may still be busy with the previous step.
        lengths, first, last = torch.tensor([(stop - start, *prefix) for start, stop, *prefix in packed.segments]).T
        owner = send(torch.repeat_interleave(torch.arange(len(lengths)), lengths), device)  # [L]
        first, last = (send(ends, device) for ends in (first, last))  # of each segment's prefix
        position = packed.position_ids[0]

        def attends(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
            segment = owner[query]
            in_prefix = (key >= first[segment]) & (key < last[segment])
            allowed: Tensor = (key <= query) & ((owner[key] == segment) | in_prefix)
            if window is not None:
                allowed = allowed & (position[query] - position[key] < window)
            return allowed

        mask = create_block_mask(attends, None, None, length, length, device=str(device))
        packed.masks[window] = mask, Ready(device)
    mask, ready = packed.masks[window]
    ready.wait()  # the teacher may have built it on another stream
    return mask


VARIANTS = 64
"""Limit on compiled flex attention kernels: one per window, head width and dtype, with and without gradient, …"""


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None, grouped: bool) -> Tensor:
    """Compiled flex attention `[1, H, L, d]`. Past dynamo's recompile limit it would materialise `[H, L, L]` scores."""
    if not _compiled:
        _compiled.append(torch.compile(flex_attention, dynamic=True))
    # The kernel for short queries (decoding) has larger blocks than the mask's 128.
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
        attended: Tensor = _compiled[0](
            query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped, kernel_options=options
        )
    return attended


_compiled: list[Callable[..., Any]] = []
