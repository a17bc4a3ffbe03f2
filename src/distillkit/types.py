"""What flows between the parts.

Letters: B rows, T tokens, V vocabulary, D hidden width, N response positions in the batch, C components of a loss.
p is the teacher and q the student, everywhere.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from distillkit.errors import ConfigError

Writer = Literal["dataset", "teacher", "student", "speculative", "stronger"]
Reduction = Literal["sequence_mean", "token_mean"]
Message = Mapping[str, str]


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenised.

    Args:
        id: Content hash of the messages: the same prompt has the same id in every run.
        messages: Chat messages up to and with the turn to be answered.
        input_ids: Token ids of the rendered messages, generation prompt included.
        reference_ids: Token ids of the whole conversation with the response that came with the prompt; empty if none.
        reference_mask: True at each token of `reference_ids` that an assistant wrote, its end of turn included.
        reference: Text of the response that came with the prompt; None if none.
    """

    id: str
    messages: tuple[Message, ...]
    input_ids: tuple[int, ...]
    reference_ids: tuple[int, ...] = ()
    reference_mask: tuple[bool, ...] = ()
    reference: str | None = None


@dataclass(frozen=True)
class Prompts(Sequence[Prompt]):
    """The prompts answered in one round.

    Args:
        items: The prompts.
        round: Number of the round, from 0. It is part of every response's seed and provenance.
    """

    items: tuple[Prompt, ...]
    round: int = 0

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> "Prompts": ...
    def __getitem__(self, index: int | slice) -> "Prompt | Prompts":
        return replace(self, items=self.items[index]) if isinstance(index, slice) else self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.items)

    def at_round(self, number: int) -> "Prompts":
        """The same prompts as round `number`."""
        return replace(self, round=number)


@dataclass(frozen=True)
class Sampling:
    """How a response is drawn; one object for every generator.

    Args:
        temperature: Divides the logits before the softmax, at least 0; 0 is greedy.
        top_p: Smallest probability mass that is sampled from, in (0, 1].
        top_k: Number of most likely tokens that are sampled from; 0 means all.
        max_new_tokens: Longest response, in tokens, at least 1.
        seed: Base seed. Each response has a seed of its own from this one, the round and the prompt's id.

    Raises:
        ConfigError: If a value is outside its range.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"Sampling.temperature must be at least 0 (0 is greedy), got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"Sampling.top_p must lie in (0, 1], got {self.top_p}.")
        if self.top_k < 0:
            raise ConfigError(f"Sampling.top_k must be at least 0 (0 keeps every token), got {self.top_k}.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"Sampling.max_new_tokens must be at least 1, got {self.max_new_tokens}.")

    def seed_of(self, round_number: int, prompt_id: str) -> int:
        """The seed of one response: it depends on the base seed, the round and the prompt, not on a batch or a rank."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{round_number}/{prompt_id}".encode()).digest()[:8]) >> 1


@dataclass(frozen=True)
class Response:
    """What a generator wrote for one prompt.

    Args:
        prompt_id: Id of the prompt that it answers.
        token_ids: The response's tokens, end of turn included where it was written.
        text: The decoded response without special tokens.
        finish: `stop` if the model ended its turn, `length` if `max_new_tokens` cut it.
        log_probs: What its writer says of each token, by its logits as they are (temperature 1, the whole vocabulary);
            empty if it doesn't tell. Two responses are equal without them: in another batch they are rounded otherwise.
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    text: str
    finish: Literal["stop", "length"]
    log_probs: tuple[float, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Row:
    """One training row: a prompt with one response.

    Args:
        input_ids: Token ids of prompt and response.
        response_mask: True at each token that is trained on; as long as `input_ids`.
        writer: Who wrote the response.
        prompt_id: Id of the prompt; the rows of one prompt form a pair.
        ended: False if a model's response was cut before its end of turn.
        blank: True if a model's response has no text.
    """

    input_ids: tuple[int, ...]
    response_mask: tuple[bool, ...]
    writer: str
    prompt_id: str
    ended: bool = field(default=True, compare=False)
    blank: bool = field(default=False, compare=False)

    @property
    def key(self) -> bytes:
        """16 bytes that name the tokens and the mask: rows with the same key are scored alike."""
        content = array("q", self.input_ids).tobytes() + bytes(self.response_mask)
        return hashlib.blake2b(content, digest_size=16).digest()


class Segment(NamedTuple):
    """Tokens `start … stop − 1` of a line; they see those of `first … last − 1` and, up to each, one another."""

    start: int
    stop: int
    first: int
    last: int


@dataclass  # not frozen: Lightning rebuilds batches field by field where it trains in half precision
class Packed:
    """The rows of a batch end to end, without padding; L tokens.

    Args:
        input_ids: `[1, L]` token ids.
        position_ids: `[1, L]` place of each token within its row.
        positions: `[N]` place in the line of each position whose prediction is trained on, row by row.
        segments: Who sees whom, on the host; they cover the line in order.
        masks: What an attention kernel made of the segments, kept for the next layer.
    """

    input_ids: Tensor
    position_ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    masks: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packed":
        """The line with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _LINE}
        return Packed(**moved, segments=self.segments)

    def pin_memory(self) -> "Packed":
        """The line in memory that a device can read while it works."""
        return Packed(**{name: getattr(self, name).pin_memory() for name in _LINE}, segments=self.segments)


_LINE = ("input_ids", "position_ids", "positions")
_TENSORS = ("input_ids", "attention_mask", "response_mask", "positions", "targets", "rows")


@dataclass
class Batch:
    """Rows of one micro-batch, padded on the right.

    Args:
        input_ids: `[B, T]` token ids.
        attention_mask: `[B, T]` bool, True at every token that is not padding.
        response_mask: `[B, T]` bool, True at every token that is trained on.
        positions: `[N]` index into the flattened `B·T` positions, of each position whose prediction is trained on.
        targets: `[N]` token id that follows each such position.
        rows: `[N]` row of each such position, ascending.
        lengths: Number of such positions of each row, on the host.
        writer: Who wrote each row's response, on the host.
        pair: Number of the prompt that each row belongs to, within the batch.
        keys: Hash of each row's tokens and mask, on the host: what is known of a row on disk is found by it.
        packed: The same rows without padding; None if they are to be padded.
        window: The micro-batches of the optimizer step that this one begins, itself first; None within a step.
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
        """The batch with its tensors on `device`; the window's other batches stay where they are."""
        packed = None if self.packed is None else self.packed.to(device, non_blocking)
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return replace(self, packed=packed, **moved)

    def pin_memory(self) -> "Batch":
        """The batch in memory that a device can read while it works."""
        packed = None if self.packed is None else self.packed.pin_memory()
        return replace(self, packed=packed, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    @property
    def num_tokens(self) -> int:
        """Response positions in the batch, N."""
        return sum(self.lengths)


class Head(Protocol):
    """Turns hidden states `[n, D]` into logits `[n, V]`."""

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """Logits `[n, V]` of hidden states `[n, D]`."""
        ...

    def parameters(self) -> Iterable[Tensor]:
        """What a gradient of the logits may be taken by, besides the hidden states."""
        ...


@dataclass(frozen=True)
class LogitsHead:
    """The head of scores that hold logits already: it changes nothing and has no parameters."""

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """`hidden` itself."""
        return hidden

    def parameters(self) -> tuple[Tensor, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class Slicing:
    """How a loss is run over positions, whose log-probabilities are made a slice at a time.

    Args:
        memory: MiB that a loss may hold at once for log-probabilities, at least 1; None is 304 on the CPU, and on a GPU
            a 32nd of its memory, at most 2048.
        compile: Whether `torch.compile` makes kernels of a slice's loss, which takes a minute at the start.

    Raises:
        ConfigError: If `memory` is below 1.
    """

    memory: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.memory is not None and self.memory < 1:
            raise ConfigError(f"Slicing.memory must be at least 1 MiB, got {self.memory}.")


@dataclass(frozen=True)
class Scores:
    """What one model says about the N response positions of a batch.

    Log-probabilities are made a slice at a time: `[N, V]` exists only if somebody asks for all of it.

    A teacher that kept only its K most likely tokens has `support`: columns 0 to K−1 of its log-probabilities stand for
    those tokens and column K for all others together. The student's are gathered into the same K+1 columns, so that a
    divergence compares like with like, and both sum to 1.

    Args:
        hidden: `[N, D]` last hidden states, final norm applied.
        head: Makes logits `[n, V]` of hidden states `[n, D]`, cut to the vocabulary that both models share.
        vocab: V, the number of tokens that the head scores; K+1 with a support.
        support: `[N, K]` token ids of the columns, or None where column v is token v.
        own: `[N]` log-probability of each position's own token; given with a support, which may not contain it.
        slicing: How a loss is run over them.
    """

    hidden: Tensor
    head: Head
    vocab: int
    support: Tensor | None = None
    own: Tensor | None = None
    slicing: Slicing = field(default_factory=Slicing)

    @classmethod
    def from_logits(cls, logits: Tensor) -> "Scores":
        """Scores that stand for `[N, V]` logits as they are."""
        return cls(logits, LogitsHead(), logits.shape[-1])

    @classmethod
    def from_top_k(cls, log_probs: Tensor, support: Tensor, own: Tensor) -> "Scores":
        """Scores of a teacher that kept its K most likely tokens.

        Args:
            log_probs: `[N, K+1]` log-probabilities of the tokens in `support`, then of all others together.
            support: `[N, K]` token ids.
            own: `[N]` log-probability of each position's own token.
        """
        return cls(log_probs, LogitsHead(), log_probs.shape[-1], support, own)

    def log_probs(self, part: slice = slice(None), temperature: float = 1.0) -> Tensor:
        """Log-probabilities `[n, V]` of the positions in `part`, in float32 (float64 for float64 logits).

        Raises:
            ConfigError: If a teacher that kept only its most likely tokens is asked for another temperature than 1.
        """
        if self.support is not None and temperature != 1.0:
            raise ConfigError(
                f"A temperature of {temperature} needs the teacher's whole distribution, and its cache keeps the "
                f"{self.support.shape[-1]} most likely tokens: use temperature 1, or a cache that keeps hidden states."
            )
        return log_softmax(self.head(self.hidden[part]), temperature)

    def select(self, index: Tensor) -> "Scores":
        """The scores of the positions `index` `[n]`."""
        support, own = (None if kept is None else kept[index] for kept in (self.support, self.own))
        return replace(self, hidden=self.hidden[index], support=support, own=own)


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax of `[n, V]` logits over V at `temperature`, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


@dataclass(frozen=True)
class LossOutput:
    """A loss, before any mean is taken.

    Args:
        total: `[]` or `[C]` nats summed over units, one number per component.
        units: `[]` or `[C]` float64 number of units of each component, which the global batch's mean divides by once.
        metrics: Detached values, a scalar or one per row or position. Their names don't depend on the batch.
    """

    total: Tensor
    units: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """A metric over one optimizer step and all ranks: 0-dim tensors."""

    mean: Tensor
    min: Tensor
    max: Tensor
    count: Tensor


@dataclass(frozen=True)
class Progress:
    """Where training stands.

    Args:
        step: Optimizer steps done.
        total: Optimizer steps of the whole run; where a budget ends it, as many as it will come to at this rate.
    """

    step: int
    total: float

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(self.step / self.total, 1.0) if self.total > 0 else 0.0
