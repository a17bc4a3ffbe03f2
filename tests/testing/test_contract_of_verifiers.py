"""The contract finds each kind of broken verifier, and says which promise it breaks."""

import random
import re

import pytest

from distillkit.testing import VerifierContract, check_verifier
from distillkit.verifiers.length import TargetLength


class Sound(TargetLength):
    """A sound verifier that a broken one differs from in one method."""


class OneForAll(Sound):
    def verify(self, prompts, responses):
        return super().verify(prompts, responses)[:1]


class NotANumber(Sound):
    def verify(self, prompts, responses):
        return [float("nan") if not response.text else 1.0 for response in responses]


class NoNumber(Sound):
    def verify(self, prompts, responses):
        return [None] * len(responses)


class Ranks(Sound):
    def verify(self, prompts, responses):
        scores = super().verify(prompts, responses)
        return [float(sorted(scores).index(score)) for score in scores]


class ByPlace(Sound):
    def verify(self, prompts, responses):
        return [
            float(place) if len(responses) > 1 else float(responses[0].prompt_id[1:]) for place in range(len(responses))
        ]


class Guesses(Sound):
    def verify(self, prompts, responses):
        return [hash((response.token_ids, random.random())) for response in responses]


class Tires(Sound):
    """Its numbers fall with each response that it has judged, which no order within a call shows."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def verify(self, prompts, responses):
        self.calls += len(responses) == 8
        return [-float(self.calls // 3)] * len(responses)


class TalksToItself(Sound):
    def verify(self, prompts, responses):
        return super().verify(prompts, responses) or [0.0]


BROKEN = {
    OneForAll: "8 responses got 1 scores",
    NotANumber: "a score must be a finite number, got",
    NoNumber: "a score must be a finite number, got",
    Ranks: "a response must get the same score when it is verified alone",
    ByPlace: "responses must get the same scores in any order",
    Guesses: "a response must get the same score when it is verified (again|alone)",
    Tires: "a response must get the same score when it is verified again",
    TalksToItself: "an empty list of responses must get an empty list of scores",
}


def test_a_sound_verifier_passes():
    check_verifier(Sound())


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_verifier_is_found(broken):
    with pytest.raises(AssertionError, match=rf"^{broken.__name__} breaks its contract: .*({BROKEN[broken]})"):
        check_verifier(broken())


def test_a_contract_without_a_verifier_says_what_is_missing():
    with pytest.raises(NotImplementedError, match=re.escape("write make()")):
        VerifierContract().test_each_response_gets_a_finite_score()
