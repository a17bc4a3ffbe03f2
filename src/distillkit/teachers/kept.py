"""What is kept of a teacher's scores, and how scores are made of it again.

Letters: N response positions, D hidden width, K tokens that are kept, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.errors import ModelError
from distillkit.heads import OutputHead
from distillkit.score_cache import Column
from distillkit.types import Scores

SLICE_LOGITS = 2**24
"""Logits that are made at once: 64 MiB in float32, as in a loss."""

LOWEST = float(torch.finfo(torch.float16).min)
"""A log-probability below it would become -inf, and 0 · -inf is no number."""


class Kept(ABC):
    """One way to keep scores."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the folder of what is kept in this way."""

    @property
    @abstractmethod
    def columns(self) -> dict[str, Column]:
        """What each position has."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the columns depend on besides the teacher."""
        return {"keep": self.name}

    @abstractmethod
    def pack(self, scores: Scores, targets: Tensor) -> dict[str, Tensor]:
        """The columns of N positions.

        Args:
            scores: What the teacher says.
            targets: `[N]` token id that follows each position.
        """

    @abstractmethod
    def unpack(self, found: Mapping[str, Tensor], vocab: int) -> Scores:
        """Scores of the first `vocab` tokens, of the columns of N positions."""


@dataclass(frozen=True)
class KeptHidden(Kept):
    """The hidden states `[N, D]` as they are, from which the head makes all of the distribution.

    Args:
        head: The teacher's head, on the device that scores are wanted on.
    """

    head: OutputHead

    @property
    def name(self) -> str:
        """`hidden`."""
        return "hidden"

    @property
    def columns(self) -> dict[str, Column]:
        """The hidden states, in the teacher's own type."""
        weight = self.head.module.weight
        assert isinstance(weight, Tensor)
        return {"hidden": Column(weight.dtype, (weight.shape[1],))}

    def pack(self, scores: Scores, targets: Tensor) -> dict[str, Tensor]:
        """The hidden states.

        Raises:
            ModelError: If the scores are not those of the head that was kept.
        """
        head = scores.head
        if not isinstance(head, OutputHead) or (head.scale, head.softcap) != (self.head.scale, self.head.softcap):
            raise ModelError(
                "CachedTeacher.keep: hidden needs a teacher whose scores are its model's hidden states and output "
                "embedding: use keep: top_k."
            )
        return {"hidden": scores.hidden}

    def unpack(self, found: Mapping[str, Tensor], vocab: int) -> Scores:
        """The hidden states with the head."""
        return Scores(found["hidden"], OutputHead(self.head.module, vocab, self.head.scale, self.head.softcap), vocab)


@dataclass(frozen=True)
class KeptTopK(Kept):
    """The K most likely of V tokens, all others together, and the token that follows.

    Args:
        k: K, below V.
        vocab: V, the tokens that the softmax is over.
    """

    k: int
    vocab: int

    @property
    def name(self) -> str:
        """`top-K-of-V`."""
        return f"top-{self.k}-of-{self.vocab}"

    @property
    def columns(self) -> dict[str, Column]:
        """Log-probabilities of the K tokens in half precision, their ids, and two numbers in float32."""
        ids = torch.uint16 if self.vocab <= 2**16 else torch.int32
        return {
            "logp": Column(torch.float16, (self.k,)),
            "ids": Column(ids, (self.k,)),
            "tail": Column(torch.float32),
            "own": Column(torch.float32),
        }

    def pack(self, scores: Scores, targets: Tensor) -> dict[str, Tensor]:
        """The K most likely tokens, a slice of positions at a time."""
        step = max(1, SLICE_LOGITS // scores.vocab)
        starts = range(0, max(len(targets), 1), step)
        parts = [self._pack(scores.log_probs(slice(i, i + step)), targets[i : i + step]) for i in starts]
        return {name: torch.cat([part[name] for part in parts]).to(own.dtype) for name, own in self.columns.items()}

    def _pack(self, logp: Tensor, targets: Tensor) -> dict[str, Tensor]:
        own = logp.gather(-1, targets[:, None]).squeeze(-1).float()
        top, ids = logp.topk(self.k, dim=-1)  # [n, K]
        tail = logp.scatter(-1, ids, -torch.inf).logsumexp(-1).float()
        return {"logp": top.clamp_min(LOWEST), "ids": ids, "tail": tail, "own": own}

    def unpack(self, found: Mapping[str, Tensor], vocab: int) -> Scores:
        """Log-probabilities `[N, K+1]`, the last column for all other tokens together."""
        log_probs = torch.cat([found["logp"].float(), found["tail"][:, None]], dim=-1)
        return Scores.from_top_k(log_probs, found["ids"].long(), found["own"])


def plain_head(head: OutputHead) -> OutputHead:
    """The head with a linear layer of its own, which shares the weights but keeps nothing else of the model in memory.

    Raises:
        ModelError: If it is not a plain linear layer.
    """
    if type(head.module) is not nn.Linear:
        raise ModelError(
            f"CachedTeacher.keep: hidden can't keep an output embedding of type {type(head.module).__name__}: "
            "use keep: top_k."
        )
    bias = head.module.bias
    return rebuilt_head(head.module.weight.detach(), None if bias is None else bias.detach(), head.scale, head.softcap)


def rebuilt_head(weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> OutputHead:
    """A head of its parts: weight `[width, D]` and bias `[width]`."""
    width, hidden = weight.shape
    linear = nn.Linear(hidden, width, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return OutputHead(linear, width, scale, softcap)
