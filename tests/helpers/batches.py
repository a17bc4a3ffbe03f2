"""Batches with every kind of row that packing handles, and the attention mask that each should have."""

import torch

from distillkit.data.collate import collate
from distillkit.types import Row

VOCAB = 90


def tokens(count, generator):
    return tuple(torch.randint(VOCAB, (count,), generator=generator).tolist())


def some_rows():
    """Pairs that share their prompt and more, a row that another begins with, equal rows, single rows, two turns."""
    generator = torch.Generator().manual_seed(1)
    rows = []

    def add(name, prompt, *responses, writers=("teacher", "student") * 2):
        for response, writer in zip(responses, writers, strict=False):
            mask = (False,) * len(prompt) + (True,) * len(response)
            rows.append(Row(prompt + response, mask, writer, name))

    def draw(count):
        return tokens(count, generator)

    add("a", draw(9), draw(7), draw(4))
    begin = draw(3)
    add("b", draw(5), begin + draw(4), begin + draw(6))
    add("c", draw(2), begin, begin + draw(5))
    add("d", draw(4), begin, begin)
    add("e", draw(6), draw(8))
    add("f", draw(3), draw(3), draw(2), draw(9), draw(1))
    add("g", draw(7), ())
    ids = draw(12)
    rows.append(Row(ids, tuple(index in (3, 4, 8, 11) for index in range(12)), "student", "h"))
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [rows[index] for index in order]


ROWS = some_rows()
SHARED, END_TO_END = (collate(ROWS, pad_id=0, layout=layout) for layout in ("shared", "packed"))
FILLED = collate(ROWS, pad_id=0, bucket=64)
BATCHES = {"shared": SHARED, "packed": END_TO_END, "filled up": FILLED}


def dense(line, window=None):
    """`[L, L]` bool, from the segments one token at a time; the window counts the keys that are attended to."""
    length = line.input_ids.shape[1]
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for start, stop, first, last in line.segments:
        for query in range(start, stop):
            keys = [*range(first, last), *range(start, query + 1)]
            allowed[query, keys if window is None else keys[-window:]] = True
    return allowed
