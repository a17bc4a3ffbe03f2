"""Draws tokens from logits with uniform numbers given beforehand.

Letters: R rows, V vocabulary.
"""

import torch
from torch import Tensor

from distillkit.types import Sampling

_HEADS = (64, 1024)
"""Likeliest tokens that are looked at first for top-p: a full sort of the vocabulary costs more than the model."""


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """One token per row.

    Args:
        logits: `[R, V]`.
        sampling: Temperature, top-p and top-k; the rest is not read.
        uniform: `[R]` uniform numbers in [0, 1): the row's token is the inverse of its cumulative distribution there.

    Returns:
        `[R]` token ids.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_p == 1 and sampling.top_k == 0:
        return _invert(logits.softmax(-1), uniform)
    kept, tokens = _kept(logits, sampling)
    return tokens.gather(-1, _invert(kept, uniform)[:, None]).squeeze(-1)


def processed(logits: Tensor, sampling: Sampling) -> Tensor:
    """What `draw` draws by: temperature, top-k and top-p applied.

    Args:
        logits: `[R, V]`.
        sampling: Temperature, top-p and top-k; the rest is not read.

    Returns:
        `[R, V]` log-probabilities, float32; -inf for a token that is never drawn. Greedy is 0 for the likeliest token.
    """
    empty = logits.new_full(logits.shape, -torch.inf, dtype=torch.float32)
    if sampling.temperature == 0:
        return empty.scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    logits = logits.float() / sampling.temperature
    if sampling.top_p == 1 and sampling.top_k == 0:
        return logits.log_softmax(-1)
    kept, tokens = _kept(logits, sampling)
    return empty.scatter_(-1, tokens, (kept / kept.sum(-1, keepdim=True)).log())


def draw_from(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """`[R]` token ids, one per row of `[R, V]` log-probabilities, at `[R]` uniform numbers as in `draw`."""
    return _invert(log_probs.exp(), uniform)


def _kept(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """`[R, K]` probabilities of the likeliest tokens, 0 for those that top-k and top-p exclude, and the tokens."""
    limit = sampling.top_k or logits.shape[-1]
    probs, tokens = _likeliest(logits, sampling.top_p, limit)  # [R, K], descending
    before = probs.cumsum(-1) - probs
    # A token is kept if the mass before it does not reach top_p: the first one always is. Top-k comes first: top-p is
    # a share of what it leaves.
    mass = probs.sum(-1, keepdim=True) if limit < logits.shape[-1] else 1.0
    return probs.masked_fill(before >= sampling.top_p * mass, 0.0), tokens


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability, at temperature 1 and over the whole vocabulary, of one token per row.

    Args:
        logits: `[R, V]` float32.
        tokens: `[R]` token ids.

    Returns:
        `[R]` nats, at most 0.
    """
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _likeliest(logits: Tensor, top_p: float, limit: int) -> tuple[Tensor, Tensor]:
    """Probabilities of the likeliest tokens, descending, and the tokens: `limit` of them, or enough for `top_p`."""
    vocab = logits.shape[-1]
    log_total = logits.logsumexp(-1, keepdim=True)
    for size in (limit,) if limit < vocab else (*_HEADS, vocab):
        values, tokens = logits.topk(min(size, vocab), dim=-1)
        probs = (values - log_total).exp()
        if bool((probs.sum(-1) >= top_p).all()):
            break
    return probs, tokens


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """`[R]` index at which the cumulative `[R, K]` weights pass `uniform` of their sum."""
    cumulative = weights.cumsum(-1)
    wanted = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
    last = (weights > 0).long().cumsum(-1).argmax(-1)  # rounding must not step past the last token with any weight
    return torch.minimum(index, last)
