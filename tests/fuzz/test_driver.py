"""The fuzzers' driver: counts, repeats and reports."""

import random
import time

import pytest

from distillkit.errors import DataError, DistillKitError
from helpers.fuzzing import any_value, fuzz, mutated


def number(rng):
    return rng.randrange(100)


def test_inputs_are_counted_as_accepted_or_refused_and_are_the_same_each_time(monkeypatch):
    monkeypatch.setenv("DISTILLKIT_FUZZ", "50")
    seen = []

    def refuse_odd(value):
        seen.append(value)
        if value % 2:
            raise DataError("odd")

    outcome = fuzz("numbers", number, refuse_odd)
    assert outcome.accepted + outcome.refused["DataError"] == 50
    assert outcome.refused["DataError"] == sum(value % 2 for value in seen) > 0
    first, seen = seen, []
    fuzz("numbers", number, refuse_odd)
    assert seen == first
    seen = []
    monkeypatch.setenv("DISTILLKIT_FUZZ_ONLY", "7")
    fuzz("numbers", number, refuse_odd)
    assert seen == [first[7]]


def test_each_kind_of_failure_is_reported_once_with_the_number_that_repeats_it(monkeypatch):
    monkeypatch.setenv("DISTILLKIT_FUZZ", "60")

    def fail(value):
        if value % 3 == 0:
            raise KeyError(value)
        if value % 3 == 1:
            raise ValueError(value)

    with pytest.raises(AssertionError) as failure:
        fuzz("numbers", number, fail)
    lines = str(failure.value).splitlines()
    assert len([line for line in lines if "KeyError" in line]) == 1
    assert len([line for line in lines if "ValueError" in line]) == 1
    assert all("numbers, DISTILLKIT_FUZZ_ONLY=" in line for line in lines[:2])


@pytest.mark.parametrize("message", ["", "two\nlines", "\x1b[31mred", "\ud83d", "long" * 600])
def test_a_message_that_is_no_readable_line_is_a_failure(message, monkeypatch):
    monkeypatch.setenv("DISTILLKIT_FUZZ", "1")

    class RawError(DistillKitError):
        __str__ = Exception.__str__  # the base class makes a readable line of it

    def refuse(value):
        raise RawError(message)

    with pytest.raises(AssertionError, match=r"a message (is empty|has)"):
        fuzz("numbers", number, refuse)


def test_an_input_that_takes_too_long_is_a_failure(monkeypatch):
    monkeypatch.setenv("DISTILLKIT_FUZZ", "1")
    with pytest.raises(AssertionError, match=r"TimeoutError.*longer than 0\.05 s"):
        fuzz("numbers", number, lambda value: time.sleep(5), seconds=0.05)


def test_mutations_and_values_differ():
    rng = random.Random(0)
    assert len({mutated(b"some bytes to change", rng) for _ in range(50)}) > 40
    assert mutated(b"", rng) is not None
    assert len({repr(any_value(rng)) for _ in range(50)}) > 25
