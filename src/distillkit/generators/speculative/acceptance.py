"""Acceptance of draft tokens and replacement of the first rejected one: pure functions, and rules built from them.

Letters: R rows, n draft tokens of a row, V vocabulary. p is the teacher and q the student.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


def passes_ratio(log_p: Tensor, log_q: Tensor, uniform: Tensor) -> Tensor:
    """Rejection sampling's test, u < p / q.

    Args:
        log_p: `[R, n]` teacher's log-probability of each draft token.
        log_q: `[R, n]` student's, under which the token was sampled; finite.
        uniform: `[R, n]` uniform numbers u in [0, 1).

    Returns:
        `[R, n]` bool. Over u, a token passes with probability min(1, p / q).
    """
    return uniform.log() < log_p - log_q


def residual(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The distribution that replaces a rejected token, max(p − q, 0) / Σ max(p − q, 0).

    Args:
        log_p: `[R, V]` teacher's log-probabilities.
        log_q: `[R, V]` student's; -inf everywhere if nothing was drafted, which gives p.

    Returns:
        `[R, V]` log-probabilities. p itself if p − q is nowhere positive: the two are then equal up to rounding, and
        the rejection is due to that rounding.
    """
    excess = (log_p.exp() - log_q.exp()).clamp_min(0.0)
    mass = excess.sum(-1, keepdim=True)
    return torch.where(mass > 0, (excess / mass).log(), log_p)


def in_top(logits: Tensor, tokens: Tensor, k: int) -> Tensor:
    """Tests for each token that fewer than k tokens are more likely.

    Args:
        logits: `[R, n, V]` teacher's logits.
        tokens: `[R, n]` token ids.
        k: K.

    Returns:
        `[R, n]` bool.
    """
    return (logits > logits.gather(-1, tokens[..., None])).sum(-1) < k


def is_typical(log_probs: Tensor, tokens: Tensor, epsilon: float, delta: float) -> Tensor:
    """Tests for each token that p(token) > min(ε, δ·exp(−H(p))), with the entropy H in nats.

    Args:
        log_probs: `[R, n, V]` teacher's log-probabilities.
        tokens: `[R, n]` token ids.
        epsilon: ε.
        delta: δ.

    Returns:
        `[R, n]` bool.
    """
    probs = log_probs.exp()
    entropy: Tensor = torch.special.entr(probs).sum(-1)  # 0·log 0 is 0 in it
    threshold = (delta * (-entropy).exp()).clamp_max(epsilon)
    return probs.gather(-1, tokens[..., None]).squeeze(-1) > threshold


@dataclass(frozen=True)
class Check:
    """The input of a rule: draft tokens and both models' distributions at their positions.

    Args:
        tokens: `[R, n]` draft tokens.
        logits: `[R, n, V]` teacher's raw logits.
        log_p: `[R, n, V]` log-probabilities that the teacher would sample from.
        log_q: `[R, n, V]` log-probabilities that the student sampled from.
        uniform: `[R, n]` uniform numbers in [0, 1).
    """

    tokens: Tensor
    logits: Tensor
    log_p: Tensor
    log_q: Tensor
    uniform: Tensor


class Rule(ABC):
    """A rule by which the teacher accepts draft tokens; its `repr` names the rule and its settings."""

    lossless: ClassVar[bool] = False
    """True if responses are distributed as if the teacher alone had generated them. The teacher then adds a token to a
    fully accepted draft; with the other rules, the number of the teacher's tokens would depend on the block length."""

    @abstractmethod
    def accepts(self, check: Check) -> Tensor:
        """`[R, n]` bool: True at draft tokens that are accepted, provided that all earlier ones are."""

    def replacement(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """`[R, V]` log-probabilities of the token after the last accepted one; by default those of the teacher."""
        return log_p


@dataclass(frozen=True)
class Exact(Rule):
    """Rejection sampling (Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).

    A draft token is accepted with probability Σ min(p, q), and the result is distributed as p: a token x is accepted
    with q(x)·min(1, p(x)/q(x)) = min(p, q)(x), and the residual adds max(p − q, 0)(x).
    """

    lossless: ClassVar[bool] = True

    def accepts(self, check: Check) -> Tensor:
        """Accepts the tokens that pass u < p / q."""
        log_p, log_q = (
            log_probs.gather(-1, check.tokens[..., None]).squeeze(-1) for log_probs in (check.log_p, check.log_q)
        )
        return passes_ratio(log_p, log_q, check.uniform)

    def replacement(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Returns the residual distribution."""
        return residual(log_p, log_q)


@dataclass(frozen=True)
class TopK(Rule):
    """Speculative knowledge distillation (Xu et al. 2024, arXiv 2410.11325): accepts the teacher's top K.

    Temperature and top-p do not change these tokens.

    Args:
        k: K.
    """

    k: int

    def accepts(self, check: Check) -> Tensor:
        """Accepts a token if fewer than K tokens are more likely."""
        return in_top(check.logits, check.tokens, self.k)


@dataclass(frozen=True)
class Typical(Rule):
    """Typical acceptance (Cai et al. 2024, Medusa, arXiv 2401.10774): accepts what the teacher might sample.

    p is the distribution that the teacher would sample from, with temperature, top-k and top-p applied.

    Args:
        epsilon: ε.
        delta: δ.
    """

    epsilon: float
    delta: float

    def accepts(self, check: Check) -> Tensor:
        """Accepts tokens with p(token) > min(ε, δ·exp(−H(p)))."""
        return is_typical(check.log_p, check.tokens, self.epsilon, self.delta)


@dataclass
class Acceptance:
    """Counts of draft tokens, accepted tokens and checks.

    Args:
        judged: Draft tokens that the teacher judged: of each block, the accepted ones and the first rejected one.
            Tokens after a rejected token, or after the response's end, are discarded without being judged.
        accepted: Judged tokens that were accepted.
        tokens: Generated tokens.
        checks: Blocks that were checked; each is one row of one forward pass of the teacher.
    """

    judged: int = 0
    accepted: int = 0
    tokens: int = 0
    checks: int = 0

    @property
    def rate(self) -> float:
        """Share of the judged tokens that were accepted; with `exact` it estimates Σ min(p, q). NaN if none."""
        return self.accepted / self.judged if self.judged else math.nan

    @property
    def tokens_per_check(self) -> float:
        """Generated tokens per forward pass of the teacher. NaN if there was none."""
        return self.tokens / self.checks if self.checks else math.nan

    def add(self, tokens: int, accepted: int, drafted: int) -> None:
        """Adds one block of one row.

        Args:
            tokens: Tokens of the block that became part of the response.
            accepted: Draft tokens that were accepted, including any after the response's end.
            drafted: Draft tokens of the block.
        """
        self.accepted += min(tokens, accepted)
        self.judged += min(tokens, accepted) + (accepted < min(tokens, drafted))
        self.tokens += tokens
        self.checks += 1
