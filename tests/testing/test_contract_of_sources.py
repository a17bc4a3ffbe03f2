"""The contract finds each kind of broken source, and says which promise it breaks."""

import random
import re

import pytest

from distillkit.interfaces import PromptSource
from distillkit.testing import SourceContract, check_source
from distillkit.types import Record


def turns(*roles, text="Hello."):
    return tuple({"role": role, "content": text} for role in roles)


class Sound(PromptSource):
    """A sound source that a broken one differs from in one respect."""

    path = "greetings"
    conversations = (turns("user"), turns("system", "user", "assistant"), turns("user", "assistant", "user"))

    def records(self):
        return [Record(messages, f"greetings {index}") for index, messages in enumerate(self.conversations)]


class Nameless(Sound):
    path = ""


class Nothing(Sound):
    conversations = ()


class Unanswerable(Sound):
    conversations = (turns("system"),)


class Doubled(Sound):
    conversations = (turns("user", "user"),)


class OutOfTurn(Sound):
    conversations = (turns("assistant", "user"),)


class Blank(Sound):
    conversations = (turns("user", text=" "),)


class NoText(Sound):
    conversations = (turns("user", text=["Hello."]),)


class OneOrigin(Sound):
    def records(self):
        return [Record(messages, "greetings") for messages in self.conversations]


class Shuffled(Sound):
    conversations = tuple(turns("user", text=f"Hello {index}.") for index in range(20))

    def records(self):
        records = super().records()
        random.shuffle(records)
        return records


BROKEN = {
    Nameless: "path must be a text, got ''",
    Nothing: "records must not be empty",
    Unanswerable: "user and assistant must alternate, got system",
    Doubled: "user and assistant must alternate, got user, user",
    OutOfTurn: "user and assistant must alternate, got assistant, user",
    Blank: "a turn must not be empty",
    NoText: "a turn must not be empty",
    OneOrigin: "origins must differ",
    Shuffled: "a resumed run must read the same records in the same order",
}


def test_a_sound_source_passes():
    check_source(Sound())


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_source_is_found(broken):
    with pytest.raises(AssertionError, match=rf"^{broken.__name__} breaks its contract: .*{re.escape(BROKEN[broken])}"):
        check_source(broken())


def test_a_contract_without_a_source_says_what_is_missing():
    with pytest.raises(NotImplementedError, match=re.escape("write make()")):
        SourceContract().test_is_deterministic()
