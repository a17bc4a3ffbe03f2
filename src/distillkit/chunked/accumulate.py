"""Gradient accumulators: sums over slices with more precision than the gradient itself has.

Letters: n positions of a slice, D hidden width, V vocabulary.
"""

from itertools import pairwise

import torch
from torch import Tensor

ROWS = {"cpu": 2048, "cuda": 8192}
"""Rows of a head that are cast or freed at a time, by type of device: an accelerator needs more to be busy."""
_TILE = 512
"""Rows of a sum that are unpacked at a time on the CPU: few enough to stay in the cache."""


def rows_at_once(device: torch.device) -> int:
    """Returns the number of rows of a head on `device` that are cast or freed at a time."""
    return ROWS["cpu" if device.type == "cpu" else "cuda"]


def make_accumulator(parameter: Tensor) -> "GradientAccumulator":
    """Returns an accumulator, initially 0, for the gradient of `parameter`."""
    if parameter.dtype == torch.promote_types(parameter.dtype, torch.float32) or parameter.dim() == 1:
        return GradientAccumulator(parameter)
    is_split = parameter.dtype == torch.bfloat16 and parameter.device.type == "cpu"
    return SplitAccumulator(parameter) if is_split else ChunkedAccumulator(parameter)


class GradientAccumulator:
    """Sums a gradient in the parameter's dtype, or in float32 if that dtype is narrower.

    Args:
        parameter: A bias `[V]` or a weight `[V, D]`.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.total = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))

    def add(self, rows: slice, grad: Tensor) -> None:
        """Adds `grad` to the sum at `rows`."""
        self.total[rows] += grad

    def add_product(self, rows: slice, by_logits: Tensor, hidden: Tensor) -> None:
        """Adds the contribution of a slice of positions, gradient by the logits times hidden states, at `rows`.

        Args:
            rows: Token ids that the rows of the weight belong to.
            by_logits: `[n, rows]` gradient by the logits of these tokens.
            hidden: `[n, D]` hidden states, of the same dtype.
        """
        if self.total.dtype == hidden.dtype:
            self.total[rows].addmm_(by_logits.T, hidden)
        else:
            self.total[rows] += by_logits.T @ hidden

    def finished(self) -> Tensor:
        """Returns the sum in the parameter's dtype and frees the accumulator."""
        total, self.total = self.total, self.total[:0]
        return total.to(self.parameter.dtype)


class ChunkedAccumulator(GradientAccumulator):
    """Sums in float32, in pieces that are freed one by one while they are converted to the narrower dtype."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__(parameter[:0])
        self.parameter, self.rows = parameter, rows_at_once(parameter.device)
        self.totals = [
            torch.zeros_like(parameter[rows], dtype=torch.float32) for rows in cut(len(parameter), self.rows)
        ]

    def add(self, rows: slice, grad: Tensor) -> None:
        """Adds `grad` to the sum at `rows`."""
        for piece in _within(rows, self.rows):
            first = piece.start // self.rows * self.rows
            source = slice(piece.start - rows.start, piece.stop - rows.start)
            self.totals[first // self.rows][piece.start - first : piece.stop - first] += grad[source]

    def add_product(self, rows: slice, by_logits: Tensor, hidden: Tensor) -> None:
        """Adds the contribution of a slice of positions at `rows`."""
        self.add(rows, by_logits.T @ hidden)

    def finished(self) -> Tensor:
        """Returns the sum in the parameter's dtype and frees the accumulator piece by piece."""
        grad = torch.empty_like(self.parameter)
        for rows in cut(len(self.parameter), self.rows):
            grad[rows] = self.totals.pop(0)
        return grad


class SplitAccumulator(GradientAccumulator):
    """Sums in bfloat16 plus one byte: the upper 24 bits of float32, whose upper 16 bits are the gradient itself.

    Besides the gradient it uses one byte per weight, where a sum in float32 would use four. Each addition is rounded to
    16 bits, 2^-17 of the sum, which is 2^-8 of the rounding of the gradient at the end.
    """

    def __init__(self, parameter: Tensor) -> None:
        super().__init__(parameter[:0])
        self.parameter = parameter
        self.upper = torch.zeros_like(parameter)
        self.lower = torch.zeros_like(parameter, dtype=torch.uint8)

    def add(self, rows: slice, grad: Tensor) -> None:
        """Adds `grad` to the sum at `rows`."""
        for piece in _within(rows, _TILE):
            self._add(piece, grad[piece.start - rows.start : piece.stop - rows.start])

    def add_product(self, rows: slice, by_logits: Tensor, hidden: Tensor) -> None:
        """Adds the contribution of a slice of positions at `rows`."""
        for piece in _within(rows, _TILE):
            self._add(piece, by_logits[:, piece.start - rows.start : piece.stop - rows.start].T @ hidden)

    def _add(self, rows: slice, grad: Tensor) -> None:
        upper, lower = self.upper[rows].view(torch.int16), self.lower[rows]
        bits = upper.to(torch.int32).bitwise_left_shift_(8).bitwise_or_(lower).bitwise_left_shift_(8)
        bits.view(torch.float32).add_(grad)
        bits.add_(1 << 7).bitwise_right_shift_(8)  # round to nearest: a carry into the exponent is right
        lower.copy_(bits)  # keeps the last 8 bits
        upper.copy_(bits.bitwise_right_shift_(8))

    def finished(self) -> Tensor:
        """Returns the sum rounded to bfloat16 and frees the accumulator."""
        for rows in cut(len(self.parameter), _TILE):
            self.upper[rows].view(torch.int16).add_(self.lower[rows].bitwise_right_shift(7))
        self.lower = self.lower[:0]
        return self.upper


def cut(length: int, size: int) -> list[slice]:
    """Returns slices of `size` that cover `length`; the last one may be shorter."""
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def _within(rows: slice, size: int) -> list[slice]:
    """Returns `rows`, split at the multiples of `size`."""
    inner = range(rows.start // size * size + size, rows.stop, size)
    return [slice(start, stop) for start, stop in pairwise([rows.start, *inner, rows.stop])]
