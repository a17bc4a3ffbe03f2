"""Token sampling from logits, driven by uniform random numbers that the caller provides.

Letters: R rows, K candidate tokens, B blocks, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distillkit.types import Sampling

_TRIAL_SIZES = (64, 1024)
"""Numbers of most likely tokens that top-p tries first: sorting the full vocabulary costs more than the model."""
_BLOCK = 256
"""Tokens whose weights are summed before the cumulative sum, which a processor takes one by one."""


def sample_tokens(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Samples one token per row.

    Args:
        logits: `[R, V]`.
        sampling: Temperature, top-p and top-k; the other settings are not read.
        uniform: `[R]` uniform numbers in [0, 1), of `exact_dtype`. A row's token depends only on its number and its
            logits.

    Returns:
        `[R]` token ids.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return _invert(logits.softmax(-1), uniform)
    if sampling.top_k == 0:
        return _sample_nucleus(logits.softmax(-1), sampling.top_p, uniform)
    probs, tokens = _filtered(logits, sampling)
    return tokens.gather(-1, _invert(probs, uniform)[:, None]).squeeze(-1)


def sampling_log_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Computes the distribution that `sample_tokens` samples from: temperature, top-k and top-p applied.

    Args:
        logits: `[R, V]`.
        sampling: Temperature, top-p and top-k; the other settings are not read.

    Returns:
        `[R, V]` log-probabilities, float32; -inf for a token that is never sampled. With greedy decoding the most
        likely token has 0.
    """
    log_probs = logits.new_full(logits.shape, -torch.inf, dtype=torch.float32)
    if sampling.temperature == 0:
        return log_probs.scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    logits = logits.float() / sampling.temperature
    if sampling.top_p == 1 and sampling.top_k == 0:
        return logits.log_softmax(-1)
    probs, tokens = _filtered(logits, sampling)
    return log_probs.scatter_(-1, tokens, (probs / probs.sum(-1, keepdim=True)).log())


def sample_from(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """`[R]` token ids, one per row of `[R, V]` log-probabilities, at `[R]` uniform numbers as in `sample_tokens`."""
    return _invert(log_probs.exp(), uniform)


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of one token per row, at temperature 1 and over the full vocabulary.

    Args:
        logits: `[R, V]` float32.
        tokens: `[R]` token ids.

    Returns:
        `[R]` nats, at most 0.
    """
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _sample_nucleus(probs: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """Samples with top-p by rejection, without a sort: `[R]` token ids.

    A token is drawn from the whole distribution and accepted if the mass of the likelier ones is below top-p, which is
    the rule of top-p. If it is rejected, every token that top-p keeps is likelier, so the next is drawn from those.

    Args:
        probs: `[R, V]` probabilities.
        top_p: Mass that the likeliest tokens must reach.
        uniform: `[R]` uniform numbers in [0, 1).
    """
    tokens, limits = torch.empty_like(uniform, dtype=torch.long), top_p * probs.sum(-1)
    rows = torch.arange(len(probs), device=probs.device)
    while len(rows):
        drawn = _invert(probs, uniform)
        tokens[rows] = drawn  # a rejected one is replaced in the next round
        likelier, mass = _likelier(probs, probs.gather(-1, drawn[:, None]))
        rejected = (mass >= limits).nonzero().squeeze(-1)
        if len(rejected):
            probs = torch.stack([likelier[row] for row in rejected.tolist()])
        rows, limits, uniform = rows[rejected], limits[rejected], _next_uniform(uniform[rejected])
    return tokens


def _likelier(probs: Tensor, pivots: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """Rows of `[R, V]` probabilities with 0 for all that do not exceed the `[R, 1]` pivots, and their `[R]` sums."""
    if probs.device.type == "cpu":
        # Row by row: `threshold` takes one number, and is ten times as fast as `masked_fill`.
        numbers = pivots.squeeze(-1).tolist()
        rows = [torch.threshold(row, number, 0.0) for row, number in zip(probs, numbers, strict=True)]
        return rows, torch.stack([row.sum() for row in rows])
    above = probs.masked_fill(probs <= pivots, 0.0)
    return list(above), above.sum(-1)


def _next_uniform(uniform: Tensor) -> Tensor:
    """`[R]` uniform numbers computed from others by the mixing function of SplitMix64 (Steele et al. 2014)."""
    bits = uniform.to("cpu" if uniform.device.type == "mps" else uniform.device).double().view(torch.int64)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ _shifted(bits, shift)) * factor
    mixed = _shifted(bits ^ _shifted(bits, 31), 11).double() * 2.0**-53
    return mixed.to(uniform.device, exact_dtype(uniform.device))


def _shifted(bits: Tensor, count: int) -> Tensor:
    """64-bit integers shifted to the right, with zeros from the left."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _filtered(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """`[R, K]` probabilities of the most likely tokens, 0 where top-k or top-p excludes one, and their token ids."""
    limit = sampling.top_k or logits.shape[-1]
    probs, tokens = _most_likely(logits, sampling.top_p, limit)  # [R, K], descending
    # Top-k comes first: top-p is a share of the mass that top-k leaves.
    mass = probs.sum(-1, keepdim=True) if limit < logits.shape[-1] else 1.0
    return probs.masked_fill(probs < _least_kept(probs, sampling.top_p * mass), 0.0), tokens


def _least_kept(probs: Tensor, mass: Tensor | float) -> Tensor:
    """`[R, 1]` probability of the least likely token that is kept, of `[R, K]` in descending order.

    A token is kept if the mass of the likelier ones is below `mass`, so the first always is. Equally likely ones share
    their fate.
    """
    is_left_out = (probs.cumsum(-1) - probs) >= mass
    return probs.masked_fill(is_left_out, torch.inf).amin(-1, keepdim=True)


def _most_likely(logits: Tensor, top_p: float, limit: int) -> tuple[Tensor, Tensor]:
    """Weights of the most likely tokens, descending, and the ids: `limit` of them, or enough for `top_p`.

    The weights are probabilities if all tokens take part; with a limit they are shares of the most likely one.
    """
    vocab = logits.shape[-1]
    log_total = logits.logsumexp(-1, keepdim=True) if limit >= vocab else logits.amax(-1, keepdim=True)
    trials = _TRIAL_SIZES if logits.device.type == "cpu" else ()  # a GPU sorts fast, and would wait for each trial
    for size in (limit,) if limit < vocab else (*trials, vocab):
        values, tokens = logits.topk(min(size, vocab), dim=-1)
        probs = (values - log_total).exp()
        if size >= limit or bool((probs[:, -1:] < _least_kept(probs, top_p)).all()):
            break
    return probs, tokens


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """`[R]` index at which the cumulative `[R, K]` weights pass the share `uniform` of their sum."""
    count, whole = weights.shape[-1], weights.shape[-1] // _BLOCK
    blocks, remainder = weights[:, : whole * _BLOCK], weights[:, whole * _BLOCK :]
    sums = torch.cat(
        [blocks.view(len(weights), whole, _BLOCK).sum(-1), remainder.sum(-1, keepdim=True)], dim=-1
    )  # [R, B]
    sums = sums.to(exact_dtype(sums.device))
    block, rest = _passed(sums, uniform.to(sums) * sums.sum(-1))
    index = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(-1, index.clamp_max(count - 1)).to(sums).masked_fill(index >= count, 0.0)
    return block * _BLOCK + _passed(inside, rest)[0]


def _passed(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`[R]` index at which the cumulative `[R, K]` weights pass the `[R]` target, and the target less those before."""
    cumulative = weights.cumsum(-1)
    index = torch.searchsorted(cumulative, target[:, None], right=True)
    last = (weights > 0).long().cumsum(-1).argmax(-1, keepdim=True)  # rounding must not step past the last weight
    index = torch.minimum(index, last)
    return index.squeeze(-1), (target - (cumulative - weights).gather(-1, index).squeeze(-1)).clamp_min(0.0)
