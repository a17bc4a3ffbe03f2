"""Encoding of many records at once: which of them become prompts, and which are left out and why."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Literal, NamedTuple

from distillkit.data.chat import encode_steps, require_chat_template
from distillkit.data.encoding_worker import encode_in_processes
from distillkit.data.records import OnError, refusal
from distillkit.data.template_spans import Ids, Steps, tokenise
from distillkit.errors import DataError
from distillkit.types import Prompt, Record, Tokenizer

Overlong = Literal["error", "drop"]

BATCH = 512
"""Records whose texts are tokenised at once."""

PROCESSES_FROM = 20_000
"""Records from which processes encode them, which take seconds to start."""
MIN_PROCESSES, MAX_PROCESSES = 4, 16
"""Fewer gain nothing, since the tokenizer uses all cores by itself; of more, this process can't keep up."""


@dataclass(frozen=True)
class EncodeReport:
    """Counts of the records that were encoded and left out.

    Args:
        num_prompts: Number of encoded prompts.
        duplicates: Records left out because an earlier one has the same prompt, each with its origin and that of the
            earlier one; their responses are left out too.
        overlong: Records left out because they are longer than `max_length`, each with its origin and length.
        unended: Encoded responses without an end-of-turn token: the student can't learn to stop from them.
        problems: Errors of the records left out because they can't be encoded.
        inner_ends: Encoded last responses with an end-of-turn token before their end, as a text that quotes one has.
        pairs: Encoded prompts with a worse response too, as preference data has.
    """

    num_prompts: int
    duplicates: tuple[str, ...]
    overlong: tuple[str, ...]
    unended: int
    problems: tuple[str, ...] = ()
    inner_ends: int = 0
    pairs: int = 0

    @property
    def left_out(self) -> tuple[str, ...]:
        """All records left out, each with its origin and the reason."""
        return self.problems + self.overlong + self.duplicates

    def __str__(self) -> str:
        notes = {
            "left out as duplicates": len(self.duplicates),
            "left out as longer than data.max_length": len(self.overlong),
            "left out since they can't be encoded": len(self.problems),
            "responses without an end-of-turn token (the student can't learn to stop from them)": self.unended,
            "responses whose text has an end-of-turn token (the student learns to go on after it)": self.inner_ends,
            "with a rejected response, which only DataPairs trains on": self.pairs,
        }
        return "; ".join(
            [f"{self.num_prompts} prompts", *(f"{count} {note}" for note, count in notes.items() if count)]
        )


class Facts(NamedTuple):
    """An encoded record, as far as it decides on which ones are used.

    Args:
        id: Id of the prompt.
        response: Hash of the response's tokens and their mask; empty without a response.
        length: Tokens of the longest of its conversations.
        ended: Whether the response ends with an end of turn, or there is none.
        inner_end: Whether the response has an end of turn before its end.
        paired: Whether it has a worse response too.
        problem: What is wrong with the record; the rest is empty then.
    """

    id: str
    response: str
    length: int
    ended: bool
    inner_end: bool
    paired: bool = False
    problem: str = ""


def encode_batches(
    records: Iterable[Record], tokenizer: Tokenizer, eos_ids: Ids, chat: bool, system: str | None
) -> Iterator[list[Prompt | DataError]]:
    """Tokenises records in batches; a record that can't be encoded gives the error that says why.

    Args:
        records: The conversations.
        tokenizer: A transformers tokenizer.
        eos_ids: Token ids that end a turn.
        chat: Whether prompts go through the chat template.
        system: System message for the records that have none; None adds none.

    Raises:
        ModelError: If the tokenizer lacks the chat template or the end-of-turn token that is needed.
    """
    require_chat_template(tokenizer, chat)
    encode = partial(encode_batch, tokenizer=tokenizer, eos_ids=eos_ids, chat=chat, system=system)
    remaining = iter(records)
    batches = iter(lambda: list(islice(remaining, BATCH)), [])
    first = list(islice(batches, -(-PROCESSES_FROM // BATCH)))
    num_processes = min(_num_cores(), MAX_PROCESSES)
    if len(first) * BATCH < PROCESSES_FROM or num_processes < MIN_PROCESSES:
        yield from map(encode, chain(first, batches))
    else:
        yield from encode_in_processes(encode, chain(first, batches), num_processes)


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_batch(
    records: Sequence[Record], tokenizer: Tokenizer, eos_ids: Ids, chat: bool, system: str | None
) -> list[Prompt | DataError]:
    """Tokenises one batch of records, see `encode_batches`.

    Args:
        records: The conversations.
        tokenizer: A transformers tokenizer.
        eos_ids: Token ids that end a turn.
        chat: Whether prompts go through the chat template.
        system: System message for the records that have none; None adds none.
    """
    return _completed([encode_steps(record, tokenizer, eos_ids, chat, system) for record in records], tokenizer)


def _completed(computations: Sequence[Steps[Prompt]], tokenizer: Tokenizer) -> list[Prompt | DataError]:
    """The results of some computations, which are tokenised together."""
    results: dict[int, Prompt | DataError] = {}
    tokens: dict[int, list[Ids] | None] = dict.fromkeys(range(len(computations)))
    while tokens:
        texts: dict[int, list[str]] = {}
        for index, ids in tokens.items():
            try:
                texts[index] = next(computations[index]) if ids is None else computations[index].send(ids)
            except StopIteration as end:
                results[index] = end.value
            except DataError as error:
                results[index] = error
        all_ids = iter(tokenise(tokenizer, [text for group in texts.values() for text in group]) if texts else ())
        tokens = {index: [next(all_ids) for _ in group] for index, group in texts.items()}
    return [results[index] for index in range(len(computations))]


def facts(result: Prompt | DataError, eos_ids: Ids) -> Facts:
    """The facts of an encoded record.

    Args:
        result: The prompt, or why there is none.
        eos_ids: Token ids that end a turn.
    """
    if isinstance(result, DataError):
        return Facts("", "", 0, True, False, problem=str(result))
    ids = result.reference_ids
    content = f"{result.id} {ids} {result.reference_mask}" + (f" {result.rejected_ids}" if result.rejected_ids else "")
    response = hashlib.sha256(content.encode()).hexdigest()[:16] if ids else ""
    length = max(len(result.input_ids), len(ids), len(result.rejected_ids))
    inner = not frozenset(eos_ids).isdisjoint(ids[len(result.input_ids) : -1])
    return Facts(result.id, response, length, not ids or ids[-1] in eos_ids, inner, bool(result.rejected_ids))


def choose(
    encoded: Iterable[Facts],
    origins: Sequence[str],
    max_length: int,
    overlong: Overlong,
    responses: Literal["first", "all"],
    on_error: OnError,
) -> tuple[dict[int, str], EncodeReport]:
    """The records that become prompts, by their index, with the prompt's id, and the counts of those left out.

    Args:
        encoded: The facts of each record, in their order.
        origins: Where each comes from.
        max_length: Largest number of tokens.
        overlong: Treatment of a longer one.
        responses: Records to use of those with the same prompt.
        on_error: Treatment of a record that can't be encoded.

    Raises:
        DataError: As `encode_all`.
    """
    chosen: dict[int, str] = {}
    first: dict[str, tuple[int, str]] = {}
    problems, duplicates, too_long = list[str](), list[str](), list[str]()
    unended = inner_ends = pairs = 0
    for index, (fact, origin) in enumerate(zip(encoded, origins, strict=True)):
        if fact.problem:
            problems.append(fact.problem)
            continue
        prompt_id = fact.id
        if responses == "all" and prompt_id in first and fact.response != first[prompt_id][1]:
            prompt_id = fact.response or hashlib.sha256(f"{prompt_id} () ()".encode()).hexdigest()[:16]
        if fact.length > max_length:
            too_long.append(f"{origin} has {fact.length} tokens, more than `data.max_length: {max_length}`")
        elif prompt_id in first:
            duplicates.append(f"{origin} has the same prompt as {origins[first[prompt_id][0]]}")
        else:
            first[prompt_id], chosen[index] = (index, fact.response), prompt_id
            unended, inner_ends, pairs = unended + (not fact.ended), inner_ends + fact.inner_end, pairs + fact.paired
    _refuse(problems, too_long, overlong, on_error, len(origins))
    left_out = tuple(duplicates), tuple(too_long), unended, tuple(problems)
    return chosen, EncodeReport(len(chosen), *left_out, inner_ends, pairs)


def _refuse(problems: list[str], too_long: list[str], overlong: Overlong, on_error: OnError, total: int) -> None:
    """Stops at records that can't be encoded, or are too long, unless they are to be left out."""
    if problems and on_error == "stop":
        raise refusal("data", problems, total)
    if too_long and overlong == "error":
        advice = "raise it, or set `data.overlong: drop` to leave such records out."
        raise refusal("data", [f"{problem}: {advice}" for problem in too_long], total)


def encode_all(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    eos_ids: Ids,
    chat: bool,
    system: str | None,
    max_length: int,
    overlong: Overlong,
    responses: Literal["first", "all"] = "first",
    on_error: OnError = "stop",
) -> tuple[list[Prompt], EncodeReport]:
    """Tokenises records and counts those that it leaves out.

    Args:
        records: The conversations, in their order.
        tokenizer: A transformers tokenizer.
        eos_ids: Token ids that end a turn.
        chat: Whether prompts go through the chat template.
        system: System message for the records that have none; None adds none.
        max_length: Largest number of tokens of a prompt, or of a prompt with its response.
        overlong: Treatment of a longer one: `error` stops, `drop` leaves it out and counts it.
        responses: Records to use of those with the same prompt: the first, or all that differ in their responses.
        on_error: Treatment of a record that can't be encoded: `stop` stops, `skip` leaves it out.

    Raises:
        DataError: If a record can't be encoded and `on_error` is `stop`, or is too long and `overlong` is `error`.
        ModelError: If the tokenizer lacks the chat template or the end-of-turn token that is needed.
    """
    records = list(records)
    batches = encode_batches(records, tokenizer, eos_ids, chat, system)
    results = [result for batch in batches for result in batch]
    origins = [record.origin for record in records]
    encoded = (facts(result, eos_ids) for result in results)
    chosen, report = choose(encoded, origins, max_length, overlong, responses, on_error)
    prompts = {index: result for index in chosen if isinstance(result := results[index], Prompt)}
    return [replace(prompt, id=chosen[index]) for index, prompt in prompts.items()], report
