"""Formats of cached teacher scores: hidden states, or the top-k log-probabilities.

Letters: N response positions, D hidden width, K stored tokens of a position, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillkit.chunked.output_head import OutputHead
from distillkit.errors import ModelError
from distillkit.storage.score_shards import Column
from distillkit.types import Scores

SLICE_LOGITS = 2**24
"""Logits computed at once: 64 MiB in float32, as in a loss."""

LOWEST = float(torch.finfo(torch.float16).min)
"""Lower bound of stored log-probabilities: below it float16 has -inf, and 0 · -inf is NaN."""


class ScoreFormat(ABC):
    """A way to store scores: which columns each position has, and the conversion in both directions."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the format's folder within the cache."""

    @property
    @abstractmethod
    def columns(self) -> dict[str, Column]:
        """Columns stored for each position."""

    @property
    def settings(self) -> dict[str, object]:
        """Settings that the columns depend on, besides the teacher."""
        return {"keep": self.name}

    @abstractmethod
    def pack(self, scores: Scores, targets: Tensor) -> dict[str, Tensor]:
        """Converts scores to columns.

        Args:
            scores: The teacher's scores of N positions.
            targets: `[N]` token id that follows each position.
        """

    @abstractmethod
    def unpack(self, columns: Mapping[str, Tensor], vocab: int) -> Scores:
        """Converts the columns of N positions to scores of the first `vocab` tokens."""


@dataclass(frozen=True)
class HiddenFormat(ScoreFormat):
    """Hidden states `[N, D]`, from which the output head computes the exact distribution.

    Args:
        head: The teacher's output head, on the device of the scores.
    """

    head: OutputHead

    @property
    def name(self) -> str:
        return "hidden"

    @property
    def columns(self) -> dict[str, Column]:
        """The hidden states, in the teacher's dtype."""
        weight = self.head.module.weight
        assert isinstance(weight, Tensor)
        return {"hidden": Column(weight.dtype, (weight.shape[1],))}

    def pack(self, scores: Scores, targets: Tensor) -> dict[str, Tensor]:
        """The hidden states.

        Raises:
            ModelError: If the scores do not come from the cached head.
        """
        head = scores.head
        if not isinstance(head, OutputHead) or (head.scale, head.softcap) != (self.head.scale, self.head.softcap):
            raise ModelError(
                "CachedTeacher.keep: hidden needs a teacher whose scores are its model's hidden states and output "
                "embedding. Use keep: top_k."
            )
        return {"hidden": scores.hidden}

    def unpack(self, columns: Mapping[str, Tensor], vocab: int) -> Scores:
        """The hidden states, scored by the head."""
        return Scores(columns["hidden"], OutputHead(self.head.module, vocab, self.head.scale, self.head.softcap), vocab)


@dataclass(frozen=True)
class TopKFormat(ScoreFormat):
    """Log-probabilities of the K most likely of V tokens, of all other tokens together, and of the next token.

    Args:
        k: K, number of stored tokens, below V.
        vocab: V, number of tokens that the softmax is over.
    """

    k: int
    vocab: int

    @property
    def name(self) -> str:
        return f"top-{self.k}-of-{self.vocab}"

    @property
    def columns(self) -> dict[str, Column]:
        """Log-probabilities of the K tokens in float16, their ids, and float32 ones of the tail and the next token."""
        ids = torch.uint16 if self.vocab <= 2**16 else torch.int32
        return {
            "logp": Column(torch.float16, (self.k,)),
            "ids": Column(ids, (self.k,)),
            "tail": Column(torch.float32),
            "own": Column(torch.float32),
        }

    def pack(self, scores: Scores, targets: Tensor) -> dict[str, Tensor]:
        """The columns, computed a slice of positions at a time."""
        step = max(1, SLICE_LOGITS // scores.vocab)
        starts = range(0, max(len(targets), 1), step)
        parts = [self._pack(scores.log_probs(slice(i, i + step)), targets[i : i + step]) for i in starts]
        return {
            name: torch.cat([part[name] for part in parts]).to(column.dtype) for name, column in self.columns.items()
        }

    def _pack(self, logp: Tensor, targets: Tensor) -> dict[str, Tensor]:
        target_logp = logp.gather(-1, targets[:, None]).squeeze(-1).float()
        top, ids = logp.topk(self.k, dim=-1)  # [n, K]
        tail = logp.scatter(-1, ids, -torch.inf).logsumexp(-1).float()
        return {"logp": top.clamp_min(LOWEST), "ids": ids, "tail": tail, "own": target_logp}

    def unpack(self, columns: Mapping[str, Tensor], vocab: int) -> Scores:
        """Log-probabilities `[N, K+1]`; the last column is all other tokens together."""
        log_probs = torch.cat([columns["logp"].float(), columns["tail"][:, None]], dim=-1)
        return Scores.from_top_k(log_probs, columns["ids"].long(), columns["own"])


def plain_head(head: OutputHead) -> OutputHead:
    """The head on a new linear layer, which shares the weights but keeps nothing else of the model in memory.

    Raises:
        ModelError: If the output embedding is not a plain linear layer.
    """
    if type(head.module) is not nn.Linear:
        raise ModelError(
            f"CachedTeacher.keep: hidden can't store an output embedding of type {type(head.module).__name__}. "
            "Use keep: top_k."
        )
    bias = head.module.bias
    return rebuilt_head(head.module.weight.detach(), None if bias is None else bias.detach(), head.scale, head.softcap)


def rebuilt_head(weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> OutputHead:
    """A head from its parts: weight `[width, D]` and bias `[width]`."""
    width, hidden = weight.shape
    linear = nn.Linear(hidden, width, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return OutputHead(linear, width, scale, softcap)
