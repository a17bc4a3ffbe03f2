"""Contract tests of teachers: `check_teacher` for a single one, `TeacherContract` for pytest.

Letters: N response positions, V vocabulary, K top tokens of a teacher that stores only these.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distillkit.data.collate import collate
from distillkit.interfaces import Teacher
from distillkit.testing.batches import make_rows
from distillkit.testing.contract import broken, run_tests
from distillkit.types import Batch, Row, Scores, Tokenizer

CPU = torch.device("cpu")
LENGTHS = (3, 1, 0, 4, 2)
TOKENS = 9
CLOSE = 1e-4
"""Tolerance in nats between log-probabilities of the same tokens: rounding depends on the shape of the batch."""


def check_teacher(make: Callable[[], Teacher]) -> None:
    """Runs all tests of `TeacherContract`.

    Args:
        make: Returns a new teacher, with weights in float32.

    Raises:
        AssertionError: If a promise is broken; the message says which one.
    """
    contract = TeacherContract()
    run_tests(contract, make)


class TeacherContract:
    """The contract of every `Teacher` as tests. Subclass it as `Test…` and implement `make`; pytest does the rest."""

    def make(self) -> Teacher:
        """A new teacher to test, before `setup`, with weights in float32."""
        raise NotImplementedError("write make(): it returns the teacher under test")

    def rows(self) -> Sequence[Row]:
        """Rows to score; override it for a teacher that needs different ones."""
        return make_rows(LENGTHS, ("dataset",) * len(LENGTHS), range(len(LENGTHS)), TOKENS)

    def test_each_position_has_a_distribution(self) -> None:
        """`[N, V]` log-probabilities (or `[N, K+1]` with `top_k_ids`) that sum to 1, without a graph."""
        teacher, batch = self._ready(), collate(self.rows(), pad_id=0)
        scores = teacher.score(batch)
        width = teacher.vocab_size if scores.top_k_ids is None else scores.top_k_ids.shape[-1] + 1
        log_probs = scores.log_probs()
        shape = (batch.num_tokens, width)
        matches = log_probs.shape == shape
        self._require(matches, f"score must return {list(shape)} log-probabilities, got {list(log_probs.shape)}")
        self._require(not log_probs.requires_grad, "score must return log-probabilities without a gradient")
        self._require(_close(log_probs.logsumexp(-1), torch.zeros(batch.num_tokens)), "probabilities must sum to 1")

    def test_scores_do_not_depend_on_the_batch(self) -> None:
        """A row has the same scores alone, in a batch, and in another order."""
        teacher, rows = self._ready(), list(self.rows())
        expected = teacher.score(collate(rows, pad_id=0)).log_probs()
        for name, batches in {"alone": [[row] for row in rows], "in another order": [rows[::-1]]}.items():
            parts = [part for batch in batches for part in self._by_row(teacher, collate(batch, pad_id=5))]
            if name == "in another order":
                parts.reverse()
            self._require(_close(torch.cat(parts), expected), f"a row must have the same scores {name}")

    def test_limit_vocab_cuts_the_scores(self) -> None:
        """After `limit_vocab` the distribution covers the first tokens only, and sums to 1 again."""
        full = self._ready()
        batch, size = collate(self.rows(), pad_id=0), full.vocab_size - 3
        teacher = self._ready(size)
        self._require(
            teacher.vocab_size == size, f"vocab_size must be {size} after limit_vocab, got {teacher.vocab_size}"
        )
        expected, scores = full.score(batch), teacher.score(batch)
        if scores.top_k_ids is not None:  # the top tokens, and the mass of all others, may both change
            self._require(int(scores.top_k_ids.max()) < size, "top_k_ids must be below the limit of limit_vocab")
            return
        cut = expected.log_probs()[:, :size].log_softmax(-1)
        self._require(_close(scores.log_probs(), cut), "after limit_vocab scores must be those of the first tokens")

    def test_scores_the_same_after_unload(self) -> None:
        """A second `setup` changes nothing, and `setup` after `unload` restores the teacher."""
        teacher, batch = self._ready(), collate(self.rows(), pad_id=0)
        before = teacher.score(batch).log_probs()
        teacher.setup(CPU)
        self._require(_close(teacher.score(batch).log_probs(), before), "a second setup must change nothing")
        teacher.unload()
        teacher.setup(CPU)
        self._require(
            _close(teacher.score(batch).log_probs(), before), "the scores must be the same after unload and setup"
        )

    def test_has_a_tokenizer_before_it_is_set_up(self) -> None:
        """`tokenizer` works before `setup`: tokenizers are compared before any model is loaded."""
        self._require(self.make().tokenizer() is not None, "tokenizer() must return a tokenizer before setup")

    def test_identity_and_fingerprint_are_stable(self) -> None:
        """`identity` and `fingerprint` are a string or None, equal for two identically constructed teachers."""
        for name in ("identity", "fingerprint"):
            first, second = (getattr(self.make(), name)() for _ in range(2))
            self._require(
                first is None or isinstance(first, str), f"{name}() must return a string or None, got {first!r}"
            )
            self._require(first == second, f"{name}() must be equal for two identically constructed teachers")

    def _ready(self, size: int | None = None) -> Teacher:
        """A teacher after `setup`, `limit_vocab` and `prepare`, in the order of a run."""
        teacher = self.make()
        teacher.setup(CPU)
        teacher.limit_vocab(teacher.vocab_size if size is None else size)
        teacher.prepare(self.rows())
        return teacher

    def _by_row(self, teacher: Teacher, batch: Batch) -> list[Tensor]:
        return list(torch.split(teacher.score(batch).log_probs(), list(batch.lengths)))

    def _require(self, condition: bool, promise: str) -> None:
        if not condition:
            raise broken(self.make(), promise)


class BigramTeacher(Teacher):
    """A teacher without a model: a random bigram table, in which the next token depends only on the last one.

    Args:
        seed: Seed of the table.
        vocab: V, the width of the table.
    """

    def __init__(self, seed: int = 0, vocab: int = 320) -> None:
        self.seed, self._vocab, self._width = seed, vocab, vocab
        self._table: Tensor | None = None  # [V, V] logits of the next token

    def setup(self, device: torch.device) -> None:
        """Samples the table."""
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

    def tokenizer(self) -> Tokenizer:
        """`tiny_tokenizer`."""
        from distillkit.testing.tiny import tiny_tokenizer  # imported late, because it imports transformers

        tokenizer: Tokenizer = tiny_tokenizer()
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """V, after `limit_vocab`."""
        return self._vocab

    def limit_vocab(self, size: int) -> None:
        """Cuts the scores to the first `size` tokens."""
        self._vocab = min(self._vocab, size)

    def identity(self) -> str:
        """Seed and width of the table."""
        return f"bigrams {self.seed} {self._width}"


def _close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first.float(), second.float(), rtol=0.0, atol=CLOSE)
