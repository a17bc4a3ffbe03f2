from dataclasses import replace

import pytest

from distillkit.curators.paired import DataPairs, PairedCurator
from distillkit.curators.single import DatasetCurator, StudentCurator, TeacherCurator
from distillkit.data.collate import collate
from distillkit.errors import ConfigError, DataError
from distillkit.interfaces import Generator
from distillkit.losses.dpkd import DPKD
from distillkit.losses.token import side_of
from distillkit.types import Prompt, Prompts, Response, Row

T, F = True, False
PROMPTS = Prompts((Prompt("a", (), (5,), (5, 7), (F, T)), Prompt("b", (), (6, 6), (6, 6, 8), (F, F, T))), round=2)


class Scripted(Generator):
    """Answers every prompt with one token, and keeps the rounds that it was asked for."""

    def __init__(self, token):
        self.token, self.rounds = token, []

    def refresh(self, model, tokenizer):
        pass

    def generate(self, prompts, sampling):
        self.rounds.append(prompts.round)
        return [Response(prompt.id, (self.token,), "", "stop") for prompt in prompts]


@pytest.fixture
def generators():
    return {"teacher": Scripted(20), "student": Scripted(30)}


def test_the_two_rows_of_a_prompt_stand_together_the_chosen_one_first(generators):
    rows = PairedCurator().curate(PROMPTS, generators)
    assert rows == [
        Row((5, 20), (F, T), "teacher", "a"),
        Row((5, 30), (F, T), "student", "a"),
        Row((6, 6, 20), (F, F, T), "teacher", "b"),
        Row((6, 6, 30), (F, F, T), "student", "b"),
    ]
    batch = collate(rows, pad_id=0)
    assert batch.pair == (0, 0, 1, 1)
    assert batch.writer == ("teacher", "student") * 2


def test_by_default_the_teacher_writes_once_and_the_student_every_epoch(generators):
    curator = PairedCurator()
    curator.prepare(PROMPTS.at_round(0), generators)
    assert (generators["teacher"].rounds, generators["student"].rounds) == ([0], [])
    curator.curate(PROMPTS, generators)
    assert (generators["teacher"].rounds, generators["student"].rounds) == ([0, 0], [2])
    assert (curator.rounds, curator.writers) == ("epoch", {"teacher", "student"})


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (TeacherCurator(), StudentCurator(rounds={"every": 5}), 5),
        (TeacherCurator(rounds={"every": 5}), StudentCurator(rounds="once"), 5),
        (TeacherCurator(rounds="step"), StudentCurator(rounds={"every": 1}), 1),
        (TeacherCurator(rounds="epoch"), StudentCurator(rounds="epoch"), "epoch"),
        (TeacherCurator(), DatasetCurator(), "once"),
    ],
)
def test_a_round_lasts_as_long_as_that_of_the_part_that_writes_anew(chosen, rejected, expected):
    assert PairedCurator(chosen, rejected).rounds == expected


def test_parts_that_write_anew_at_different_times_are_refused():
    with pytest.raises(
        ConfigError, match=r"PairedCurator\.chosen and \.rejected must have the same rounds .* got 1 and e"
    ):
        PairedCurator(TeacherCurator(rounds="step"), StudentCurator(rounds="epoch"))


@pytest.mark.parametrize("place", ["chosen", "rejected"])
def test_the_data_can_be_one_side_and_then_every_prompt_needs_a_response(place, generators):
    curator = PairedCurator(**{place: DatasetCurator()})
    assert curator.needs_reference
    assert "dataset" in {row.writer for row in curator.curate(PROMPTS, generators)}
    with pytest.raises(DataError, match="without a response"):
        curator.curate(Prompts((Prompt("c", ({"role": "user", "content": "?"},), (5,)),)), generators)


def test_without_the_data_no_prompt_needs_a_response():
    assert not PairedCurator().needs_reference


PAIR = Prompt("a", (), (5,), (5, 7, 5, 8), (F, T, F, T), origin="a.jsonl line 3", rejected_ids=(5, 7, 5, 9, 9))


def test_pairs_of_the_data_are_a_better_and_a_worse_answer_to_one_prompt():
    rows = DataPairs().curate(Prompts((replace(PAIR, input_ids=(5, 7, 5)),)), {})
    assert rows == [
        Row((5, 7, 5, 8), (F, F, F, T), "dataset", "a"),
        Row((5, 7, 5, 9, 9), (F, F, F, T, T), "rejected", "a"),
    ]
    batch = collate(rows, pad_id=0)
    assert [side_of(writer) for writer in batch.writer] == ["teacher", "student"]
    assert DPKD().units(batch) == 1


def test_prompts_without_a_pair_are_refused_before_anything_is_trained_on():
    with pytest.raises(DataError, match=r"DataPairs needs two responses .* 2 of 3 have none, such as "):
        DataPairs().prepare(Prompts((PAIR, *PROMPTS)), {})
