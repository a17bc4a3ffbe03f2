"""The contract finds each kind of broken curator, and says which promise it breaks."""

import re

import pytest
import torch
from torch import nn

from distillkit.curators.single import StudentCurator
from distillkit.schedules import Constant
from distillkit.testing import CuratorContract, check_curator
from distillkit.types import Row


class Sound(StudentCurator):
    """A sound curator that a broken one differs from in one method."""


class NoRounds(Sound):
    @property
    def rounds(self):
        return "sometimes"


class ForgetsPrompt(Sound):
    def curate(self, prompts, generators):
        return super().curate(prompts, generators)[1:]


class GivesMoreAndMore(Sound):
    def curate(self, prompts, generators):
        return [row for row in super().curate(prompts, generators) for _ in range(prompts.round + 1)]


class Interleaves(Sound):
    def curate(self, prompts, generators):
        return list(super().curate(prompts, generators)) * 2


class ShortMask(Sound):
    def row(self, prompt, response):
        row = super().row(prompt, response)
        return Row(row.input_ids, row.response_mask[1:], row.writer, row.prompt_id)


class TrainsOnTheFirst(Sound):
    def row(self, prompt, response):
        row = super().row(prompt, response)
        return Row(row.input_ids, (True, *row.response_mask[1:]), row.writer, row.prompt_id)


class LosesThePrompt(Sound):
    def row(self, prompt, response):
        return Row((5, 6), (False, True), "student", prompt.id)


class AnswersStrangers(Sound):
    def row(self, prompt, response):
        row = super().row(prompt, response)
        return Row(row.input_ids, row.response_mask, row.writer, "stranger")


class Random(Sound):
    def curate(self, prompts, generators):
        rows = list(super().curate(prompts, generators))
        place = int(torch.randint(len(rows), ()))
        return [Row(row.input_ids, row.response_mask, f"{place}", row.prompt_id) for row in rows]


class CountsItself(Sound):
    calls = 0

    def curate(self, prompts, generators):
        self.calls += 1
        rows = super().curate(prompts, generators)
        return [Row(row.input_ids, row.response_mask, f"{self.calls}", row.prompt_id) for row in rows]


class Forgetful(Sound):
    """Its rows depend on the rounds that it has seen, which its checkpoint does not hold."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def curate(self, prompts, generators):
        self.seen.add(prompts.round)
        rows = super().curate(prompts, generators)
        return [Row(row.input_ids, row.response_mask, f"{len(self.seen)}", row.prompt_id) for row in rows]


class HidesASchedule(Sound):
    def __init__(self):
        super().__init__()
        self.shares = nn.ModuleList([Constant(0.5)])


BROKEN = {
    HidesASchedule: r"schedules\(\) must name each schedule for the log, it leaves out \['shares.0'\]",
    NoRounds: "rounds must be once, epoch or a number of steps from 1, got 'sometimes'",
    ForgetsPrompt: "12 prompts got 11 rows",
    GivesMoreAndMore: "the number of rows per prompt must not change",
    Interleaves: "the rows of a prompt must be adjacent",
    ShortMask: "a mask must be as long as the tokens",
    TrainsOnTheFirst: "must not train on its first token",
    LosesThePrompt: "a row must begin with its prompt's tokens",
    AnswersStrangers: "a row has prompt stranger, which is not in the run",
    Random: "two copies must return the same rows|a round that is curated again must return the same rows",
    CountsItself: "a round that is curated again must return the same rows",
    Forgetful: "resumed within round 1, it must return the same rows",
}


def test_a_sound_curator_passes():
    check_curator(Sound())


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_curator_is_found(broken):
    with pytest.raises(AssertionError, match=rf"^{broken.__name__} breaks its contract: .*({BROKEN[broken]})"):
        check_curator(broken())


def test_a_contract_without_a_curator_says_what_is_missing():
    with pytest.raises(NotImplementedError, match=re.escape("write make()")):
        CuratorContract().test_rounds_is_valid()
