"""Sums of a head's gradient over slices, with more bits than the gradient itself has.

Letters: n positions of a slice, D hidden width, V vocabulary.
"""

from itertools import pairwise

import torch
from torch import Tensor

ROWS = {"cpu": 2048, "cuda": 8192}
"""Rows of a head that are cast, or freed, at once: an accelerator needs more of them to be busy."""
_TILE = 512
"""Rows of a sum on the CPU that are unpacked at once: few enough to stay in the cache."""


def rows_at_once(device: torch.device) -> int:
    """Rows of a head on `device` that are cast, or freed, at once."""
    return ROWS["cpu" if device.type == "cpu" else "cuda"]


def summing(own: Tensor) -> "GradientSum":
    """A sum, 0 so far, of gradients by the parameter `own`."""
    if own.dtype == torch.promote_types(own.dtype, torch.float32) or own.dim() == 1:
        return GradientSum(own)
    is_split = own.dtype == torch.bfloat16 and own.device.type == "cpu"
    return SplitSum(own) if is_split else ChunkedSum(own)


class GradientSum:
    """A sum in the parameter's own type, or in float32 if that is narrower.

    Args:
        own: The parameter, `[V]` or `[V, D]`.
    """

    def __init__(self, own: Tensor) -> None:
        self.own = own
        self.total = torch.zeros_like(own, dtype=torch.promote_types(own.dtype, torch.float32))

    def add(self, rows: slice, more: Tensor) -> None:
        """Adds `more` to some rows."""
        self.total[rows] += more

    def add_product(self, rows: slice, by_logits: Tensor, hidden: Tensor) -> None:
        """Adds what a slice contributes to some rows.

        Args:
            rows: Tokens.
            by_logits: `[n, rows]` gradient by their logits.
            hidden: `[n, D]` hidden states, of the same type.
        """
        if self.total.dtype == hidden.dtype:
            self.total[rows].addmm_(by_logits.T, hidden)
        else:
            self.total[rows] += by_logits.T @ hidden

    def finished(self) -> Tensor:
        """The sum in the parameter's type; it is given up."""
        total, self.total = self.total, self.total[:0]
        return total.to(self.own.dtype)


class ChunkedSum(GradientSum):
    """A sum in float32, in pieces that are freed one by one while the gradient in the narrower type is made."""

    def __init__(self, own: Tensor) -> None:
        super().__init__(own[:0])
        self.own, self.rows = own, rows_at_once(own.device)
        self.totals = [torch.zeros_like(own[rows], dtype=torch.float32) for rows in cut(len(own), self.rows)]

    def add(self, rows: slice, more: Tensor) -> None:
        """Adds `more` to some rows."""
        for piece in _within(rows, self.rows):
            first = piece.start // self.rows * self.rows
            own = slice(piece.start - rows.start, piece.stop - rows.start)
            self.totals[first // self.rows][piece.start - first : piece.stop - first] += more[own]

    def add_product(self, rows: slice, by_logits: Tensor, hidden: Tensor) -> None:
        """Adds what a slice contributes to some rows."""
        self.add(rows, by_logits.T @ hidden)

    def finished(self) -> Tensor:
        """The sum in the parameter's type; it is given up piece by piece."""
        grad = torch.empty_like(self.own)
        for rows in cut(len(self.own), self.rows):
            grad[rows] = self.totals.pop(0)
        return grad


class SplitSum(GradientSum):
    """A sum in bfloat16 and one more byte: the 24 upper bits of float32, whose upper 16 are the gradient itself.

    Beyond the gradient it takes a byte for each weight, where a sum in float32 would take four. Each addition is
    rounded to 16 bits, 2^-17 of the sum, which is 2^-8 of the rounding of the gradient at the end.
    """

    def __init__(self, own: Tensor) -> None:
        super().__init__(own[:0])
        self.own = own
        self.upper = torch.zeros_like(own)
        self.lower = torch.zeros_like(own, dtype=torch.uint8)

    def add(self, rows: slice, more: Tensor) -> None:
        """Adds `more` to some rows."""
        for piece in _within(rows, _TILE):
            self._add(piece, more[piece.start - rows.start : piece.stop - rows.start])

    def add_product(self, rows: slice, by_logits: Tensor, hidden: Tensor) -> None:
        """Adds what a slice contributes to some rows."""
        for piece in _within(rows, _TILE):
            self._add(piece, by_logits[:, piece.start - rows.start : piece.stop - rows.start].T @ hidden)

    def _add(self, rows: slice, more: Tensor) -> None:
        upper, lower = self.upper[rows].view(torch.int16), self.lower[rows]
        bits = upper.to(torch.int32).bitwise_left_shift_(8).bitwise_or_(lower).bitwise_left_shift_(8)
        bits.view(torch.float32).add_(more)
        bits.add_(1 << 7).bitwise_right_shift_(8)  # rounded to nearest: a carry goes on into the exponent as it should
        lower.copy_(bits)  # its last 8 bits
        upper.copy_(bits.bitwise_right_shift_(8))

    def finished(self) -> Tensor:
        """The sum rounded to bfloat16; it is given up."""
        for rows in cut(len(self.own), _TILE):
            self.upper[rows].view(torch.int16).add_(self.lower[rows].bitwise_right_shift(7))
        self.lower = self.lower[:0]
        return self.upper


def cut(length: int, size: int) -> list[slice]:
    """Slices of `size` over `length`, the last one shorter."""
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def _within(rows: slice, size: int) -> list[slice]:
    """`rows` cut at the multiples of `size`."""
    inner = range(rows.start // size * size + size, rows.stop, size)
    return [slice(start, stop) for start, stop in pairwise([rows.start, *inner, rows.stop])]
