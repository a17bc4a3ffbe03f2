"""Rows of different lengths -> one line without padding, in which the rows of a prompt share what they begin with."""

from collections.abc import Sequence
from itertools import takewhile

import torch

from distillkit.types import Packed, Row, Segment


def pack(rows: Sequence[Row], groups: Sequence[int], share: bool, pad_id: int = 0, bucket: int = 1) -> Packed:
    """Lays rows end to end.

    The tokens that all rows of a group begin with stand once, before what is each row's own. A row attends to what it
    shares and to itself, and its positions go on where the shared ones end, so that each token sees what it would see
    in a row of its own.

    Args:
        rows: The batch's rows; each trains on no first token.
        groups: Number of the group of each row.
        share: Whether the rows of a group share their beginning.
        pad_id: Token id that fills the line up.
        bucket: The line's length is a multiple of it; what fills it up is a row that nothing sees.

    Returns:
        The line, with the places in it that predict the rows' trained tokens, row by row.
    """
    tokens: list[int] = []
    places: list[int] = []
    segments: list[Segment] = []
    starts: list[tuple[int, int, int]] = [(0, 0, 0)] * len(rows)  # of each row: shared part, how long it is, own part

    def add(part: Sequence[int], first: int, prefix: tuple[int, int] = (0, 0)) -> int:
        start = len(tokens)
        if part:
            tokens.extend(part)
            places.extend(range(first, first + len(part)))
            segments.append(Segment(start, len(tokens), *prefix))
        return start

    for group in dict.fromkeys(groups):
        members = [place for place, own in enumerate(groups) if own == group]
        shared = _shared([rows[place].input_ids for place in members]) if share and len(members) > 1 else 0
        begin = add(rows[members[0]].input_ids[:shared], 0)
        for place in members:
            own = add(rows[place].input_ids[shared:], shared, (begin, begin + shared))
            starts[place] = (begin, shared, own)
    add([pad_id] * (-len(tokens) % bucket), 0)
    predicting = []
    for row, (begin, shared, own) in zip(rows, starts, strict=True):
        trained = (place for place, marked in enumerate(row.response_mask[1:]) if marked)
        predicting += [begin + place if place < shared else own + place - shared for place in trained]
    return Packed(
        input_ids=torch.tensor([tokens], dtype=torch.long),
        position_ids=torch.tensor([places], dtype=torch.long),
        positions=torch.tensor(predicting, dtype=torch.long),
        segments=tuple(segments),
    )


def _shared(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))
