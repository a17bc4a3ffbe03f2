"""Collation: rows of different lengths to one batch, padded on the right."""

from collections.abc import Sequence
from typing import Literal

import torch

from distillkit.data.align import response_positions
from distillkit.data.packing import pack
from distillkit.errors import DataError
from distillkit.types import Batch, Row

Layout = Literal["shared", "packed", "padded"]


def collate(
    rows: Sequence[Row], pad_id: int, layout: Layout = "shared", bucket: int = 1, pair: Sequence[int] | None = None
) -> Batch:
    """Makes a batch of rows, on the CPU.

    Masks come from lengths and from the rows, never from token ids: `pad_id` may be a token that rows contain.

    Args:
        rows: The batch's rows, at least one.
        pad_id: Token id used as padding; it is neither attended to nor trained on.
        layout: `shared` also packs the rows end to end, with one copy of the common prefix of a prompt's rows;
            `packed` packs complete rows; `padded` does not pack.
        bucket: The length of the packed rows is a multiple of it.
        pair: Index of the pair that each row belongs to; None numbers the prompts from 0 in the order in which they
            first appear.

    Raises:
        DataError: If a row is empty, its mask has another length than its tokens, or it trains on its first token.
    """
    assert rows, "a batch has at least one row"
    for row in rows:
        _check(row)
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    response_mask = torch.zeros(shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[index, :length] = torch.tensor(row.input_ids, dtype=torch.long)
        attention_mask[index, :length] = True
        response_mask[index, :length] = torch.tensor(row.response_mask, dtype=torch.bool)
    response = response_positions(input_ids, response_mask)
    pair_indices: dict[str, int] = {}
    if pair is None:
        pair = [pair_indices.setdefault(row.prompt_id, len(pair_indices)) for row in rows]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        response_mask=response_mask,
        positions=response.positions,
        targets=response.targets,
        rows=response.rows,
        lengths=response.lengths,
        writer=tuple(row.writer for row in rows),
        pair=tuple(pair),
        keys=tuple(row.key for row in rows),
        packed=None if layout == "padded" else pack(rows, pair, layout == "shared", pad_id, bucket),
    )


def _check(row: Row) -> None:
    if not row.input_ids or len(row.response_mask) != len(row.input_ids):
        raise DataError(
            f"The {row.writer} row of prompt {row.prompt_id} has {len(row.input_ids)} tokens and a response mask of "
            f"length {len(row.response_mask)}: the curator must give both the same length, at least 1."
        )
