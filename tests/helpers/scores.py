"""Teachers of tiny models that are counted, and rows for them to score."""

import torch

from distillkit.remote.wheels import cache_dir
from distillkit.teachers.cached import CachedTeacher
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Row
from helpers.models import tiny_tokenizer

CPU = torch.device("cpu")
WIDTH = len(tiny_tokenizer())


class Counting(TransformersTeacher):
    """Counts how often its model is loaded, and the rows that it scores; breaks down after `until` batches."""

    def __init__(self, source, dtype="float32", until=None):
        super().__init__(str(source), dtype)
        self.loads, self.scored, self.until = 0, [], until

    def setup(self, device):
        self.loads += self._model is None
        super().setup(device)

    def score(self, batch):
        if self.until is not None and len(self.scored) >= self.until:
            raise KeyboardInterrupt
        self.scored.append(batch.keys)
        return super().score(batch)

    @property
    def keys(self):
        return [key for batch in self.scored for key in batch]


class Unloadable(Counting):
    """A teacher whose model must not be needed."""

    def setup(self, device):
        raise AssertionError("the model was loaded")

    def identity(self):
        return Counting(self.source, self.dtype).identity()


def some_rows(count=9, seed=0, vocab=WIDTH):
    """Rows of 3 to 20 tokens below `vocab`, half of each a response."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = int(torch.randint(3, 21, (), generator=generator))
        ids = tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())
        rows.append(Row(ids, tuple(i >= length // 2 for i in range(length)), "teacher", f"p{index}"))
    return rows


def ready(teacher, rows=(), vocab=WIDTH, **settings):
    """A cached teacher on the CPU that has prepared these rows."""
    cached = CachedTeacher(teacher, **settings)
    cached.setup(CPU)
    cached.limit_vocab(vocab)
    cached.prepare(list(rows))
    return cached


def live(source, batch, dtype="float32", vocab=WIDTH):
    teacher = TransformersTeacher(str(source), dtype)
    teacher.setup(CPU)
    teacher.limit_vocab(vocab)
    return teacher.score(batch)


def in_order(rows):
    """As `prepare` forms a batch of few rows."""
    return sorted(rows, key=lambda row: (len(row.input_ids), row.key))


def only_folder():
    """The one folder of scores in the cache."""
    (folder,) = (cache_dir() / "teachers").iterdir()
    return str(folder)


def loaded(source, dtype="float32"):
    teacher = TransformersTeacher(str(source), dtype)
    teacher.setup(CPU)
    return teacher.model
