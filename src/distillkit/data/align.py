"""Alignment of positions and targets: the only file that relies on position t predicting token t+1."""

from typing import NamedTuple

from torch import Tensor

from distillkit.errors import DataError


class ResponsePositions(NamedTuple):
    """The N positions of a batch whose predictions are trained on, row by row, each row from left to right.

    Args:
        positions: `[N]` index into the flattened `B·T` positions.
        targets: `[N]` token id that follows each position.
        rows: `[N]` row of each position, ascending.
        lengths: Number of positions of each row, on the host.
    """

    positions: Tensor
    targets: Tensor
    rows: Tensor
    lengths: tuple[int, ...]


def response_positions(input_ids: Tensor, response_mask: Tensor) -> ResponsePositions:
    """Returns the positions that predict the marked tokens: the token in column t+1 is predicted in column t.

    Args:
        input_ids: `[B, T]` token ids.
        response_mask: `[B, T]` bool, True at every token that is trained on. A row may have none.

    Raises:
        DataError: If a row marks its first token.
    """
    first = response_mask[:, 0].nonzero()
    if first.numel():
        raise DataError(
            f"Row {int(first[0])} of the batch trains on its first token, which no position predicts: "
            "start the row with a prompt or a beginning-of-sequence token."
        )
    rows, columns = response_mask[:, 1:].nonzero(as_tuple=True)
    return ResponsePositions(
        positions=rows * input_ids.shape[1] + columns,
        targets=input_ids[rows, columns + 1],
        rows=rows,
        lengths=tuple(response_mask.sum(dim=1).tolist()),
    )
