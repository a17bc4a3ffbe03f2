"""The contract finds each kind of broken generator, and says which promise it breaks."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

from distillkit.testing import GeneratorContract, SeededGenerator, check_generator

FIRST = GeneratorContract().prompts()[0].id


class Sound(SeededGenerator):
    """A sound generator that a broken one differs from in one method: what it writes depends on a weight."""

    needs_models = None

    def __init__(self):
        super().__init__("")

    def refresh(self, model, tokenizer):
        self.writer = str(next(model.parameters()).flatten()[0].item())

    def generate(self, prompts, sampling):
        full = sampling.max_new_tokens
        found = super().generate(prompts, sampling)
        return [replace(own, finish="length" if len(own.token_ids) == full else "stop") for own in found]


class Altered(Sound):
    """One whose responses are altered afterwards."""

    def generate(self, prompts, sampling):
        return [self.alter(own) for own in super().generate(prompts, sampling)]


class SkipsTheFirst(Sound):
    def generate(self, prompts, sampling):
        return super().generate(prompts, sampling)[1:]


class WritesNothing(Altered):
    def alter(self, own):
        return replace(own, token_ids=(), log_probs=())


class WritesTooMuch(Altered):
    def alter(self, own):
        return replace(own, token_ids=own.token_ids * 7, log_probs=own.log_probs * 7)


class AlwaysAnswers(Sound):
    def generate(self, prompts, sampling):
        return super().generate(prompts, sampling) or ["nothing"]


class EndsOtherwise(Altered):
    def alter(self, own):
        return replace(own, finish="eos")


class SaysItWasCut(Altered):
    def alter(self, own):
        return replace(own, finish="length")


class ForgetsALogProb(Altered):
    def alter(self, own):
        return replace(own, log_probs=(*own.log_probs, -1.0))


class GivesProbabilities(Altered):
    def alter(self, own):
        return replace(own, log_probs=tuple(2.0 for _ in own.log_probs))


class ReadsItsNeighbours(Altered):
    def generate(self, prompts, sampling):
        self.beside = len(prompts)
        return super().generate(prompts, sampling)

    def alter(self, own):
        return replace(own, text=f"{self.beside}")


class ReadsItsPlace(Sound):
    def generate(self, prompts, sampling):
        found = super().generate(prompts, sampling)
        first = prompts[0].id if len(prompts) > 1 else FIRST
        return [replace(own, text=first) for own in found]


class ReadsTheGlobalState(Altered):
    def alter(self, own):
        return replace(own, text=f"{torch.initial_seed()}")


class KeepsItsFirstWeights(Sound):
    def refresh(self, model, tokenizer):
        if not self.writer:
            super().refresh(model, tokenizer)


class MixesWeights(Sound):
    def refresh(self, model, tokenizer):
        before = self.writer
        super().refresh(model, tokenizer)
        self.writer = before + self.writer


class IsNamedAnew(Sound):
    numbers = itertools.count()

    def identity(self):
        return str(next(self.numbers))


class CountsNothing(Sound):
    def metrics(self):
        return {"acceptance": float("nan")}


BROKEN = {
    SkipsTheFirst: "each prompt must get one response, in the order of the prompts",
    WritesNothing: "responses must have 1 to 6 tokens",
    WritesTooMuch: "responses must have 1 to 6 tokens",
    AlwaysAnswers: "an empty list of prompts must get an empty list of responses",
    EndsOtherwise: "finish must be stop or length, got 'eos'",
    SaysItWasCut: r"finish must be stop for a response of \d tokens: 6 are allowed",
    ForgetsALogProb: r"\d tokens have \d log-probabilities",
    GivesProbabilities: "log-probabilities must be finite and at most 0",
    ReadsItsNeighbours: "a prompt must get the same response alone and in a batch",
    ReadsItsPlace: "prompts must get the same responses in any order",
    ReadsTheGlobalState: "the same prompts must always get the same responses",
    KeepsItsFirstWeights: "after refresh it must generate with the new weights",
    MixesWeights: "refreshed with its first weights again, it must generate the same responses",
    IsNamedAnew: r"identity\(\) must be equal for two identically constructed generators",
    CountsNothing: r"metrics\(\) must be finite numbers",
}


def test_a_sound_generator_passes():
    check_generator(Sound)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_generator_is_found(broken):
    with pytest.raises(AssertionError, match=rf"^{broken.__name__} breaks its contract: .*({BROKEN[broken]})"):
        check_generator(broken)


def test_a_contract_without_a_generator_says_what_is_missing():
    with pytest.raises(NotImplementedError, match=re.escape("write make()")):
        GeneratorContract().test_answers_each_prompt_in_order()
