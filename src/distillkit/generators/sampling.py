"""Token sampling from logits, driven by uniform random numbers that the caller provides.

Letters: R rows, K candidate tokens, V vocabulary.
"""

import torch
from torch import Tensor

from distillkit.types import Sampling

_TRIAL_SIZES = (64, 1024)
"""Numbers of most likely tokens that top-p tries first: sorting the full vocabulary costs more than the model."""


def sample_tokens(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Samples one token per row.

    Args:
        logits: `[R, V]`.
        sampling: Temperature, top-p and top-k; the other settings are not read.
        uniform: `[R]` uniform numbers in [0, 1). Each row's token is the inverse of its cumulative distribution at its
            number.

    Returns:
        `[R]` token ids.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_p == 1 and sampling.top_k == 0:
        return _invert(logits.softmax(-1), uniform)
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


def _filtered(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """`[R, K]` probabilities of the most likely tokens, 0 where top-k or top-p excludes one, and their token ids."""
    limit = sampling.top_k or logits.shape[-1]
    probs, tokens = _most_likely(logits, sampling.top_p, limit)  # [R, K], descending
    mass_before = probs.cumsum(-1) - probs
    # A token stays if the mass before it does not reach top_p, so the first one always does. Top-k comes first: top-p
    # is a share of the mass that top-k leaves.
    mass = probs.sum(-1, keepdim=True) if limit < logits.shape[-1] else 1.0
    return probs.masked_fill(mass_before >= sampling.top_p * mass, 0.0), tokens


def _most_likely(logits: Tensor, top_p: float, limit: int) -> tuple[Tensor, Tensor]:
    """Probabilities of the most likely tokens, descending, and the ids: `limit` of them, or enough for `top_p`."""
    vocab = logits.shape[-1]
    log_total = logits.logsumexp(-1, keepdim=True)
    for size in (limit,) if limit < vocab else (*_TRIAL_SIZES, vocab):
        values, tokens = logits.topk(min(size, vocab), dim=-1)
        probs = (values - log_total).exp()
        if bool((probs.sum(-1) >= top_p).all()):
            break
    return probs, tokens


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """`[R]` index at which the cumulative `[R, K]` weights pass the share `uniform` of their sum."""
    cumulative = weights.cumsum(-1)
    threshold = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    last = (weights > 0).long().cumsum(-1).argmax(-1)  # rounding must not step past the last token with any weight
    return torch.minimum(index, last)
