"""Which draft tokens stay, and what is drawn instead of the first that doesn't: pure functions, and rules made of them.

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
        log_q: `[R, n]` student's, by which the token was drawn; finite.
        uniform: `[R, n]` uniform numbers u in [0, 1).

    Returns:
        `[R, n]` bool. Over u, a token passes with probability min(1, p / q).
    """
    return uniform.log() < log_p - log_q


def residual(log_p: Tensor, log_q: Tensor) -> Tensor:
    """What a rejected token is drawn from anew, max(p − q, 0) / Σ max(p − q, 0).

    Args:
        log_p: `[R, V]` teacher's log-probabilities.
        log_q: `[R, V]` student's; -inf everywhere where nothing was drafted, which gives p.

    Returns:
        `[R, V]` log-probabilities. p itself where p − q is nowhere positive: the two are equal up to rounding there,
        and a rejection is that rounding's.
    """
    excess = (log_p.exp() - log_q.exp()).clamp_min(0.0)
    mass = excess.sum(-1, keepdim=True)
    return torch.where(mass > 0, (excess / mass).log(), log_p)


def in_top(logits: Tensor, tokens: Tensor, k: int) -> Tensor:
    """Whether fewer than k tokens are likelier.

    Args:
        logits: `[R, n, V]` teacher's logits.
        tokens: `[R, n]` token ids.
        k: K.

    Returns:
        `[R, n]` bool.
    """
    return (logits > logits.gather(-1, tokens[..., None])).sum(-1) < k


def is_typical(log_probs: Tensor, tokens: Tensor, epsilon: float, delta: float) -> Tensor:
    """Whether p(token) > min(ε, δ·exp(−H(p))), H the entropy in nats.

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
    """What a rule looks at.

    Args:
        tokens: `[R, n]` draft tokens.
        logits: `[R, n, V]` teacher's logits as they are.
        log_p: `[R, n, V]` log-probabilities that the teacher would draw by.
        log_q: `[R, n, V]` those that the student drew by.
        uniform: `[R, n]` uniform numbers in [0, 1).
    """

    tokens: Tensor
    logits: Tensor
    log_p: Tensor
    log_q: Tensor
    uniform: Tensor


class Rule(ABC):
    """How the teacher checks a draft; its `repr` names it with its settings."""

    lossless: ClassVar[bool] = False
    """Whether a response is distributed as the teacher's own. The teacher then adds a token to a draft that stays
    whole; by the other rules, how many tokens are the teacher's would depend on the length of the blocks."""

    @abstractmethod
    def keeps(self, check: Check) -> Tensor:
        """`[R, n]` bool: which draft tokens stay if all before them do."""

    def instead(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """`[R, V]` log-probabilities that the token after the last that stays is drawn by: the teacher's own."""
        return log_p


@dataclass(frozen=True)
class Exact(Rule):
    """Rejection sampling (Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).

    With probability Σ min(p, q) a draft token stays, and the outcome is distributed as p: a token x stays with
    q(x)·min(1, p(x)/q(x)) = min(p, q)(x), and the residual adds max(p − q, 0)(x).
    """

    lossless: ClassVar[bool] = True

    def keeps(self, check: Check) -> Tensor:
        """Those that pass u < p / q."""
        log_p, log_q = (of.gather(-1, check.tokens[..., None]).squeeze(-1) for of in (check.log_p, check.log_q))
        return passes_ratio(log_p, log_q, check.uniform)

    def instead(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The residual."""
        return residual(log_p, log_q)


@dataclass(frozen=True)
class TopK(Rule):
    """Speculative knowledge distillation (Xu et al. 2024, arXiv 2410.11325): a token stays in the teacher's top K.

    Temperature and top-p don't change which tokens these are.

    Args:
        k: K.
    """

    k: int

    def keeps(self, check: Check) -> Tensor:
        """Those that fewer than K tokens are likelier than."""
        return in_top(check.logits, check.tokens, self.k)


@dataclass(frozen=True)
class Typical(Rule):
    """Typical acceptance (Cai et al. 2024, Medusa, arXiv 2401.10774): a token stays if the teacher might have drawn it.

    p is what the teacher would draw by, temperature, top-k and top-p applied.

    Args:
        epsilon: ε.
        delta: δ.
    """

    epsilon: float
    delta: float

    def keeps(self, check: Check) -> Tensor:
        """Those with p(token) > min(ε, δ·exp(−H(p)))."""
        return is_typical(check.log_p, check.tokens, self.epsilon, self.delta)


@dataclass
class Acceptance:
    """How drafts fared.

    Args:
        judged: Draft tokens that the teacher judged: those that it kept and the first that it did not, of each block.
            What follows a rejected token, or the response's end, is thrown away unjudged.
        accepted: Those of them that it kept.
        tokens: Tokens written.
        checks: Blocks checked; in each, one row of one forward pass of the teacher.
    """

    judged: int = 0
    accepted: int = 0
    tokens: int = 0
    checks: int = 0

    @property
    def rate(self) -> float:
        """Share of the judged tokens that stayed; with the rule `exact` an estimate of Σ min(p, q). NaN without any."""
        return self.accepted / self.judged if self.judged else math.nan

    @property
    def tokens_per_check(self) -> float:
        """Tokens written for each forward pass of the teacher. NaN without any."""
        return self.tokens / self.checks if self.checks else math.nan

    def add(self, tokens: int, stayed: int, drafted: int) -> None:
        """Counts one block of one row.

        Args:
            tokens: Tokens that the response got of it.
            stayed: Draft tokens that stayed, whether or not the response had ended before them.
            drafted: Draft tokens of the block.
        """
        self.accepted += min(tokens, stayed)
        self.judged += min(tokens, stayed) + (stayed < min(tokens, drafted))
        self.tokens += tokens
        self.checks += 1
