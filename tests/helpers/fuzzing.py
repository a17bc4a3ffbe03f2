"""Fuzzing: seeded inputs, each of which must be accepted or refused with one readable `DistillKitError`.

`DISTILLKIT_FUZZ=5000` runs so many inputs per fuzzer instead of 60, `DISTILLKIT_FUZZ=5000:9000` those numbered so, and
`DISTILLKIT_FUZZ_ONLY=137` that one alone. The number of all inputs is the last line of pytest's report.
"""

import os
import random
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from distillkit.errors import DistillKitError

Input = TypeVar("Input")

DEFAULT_COUNT = 200
TOTALS: Counter[str] = Counter()
"""Inputs of this process by outcome: `accepted`, `refused`, and `failed` for each input that did neither."""
LONGEST_MESSAGE = 2000
"""Characters of an error message; a longer one repeats its input."""


@dataclass
class Outcome:
    """Counts of the inputs of one fuzzer, and the first failure of each kind.

    Args:
        accepted: Inputs that passed.
        refused: Inputs refused with a `DistillKitError`, by the type of the error.
        failures: The first failure of each kind, by its exception and location.
    """

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)


def fuzz(
    name: str,
    make: Callable[[random.Random], Input],
    run: Callable[[Input], object],
    seconds: float = 5.0,
) -> Outcome:
    """Runs seeded inputs and fails with the first of each kind of failure, all kinds at once.

    A failure is any exception that is not a `DistillKitError`, an error message that a terminal can't show as one line,
    and an input that takes too long. Input n depends on the fuzzer's name and n alone, so that it can be repeated.

    Args:
        name: Name of the fuzzer.
        make: Makes an input from a random generator.
        run: Passes the input to the code under test.
        seconds: Longest time for one input.

    Returns:
        The counts, for a test that requires some inputs to be accepted and some to be refused.

    Raises:
        AssertionError: If an input failed.
    """
    __tracebackhide__ = True
    outcome = Outcome()
    for index in indices():
        value = make(random.Random(f"{name}/{index}"))
        try:
            with _time_limit(seconds):
                run(value)
            outcome.accepted += 1
            TOTALS["accepted"] += 1
        except DistillKitError as error:
            outcome.refused[type(error).__name__] += 1
            TOTALS["refused"] += 1
            if (problem := _unreadable(str(error))) is not None:
                _record(outcome, f"a message {problem}", name, index, value, error)
        except Exception as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "distillkit" in frame.filename]
            location = f"{frames[-1].filename.rpartition('distillkit/')[2]}:{frames[-1].lineno}" if frames else "?"
            _record(outcome, f"{type(error).__name__} at {location}", name, index, value, error)
    assert not outcome.failures, "\n".join(outcome.failures.values())
    return outcome


def indices() -> Iterator[int]:
    """The numbers of the inputs to run, as the environment says."""
    only = os.environ.get("DISTILLKIT_FUZZ_ONLY")
    if only is not None:
        return iter((int(only),))
    first, _, last = os.environ.get("DISTILLKIT_FUZZ", str(DEFAULT_COUNT)).rpartition(":")
    return iter(range(int(first or 0), int(last)))


def _record(outcome: Outcome, kind: str, name: str, index: int, value: object, error: Exception) -> None:
    message = f"{name}, DISTILLKIT_FUZZ_ONLY={index}: {kind}: {str(error)[:300]!r} for {value!r:.300}"
    outcome.failures.setdefault(kind, message)
    TOTALS["failed"] += 1


def _unreadable(message: str) -> str | None:
    """The reason for which a terminal can't show a message as one line; None if it can."""
    if not message.strip():
        return "is empty"
    if len(message) > LONGEST_MESSAGE:
        return f"has more than {LONGEST_MESSAGE} characters"
    if not all(character.isprintable() for character in message):
        return "has control characters, line breaks or lone surrogates"
    return None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread after this time."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ── inputs ────────────────────────────────────────────────────────────────────────────────────────────────────────────

BYTES = (
    b"\x00",
    b"\xff",
    b"\n",
    b"\r\n",
    b'"',
    b"{",
    b"[",
    b"}",
    b"]",
    b",",
    b":",
    b"null",
    b"\\ud83d",
    b"\xed\xa0\xbd",
)
TEXTS = (
    "",
    " ",
    "\n",
    "\x00",
    "\x1b[31m",
    "[/b]",
    "\ud83d",
    "é",
    "e\u0301",
    "\u202e",
    "0",
    "-1",
    "1e999",
    "9" * 5000,
    "a" * 300,
)
NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, float("nan"), float("inf"), 1e308)


def mutated(data: bytes, rng: random.Random, most: int = 4) -> bytes:
    """A copy of some bytes with 1 to `most` changes: bits flipped, pieces cut, doubled, moved or put in."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        start = rng.randint(0, max(len(changed) - 1, 0))
        stop = min(start + rng.choice((1, 1, 2, 4, 8, 64)), len(changed))
        piece = bytes(changed[start:stop])
        match rng.randrange(6):
            case 0 if piece:
                changed[start] ^= 1 << rng.randrange(8)
            case 1:
                del changed[start:stop]
            case 2:
                changed[start:start] = piece
            case 3:
                changed[start:stop] = rng.randbytes(len(piece))
            case 4:
                changed[start:start] = rng.choice(BYTES)
            case _:
                del changed[start : start + rng.choice((1, 8, len(changed)))]
    return bytes(changed)


def any_text(rng: random.Random, fragments: tuple[str, ...] = TEXTS, most: int = 8) -> str:
    """A text of up to `most` fragments."""
    return "".join(rng.choice(fragments) for _ in range(rng.randint(0, most)))


def any_value(rng: random.Random, depth: int = 3) -> object:
    """A value such as JSON can hold: null, a truth value, a number, a text, or a list or object of values."""
    match rng.randrange(8 if depth else 5):
        case 0:
            return rng.choice((None, True, False))
        case 1:
            return rng.choice(NUMBERS)
        case 2 | 3 | 4:
            return any_text(rng, most=3)
        case 5:
            return [any_value(rng, depth - 1) for _ in range(rng.randrange(4))]
        case _:
            return {any_text(rng, most=2): any_value(rng, depth - 1) for _ in range(rng.randrange(4))}
