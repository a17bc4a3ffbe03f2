"""The contract finds each kind of broken filter, and says which promise it breaks."""

import random
import re

import pytest

from distillkit.curators.filters import TooLong
from distillkit.testing import FilterContract, check_filter


class Sound(TooLong):
    """A sound filter that a broken one differs from in one method."""

    def __init__(self):
        super().__init__(max_tokens=10)


class Wordless(Sound):
    reason = " "


class NoBool(Sound):
    def refuses(self, row):
        return sum(row.response_mask)


class Remembers(Sound):
    """Refuses each row after the first."""

    seen = 0

    def refuses(self, row):
        self.seen += 1
        return self.seen > 1


class Guesses(Sound):
    def refuses(self, row):
        return random.random() < 0.5


BROKEN = {
    Wordless: "reason must be a text, got ' '",
    NoBool: "refuses must return a bool, got [8, 1",
    Remembers: "a row must be judged the same",
    Guesses: "a row must be judged the same",
}


def test_a_sound_filter_passes():
    check_filter(Sound())


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_filter_is_found(broken):
    with pytest.raises(AssertionError, match=rf"^{broken.__name__} breaks its contract: {re.escape(BROKEN[broken])}"):
        check_filter(broken())


def test_a_contract_without_a_filter_says_what_is_missing():
    with pytest.raises(NotImplementedError, match=re.escape("write make()")):
        FilterContract().test_is_deterministic()
