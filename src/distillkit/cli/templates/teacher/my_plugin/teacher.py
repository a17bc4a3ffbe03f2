"""A teacher made of several."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from distillkit.errors import ConfigError
from distillkit.interfaces import Teacher
from distillkit.models.tokenizers import require_same
from distillkit.types import Batch, Head, Row, Scores
from torch import Tensor, nn


@dataclass(frozen=True)
class MeanHead:
    """Makes log-probabilities of the hidden states of several models, side by side.

    Args:
        heads: The models' own heads.
        widths: D of each.
        dtypes: Type of each one's hidden states.
        vocab: V, the number of tokens that are scored.
    """

    heads: tuple[Head, ...]
    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    vocab: int

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """`[n, D₁ + D₂ + …]` -> `[n, V]` log of the models' summed probabilities: the softmax of it is their mean."""
        parts = zip(self.heads, torch.split(hidden, list(self.widths), dim=-1), self.dtypes, strict=True)
        # Softmax first, cut afterwards: a model that spends much on what is cut has less to say about the rest.
        log_probs = [head(part.to(dtype)).float().log_softmax(-1)[:, : self.vocab] for head, part, dtype in parts]
        return torch.stack(log_probs).logsumexp(0)

    def parameters(self) -> Iterable[Tensor]:
        """Those of all heads."""
        return [parameter for head in self.heads for parameter in head.parameters()]


class MyPlugin(Teacher):
    """The mean of several teachers' probabilities. Where the teacher is to write a response, the first of them does.

    Args:
        teachers: The teachers, all of one tokenizer, and such as score the whole vocabulary.

    Raises:
        ConfigError: If there is none.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        if not teachers:
            raise ConfigError("MyPlugin.teachers needs at least one teacher, got none.")
        self.teachers = tuple(teachers)
        self._limit: int | None = None

    def setup(self, device: torch.device) -> None:
        """Loads all of them."""
        for teacher in self.teachers:
            teacher.setup(device)

    def unload(self) -> None:
        """Frees all of them."""
        for teacher in self.teachers:
            teacher.unload()

    def prepare(self, rows: Sequence[Row]) -> None:
        """Tells all of them."""
        for teacher in self.teachers:
            teacher.prepare(rows)

    def score(self, batch: Batch) -> Scores:
        """Scores of the batch's N response positions.

        Raises:
            ConfigError: If a teacher keeps only its most likely tokens.
        """
        scores = [teacher.score(batch) for teacher in self.teachers]
        if any(own.support is not None for own in scores):
            raise ConfigError(
                "MyPlugin.teachers must score the whole vocabulary, and one keeps its most likely tokens alone: "
                "let it keep hidden states, or leave it out."
            )
        head = MeanHead(
            heads=tuple(own.head for own in scores),
            widths=tuple(own.hidden.shape[-1] for own in scores),
            dtypes=tuple(own.hidden.dtype for own in scores),
            vocab=self.vocab_size,
        )
        hidden = torch.cat([own.hidden for own in scores], dim=-1)  # [N, D₁ + D₂ + …], in a type that holds all of them
        return Scores(hidden, head, self.vocab_size)

    def tokenizer(self) -> Any:
        """The tokenizer that all of them share.

        Raises:
            ModelError: If they have different ones.
        """
        first, *others = (teacher.tokenizer() for teacher in self.teachers)
        for number, other in enumerate(others, start=1):
            require_same(first, other, "MyPlugin.teachers[0]", f"MyPlugin.teachers[{number}]")
        return first

    @property
    def vocab_size(self) -> int:
        """Tokens that all of them score, after cuts."""
        width = min(teacher.vocab_size for teacher in self.teachers)
        return width if self._limit is None else min(width, self._limit)

    def limit_vocab(self, size: int) -> None:
        """Cuts the scores to the first `size` tokens."""
        self._limit = size

    def identity(self) -> str | None:
        """Those of all of them; None if one has none."""
        found = [teacher.identity() for teacher in self.teachers]
        return None if None in found else f"mean of {found}"

    @property
    def model(self) -> nn.Module | None:
        """The first one's: it writes, and the Throughput callback counts the FLOPs of it alone."""
        return self.teachers[0].model
