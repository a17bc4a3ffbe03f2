"""The promises that every teacher keeps, as tests: `check_teacher` for one, `TeacherContract` for pytest.

Letters: N response positions, V vocabulary, K kept top tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distillkit.data.collate import collate
from distillkit.interfaces import Teacher
from distillkit.testing.batches import make_rows
from distillkit.types import Batch, Row, Scores

CPU = torch.device("cpu")
LENGTHS = (3, 1, 0, 4, 2)
TOKENS = 9
CLOSE = 1e-4
"""Nats by which two log-probabilities of one thing may differ: batches of other shapes are rounded otherwise."""


def check_teacher(make: Callable[[], Teacher]) -> None:
    """Checks every promise of `TeacherContract`.

    Args:
        make: Makes the teacher, with weights in float32, each time anew.

    Raises:
        AssertionError: If a promise is broken; the message says which.
    """
    contract = TeacherContract()
    contract.make = make  # type: ignore[method-assign]
    for name in dir(contract):
        if name.startswith("test_"):
            getattr(contract, name)()


class TeacherContract:
    """What every `Teacher` promises. Subclass it as `Test…`, and write `make`; pytest does the rest."""

    def make(self) -> Teacher:
        """The teacher under test, before its `setup`, with weights in float32; a new one each time."""
        raise NotImplementedError("write make(), which returns the teacher under test")

    def rows(self) -> Sequence[Row]:
        """What it scores; override it for a teacher that needs other rows."""
        return make_rows(LENGTHS, ("dataset",) * len(LENGTHS), range(len(LENGTHS)), TOKENS)

    def test_gives_a_distribution_for_each_position(self) -> None:
        """`[N, V]` log-probabilities (or `[N, K+1]` with a support) that sum to 1, without a graph."""
        teacher, batch = self._ready(), collate(self.rows(), pad_id=0)
        scores = teacher.score(batch)
        width = teacher.vocab_size if scores.support is None else scores.support.shape[-1] + 1
        found = scores.log_probs()
        shape = (batch.num_tokens, width)
        self._require(found.shape == shape, f"score must give {list(shape)} log-probabilities, got {list(found.shape)}")
        self._require(not found.requires_grad, "score must give log-probabilities without a gradient")
        self._require(_close(found.logsumexp(-1), torch.zeros(batch.num_tokens)), "probabilities must sum to 1")

    def test_scores_a_row_whatever_stands_beside_it(self) -> None:
        """Alone a row has the scores that it has in a batch, and in another order too."""
        teacher, rows = self._ready(), list(self.rows())
        whole = teacher.score(collate(rows, pad_id=0)).log_probs()
        for name, batches in {"alone": [[row] for row in rows], "in another order": [rows[::-1]]}.items():
            found = [self._by_row(teacher, collate(batch, pad_id=5)) for batch in batches]
            parts = [part for batch in found for part in batch]
            if name == "in another order":
                parts.reverse()
            self._require(_close(torch.cat(parts), whole), f"a row must have the same scores {name}")

    def test_is_cut_to_the_tokens_that_both_models_share(self) -> None:
        """After `limit_vocab` the probabilities are those of the first tokens, and sum to 1 again."""
        whole = self._ready()
        batch, size = collate(self.rows(), pad_id=0), whole.vocab_size - 3
        teacher = self._ready(size)
        self._require(
            teacher.vocab_size == size, f"vocab_size must be {size} after limit_vocab, got {teacher.vocab_size}"
        )
        expected, found = whole.score(batch), teacher.score(batch)
        if found.support is not None:  # which tokens were kept, and how much the others have, may both change
            self._require(int(found.support.max()) < size, "no kept token may be cut")
            return
        cut = expected.log_probs()[:, :size].log_softmax(-1)
        self._require(_close(found.log_probs(), cut), "after limit_vocab scores must be those of the first tokens")

    def test_says_the_same_after_it_was_unloaded(self) -> None:
        """`setup` may be called again, and after `unload` it loads what was there."""
        teacher, batch = self._ready(), collate(self.rows(), pad_id=0)
        before = teacher.score(batch).log_probs()
        teacher.setup(CPU)
        self._require(_close(teacher.score(batch).log_probs(), before), "a second setup must change nothing")
        teacher.unload()
        teacher.setup(CPU)
        self._require(_close(teacher.score(batch).log_probs(), before), "unloaded and set up again it scores otherwise")

    def test_has_a_tokenizer_before_it_is_set_up(self) -> None:
        """Tokenizers are compared before any model is loaded."""
        self._require(self.make().tokenizer() is not None, "tokenizer() must give one before setup")

    def test_names_its_weights_alike_each_time(self) -> None:
        """`identity` is the same text for two that are made alike, or None; so is `fingerprint`."""
        for name in ("identity", "fingerprint"):
            first, second = (getattr(self.make(), name)() for _ in range(2))
            self._require(first is None or isinstance(first, str), f"{name}() must give a text or None, got {first!r}")
            self._require(first == second, f"{name}() must be the same for two that are made alike")

    def _ready(self, size: int | None = None) -> Teacher:
        """A teacher that is set up, cut and told the rows, in the order of a run."""
        teacher = self.make()
        teacher.setup(CPU)
        teacher.limit_vocab(teacher.vocab_size if size is None else size)
        teacher.prepare(self.rows())
        return teacher

    def _by_row(self, teacher: Teacher, batch: Batch) -> list[Tensor]:
        return list(torch.split(teacher.score(batch).log_probs(), list(batch.lengths)))

    def _require(self, kept: bool, promise: str) -> None:
        if not kept:
            raise AssertionError(f"{type(self.make()).__name__} breaks its contract: {promise}.")


class BigramTeacher(Teacher):
    """A teacher without a model: the next token depends on the last one alone, by a table that is drawn.

    Args:
        seed: Of the table.
        vocab: V, the width of the table.
    """

    def __init__(self, seed: int = 0, vocab: int = 320) -> None:
        self.seed, self._vocab, self._width = seed, vocab, vocab
        self._table: Tensor | None = None  # [V, V] logits of the next token

    def setup(self, device: torch.device) -> None:
        """Draws the table."""
        table = torch.randn(self._width, self._width, generator=torch.Generator().manual_seed(self.seed))
        self._table = table.to(device)

    def unload(self) -> None:
        """Frees the table."""
        self._table = None

    def score(self, batch: Batch) -> Scores:
        """Scores of the batch's N response positions."""
        assert self._table is not None, "setup comes first"
        last = batch.input_ids.flatten()[batch.positions]  # [N]
        return Scores.from_logits(self._table[last, : self._vocab])

    def tokenizer(self) -> Any:
        """`tiny_tokenizer`."""
        from distillkit.testing.tiny import tiny_tokenizer  # here, because it imports transformers

        return tiny_tokenizer()

    @property
    def vocab_size(self) -> int:
        """V, after cuts."""
        return self._vocab

    def limit_vocab(self, size: int) -> None:
        """Cuts the scores to the first `size` tokens."""
        self._vocab = min(self._vocab, size)

    def identity(self) -> str:
        """Seed and width of the table."""
        return f"bigrams {self.seed} {self._width}"


def _close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first.float(), second.float(), rtol=0.0, atol=CLOSE)
