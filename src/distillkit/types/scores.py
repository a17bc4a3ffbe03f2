"""Scores: a model's next-token distributions at the response positions of a batch.

Letters: N response positions, n those of a slice, V vocabulary, K most likely tokens, D hidden width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from distillkit.errors import ConfigError, check_range


class Head(Protocol):
    """Maps hidden states `[n, D]` to logits `[n, V]`."""

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """Returns the logits `[n, V]` of hidden states `[n, D]`."""
        ...

    def parameters(self) -> Iterable[Tensor]:
        """Returns the parameters that the logits depend on, besides the hidden states."""
        ...


@dataclass(frozen=True)
class LogitsHead:
    """Identity head without parameters, for scores that already are logits."""

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """Returns `hidden` unchanged."""
        return hidden

    def parameters(self) -> tuple[Tensor, ...]:
        """Returns no parameters."""
        return ()


@dataclass(frozen=True)
class Slicing:
    """Memory and compilation of a loss, which is evaluated a slice of positions at a time.

    Args:
        memory: MiB that a loss may use at a time for log-probabilities, at least 1. None is 304 on the CPU; on a GPU it
            is 1/32 of the GPU's memory, at most 2048.
        compile: Whether the loss of a slice is compiled by `torch.compile`, which takes a minute at the start.
        max_positions: Maximum number of positions in a slice, at least 1; None is as many as `memory` allows.

    Raises:
        ConfigError: If `memory` or `max_positions` is below 1.
    """

    memory: int | None = None
    compile: bool = False
    max_positions: int | None = None

    def __post_init__(self) -> None:
        check_range("Slicing.memory", self.memory, 1, note=" MiB")
        check_range("Slicing.max_positions", self.max_positions, 1)


@dataclass(frozen=True)
class Scores:
    """Next-token scores of one model at the N response positions of a batch.

    Log-probabilities are computed a slice of positions at a time: `[N, V]` exists only if a caller requests all of it.

    If a teacher's cache stores only its K most likely tokens, `top_k_ids` is set: columns 0 to K−1 of its
    log-probabilities are those tokens, and column K is the rest of the vocabulary. The student's log-probabilities are
    gathered into the same K+1 columns, so that both distributions sum to 1 and a divergence compares the same events.

    Args:
        hidden: `[N, D]` last hidden states, final norm applied.
        head: Maps hidden states `[n, D]` to logits `[n, V]`, limited to the vocabulary that both models share.
        vocab: V, the width of the logits; K+1 with `top_k_ids`.
        top_k_ids: `[N, K]` token ids of the columns, or None if column v is token v.
        target_logp: `[N]` log-probability of the token that follows each position. Set together with `top_k_ids`, as
            the K tokens need not include that token.
        slicing: Slice size, memory and compilation of a loss over these positions.
    """

    hidden: Tensor
    head: Head
    vocab: int
    top_k_ids: Tensor | None = None
    target_logp: Tensor | None = None
    slicing: Slicing = field(default_factory=Slicing)

    @classmethod
    def from_logits(cls, logits: Tensor) -> "Scores":
        """Returns the scores for `[N, V]` logits."""
        return cls(logits, LogitsHead(), logits.shape[-1])

    @classmethod
    def from_top_k(cls, log_probs: Tensor, top_k_ids: Tensor, target_logp: Tensor) -> "Scores":
        """Returns the scores of a teacher for which only the K most likely tokens are available.

        Args:
            log_probs: `[N, K+1]` log-probabilities of the tokens in `top_k_ids`, then of the rest of the vocabulary.
            top_k_ids: `[N, K]` token ids.
            target_logp: `[N]` log-probability of the token that follows each position.
        """
        return cls(log_probs, LogitsHead(), log_probs.shape[-1], top_k_ids, target_logp)

    def log_probs(self, part: slice = slice(None), temperature: float = 1.0) -> Tensor:
        """Returns the log-probabilities `[n, V]` of the positions in `part`, in float32 (float64 for float64 logits).

        Raises:
            ConfigError: If only the top K tokens are available and the temperature is not 1.
        """
        if self.top_k_ids is not None and temperature != 1.0:
            raise ConfigError(
                f"A temperature of {temperature} needs the teacher's whole distribution, but its cache stores only the "
                f"{self.top_k_ids.shape[-1]} most likely tokens. Use temperature 1, or CachedTeacher.keep: hidden."
            )
        return log_softmax(self.head(self.hidden[part]), temperature)

    def select(self, index: Tensor) -> "Scores":
        """Returns the scores of the positions `index` `[n]`."""
        optional = (self.top_k_ids, self.target_logp)
        top_k_ids, target_logp = (None if tensor is None else tensor[index] for tensor in optional)
        return replace(self, hidden=self.hidden[index], top_k_ids=top_k_ids, target_logp=target_logp)


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the log-softmax of `[n, V]` logits over V at `temperature`, in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
