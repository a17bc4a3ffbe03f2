"""Packing: rows end to end in one sequence without padding, with shared prefixes stored once."""

from collections.abc import Sequence
from itertools import takewhile

import torch

from distillkit.types import Packed, Row, Segment


def pack(rows: Sequence[Row], groups: Sequence[int], share: bool, pad_id: int = 0, bucket: int = 1) -> Packed:
    """Packs rows end to end.

    The common prefix of a group's rows is stored once, before the rest of each row. A row attends to the shared prefix
    and to itself, and its position ids continue after the prefix, so that each token attends to exactly the tokens it
    would attend to if its row were alone.

    Args:
        rows: The batch's rows; each trains on no first token.
        groups: Index of the group of each row.
        share: Whether the rows of a group share one copy of their common prefix.
        pad_id: Token id used as padding.
        bucket: The packed length is a multiple of it; the padding consists of segments that no row attends to, none
            longer than the longest row, so that no position is used that the rows don't need.

    Returns:
        The packed sequence, with the positions in it that predict the rows' trained tokens, row by row.
    """
    tokens: list[int] = []
    position_ids: list[int] = []
    segments: list[Segment] = []
    # Of each row: start of the shared prefix, its length, start of the rest.
    starts: list[tuple[int, int, int]] = [(0, 0, 0)] * len(rows)

    def add(part: Sequence[int], first: int, prefix: tuple[int, int] = (0, 0)) -> int:
        start = len(tokens)
        if part:
            tokens.extend(part)
            position_ids.extend(range(first, first + len(part)))
            segments.append(Segment(start, len(tokens), *prefix))
        return start

    for group in dict.fromkeys(groups):
        members = [index for index, row_group in enumerate(groups) if row_group == group]
        shared = _common_prefix([rows[index].input_ids for index in members]) if share and len(members) > 1 else 0
        begin = add(rows[members[0]].input_ids[:shared], 0)
        for index in members:
            rest = add(rows[index].input_ids[shared:], shared, (begin, begin + shared))
            starts[index] = (begin, shared, rest)
    longest = max(len(row.input_ids) for row in rows)
    while missing := -len(tokens) % bucket:
        add([pad_id] * min(missing, longest), 0)
    predicting = []
    for row, (begin, shared, rest) in zip(rows, starts, strict=True):
        trained = (index for index, marked in enumerate(row.response_mask[1:]) if marked)
        predicting += [begin + index if index < shared else rest + index - shared for index in trained]
    return Packed(
        input_ids=torch.tensor([tokens], dtype=torch.long),
        position_ids=torch.tensor([position_ids], dtype=torch.long),
        positions=torch.tensor(predicting, dtype=torch.long),
        segments=tuple(segments),
    )


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix of all sequences."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))
