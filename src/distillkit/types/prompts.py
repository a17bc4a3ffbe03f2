"""Prompts, sampling settings, and responses."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, overload

from distillkit.devices.seeds import resolve_seed
from distillkit.errors import ConfigError, check_range

Message = Mapping[str, str]
"""A chat message with `role` and `content`. Of a conversation with tools, the first has them as `tools`, an assistant's
may have `tool_calls`, both JSON in OpenAI's form, and a tool's its `name` and `tool_call_id`."""


@dataclass(frozen=True)
class Record:
    """One checked conversation.

    Args:
        messages: Turns that alternate between user and assistant, after a system turn if there is one. A last answer
            may have its reasoning as `reasoning_content`.
        origin: Source and location for error messages, such as `train.jsonl line 7`.
        untrained: Indices of the assistant's turns that are not trained on.
        ended: Whether the last answer is complete, or was cut at a limit (`finish: length`) and has no end of turn.
        rejected: The worse answer of a pair, of which the last turn is the better one; None without a pair.
    """

    messages: tuple[Message, ...]
    origin: str
    untrained: frozenset[int] = frozenset()
    ended: bool = True
    rejected: Message | None = None


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt.

    Args:
        id: Content hash of the messages: the same prompt has the same id in every run.
        messages: Chat messages up to and including the turn to be answered.
        input_ids: Token ids of the rendered messages, including the generation prompt.
        reference_ids: Token ids of the conversation with the data set's response; empty if there is none.
        reference_mask: True at each token of `reference_ids` in an assistant turn, including its end-of-turn token.
        reference: Text of the data set's response; None if there is none.
        origin: Where the prompt comes from, for messages, such as `train.jsonl line 17`; it is not compared.
        rejected_ids: Token ids of the conversation with the worse response of a pair; empty without a pair.
    """

    id: str
    messages: tuple[Message, ...]
    input_ids: tuple[int, ...]
    reference_ids: tuple[int, ...] = ()
    reference_mask: tuple[bool, ...] = ()
    reference: str | None = None
    origin: str = field(default="", compare=False)
    rejected_ids: tuple[int, ...] = ()

    @property
    def excerpt(self) -> str:
        """The start of the turn to be answered in quotes, for messages; empty without messages."""
        return repr(self.messages[-1]["content"][:60]) if self.messages else ""


Purpose = Literal["training", "reference"]


@dataclass(frozen=True)
class Prompts(Sequence[Prompt]):
    """The prompts of one round.

    Args:
        items: The prompts.
        round: Index of the round, from 0. It is part of every response's seed and provenance.
        purpose: The use of their responses, which the store notes: `training`, or `reference` for held-out prompts.
    """

    items: Sequence[Prompt]
    round: int = 0
    purpose: Purpose = "training"

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

    def at_round(self, round_index: int) -> "Prompts":
        """Returns the same prompts with another round index."""
        return replace(self, round=round_index)


SMALLEST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """Sampling settings, the same for all kinds of generators.

    Args:
        temperature: Divides the logits before the softmax: 0, which is greedy, or at least 1e-6.
        top_p: Nucleus sampling: probability mass of the most likely tokens that are sampled from, in (0, 1].
        top_k: Number of most likely tokens that are sampled from; 0 means all.
        max_new_tokens: Maximum length of a response in tokens, at least 1.
        seed: Base seed. The seed of each response is derived from it, the round and the prompt's id. None is the
            run's seed (`seed_everything`); greedy responses, which it does not change, have 0 then.

    Raises:
        ConfigError: If a value is outside its range.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is None:
            object.__setattr__(self, "seed", 0 if self.temperature == 0 else resolve_seed(None))
        check_range("Sampling.temperature", self.temperature, 0, note=" (0 is greedy)")
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise ConfigError(
                f"Sampling.temperature must be 0 (greedy) or at least {SMALLEST_TEMPERATURE}, got {self.temperature}: "
                "logits divided by less may be no numbers."
            )
        check_range("Sampling.top_p", self.top_p, 0, 1, closed="right")
        check_range("Sampling.top_k", self.top_k, 0, note=" (0 keeps every token)")
        check_range("Sampling.max_new_tokens", self.max_new_tokens, 1)

    def seed_of(self, round_index: int, prompt_id: str) -> int:
        """Returns the seed of one response: it depends on the base seed, round and prompt, not on the batch or rank."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{round_index}/{prompt_id}".encode()).digest()[:8]) >> 1


@dataclass(frozen=True)
class Response:
    """A generated response to one prompt.

    Args:
        prompt_id: Id of the answered prompt.
        token_ids: Token ids of the response, including the end-of-turn token if it was generated.
        text: The decoded response without special tokens.
        finish: `stop` if the model ended its turn, `length` if `max_new_tokens` was reached.
        log_probs: Log-probability of each token under the model that generated it (temperature 1, full vocabulary);
            empty if the backend does not report it. Not compared by `==`, as rounding depends on the batch.
        pending: Whether the response is still missing because another shard generates it; it has no tokens then.
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    text: str
    finish: Literal["stop", "length"]
    log_probs: tuple[float, ...] = field(default=(), compare=False)
    pending: bool = False
