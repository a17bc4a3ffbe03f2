"""Training rows and batches, padded or packed.

Letters: B rows, T tokens, N response positions in the batch, L tokens of the packed sequence.
"""

import hashlib
from array import array
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One training row: a prompt and one response.

    Args:
        input_ids: Token ids of prompt and response.
        response_mask: True at each token that is trained on; same length as `input_ids`.
        writer: Model or source that the response comes from, such as `student` or `dataset`.
        prompt_id: Id of the prompt; the rows of one prompt form a pair.
        ended: Whether the response ends with an end-of-turn token; False if generation was cut off.
        blank: Whether the generated response contains no text.
        pending: Whether the response is still missing because another shard generates it.
    """

    input_ids: tuple[int, ...]
    response_mask: tuple[bool, ...]
    writer: str
    prompt_id: str
    ended: bool = field(default=True, compare=False)
    blank: bool = field(default=False, compare=False)
    pending: bool = field(default=False, compare=False)

    @property
    def key(self) -> bytes:
        """16-byte hash of the tokens and the mask: rows with the same key have the same scores."""
        content = array("q", self.input_ids).tobytes() + bytes(self.response_mask)
        return hashlib.blake2b(content, digest_size=16).digest()


class Segment(NamedTuple):
    """A span `[start, stop)` of the packed sequence.

    Its tokens attend causally to the span and to all of the shared prefix `[first, last)`.
    """

    start: int
    stop: int
    first: int
    last: int


_PACKED_TENSORS = ("input_ids", "position_ids", "positions")
_TENSORS = ("input_ids", "attention_mask", "response_mask", "positions", "targets", "rows")


@dataclass  # not frozen: Lightning rebuilds batches field by field where it trains in half precision
class Packed:
    """The rows of a batch packed into one sequence of L tokens, without padding.

    Args:
        input_ids: `[1, L]` token ids.
        position_ids: `[1, L]` index of each token within its row.
        positions: `[N]` index into the packed sequence of each position whose prediction is trained on, row by row.
        segments: Spans that cover the sequence in order and define which tokens attend to which; on the host.
        masks: Attention masks built from the segments by a kernel, cached for the next layers.
    """

    input_ids: Tensor
    position_ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    masks: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packed":
        """Returns a copy with the tensors on `device`."""
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _PACKED_TENSORS}
        return Packed(**moved, segments=self.segments)

    def pin_memory(self) -> "Packed":
        """Returns a copy in pinned memory."""
        return Packed(**{name: getattr(self, name).pin_memory() for name in _PACKED_TENSORS}, segments=self.segments)


@dataclass
class Batch:
    """Rows of one micro-batch, padded on the right.

    Args:
        input_ids: `[B, T]` token ids.
        attention_mask: `[B, T]` bool, True at every token that is not padding.
        response_mask: `[B, T]` bool, True at every token that is trained on.
        positions: `[N]` index into the flattened `B·T` positions of each position whose prediction is trained on.
        targets: `[N]` token id that follows each such position.
        rows: `[N]` row index of each such position, ascending.
        lengths: Number of such positions in each row, on the host.
        writer: Model or source of each row's response, on the host.
        pair: Index, within the batch, of the prompt that each row belongs to.
        keys: Hash of each row's tokens and mask, on the host; cached scores of the row are looked up by it.
        packed: The same rows without padding; None if the model runs on the padded rows.
        window: All micro-batches of the optimizer step, if this batch is its first one; None otherwise.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    positions: Tensor
    targets: Tensor
    rows: Tensor
    lengths: tuple[int, ...]
    writer: tuple[str, ...]
    pair: tuple[int, ...]
    keys: tuple[bytes, ...] = field(repr=False)
    packed: Packed | None = field(default=None, repr=False)
    window: "tuple[Batch, ...] | None" = field(default=None, repr=False)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Returns a copy with the tensors on `device`; the other batches of the window are not moved."""
        packed = None if self.packed is None else self.packed.to(device, non_blocking)
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return replace(self, packed=packed, **moved)

    def pin_memory(self) -> "Batch":
        """Returns a copy in pinned memory."""
        packed = None if self.packed is None else self.packed.pin_memory()
        return replace(self, packed=packed, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    def limited_to(self, chosen: tuple[bool, ...]) -> tuple["Batch", Tensor]:
        """Returns the batch with the response positions of some rows alone, and the index of these positions.

        Args:
            chosen: Whether the positions of each row remain.

        Returns:
            The batch, in which the other rows have no positions; and the `[n]` indices among the N positions.
        """
        device = self.rows.device
        index = torch.tensor(chosen, device=device)[self.rows].nonzero().squeeze(-1)
        lengths = tuple(length if row else 0 for length, row in zip(self.lengths, chosen, strict=True))
        selected = {name: getattr(self, name)[index] for name in ("positions", "targets", "rows")}
        return replace(self, lengths=lengths, **selected), index

    @property
    def num_tokens(self) -> int:
        """Number of response positions in the batch, N."""
        return sum(self.lengths)
