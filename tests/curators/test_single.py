import pytest

from distillkit.curators.single import DatasetCurator, StudentCurator, TeacherCurator
from distillkit.errors import ConfigError, DataError
from distillkit.interfaces import Generator
from distillkit.types import Prompt, Prompts, Response, Row, Sampling

T, F = True, False
HELLO = ({"role": "user", "content": "Hello there"},)
PROMPTS = Prompts(
    (
        Prompt("a", HELLO, (5, 6), (5, 6, 7, 1), (F, F, T, T)),
        Prompt("b", HELLO, (8, 9, 10), (8, 2, 10, 1, 9), (F, T, F, T, T)),  # a conversation of two turns
    ),
    round=3,
)


class Scripted(Generator):
    """Answers prompt a with one token and b with two, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def refresh(self, model, tokenizer):
        pass

    def generate(self, prompts, sampling):
        self.asked.append(([prompt.id for prompt in prompts], prompts.round, sampling))
        tokens = {"a": (20,), "b": (21, 1)}
        return [Response(prompt.id, tokens[prompt.id], "", "stop") for prompt in prompts]


def test_the_data_gives_its_own_responses_with_their_masks():
    assert list(DatasetCurator().curate(PROMPTS, {})) == [
        Row((5, 6, 7, 1), (F, F, T, T), "dataset", "a"),
        Row((8, 2, 10, 1, 9), (F, T, F, T, T), "dataset", "b"),
    ]


def test_the_data_is_asked_once_and_asks_no_model():
    curator = DatasetCurator()
    assert (curator.rounds, curator.writers, curator.needs_reference) == ("once", frozenset(), True)


def test_a_prompt_without_a_response_is_an_error_where_the_data_has_to_answer():
    prompts = Prompts((*PROMPTS.items, Prompt("c", HELLO, (5,))))
    with pytest.raises(DataError, match=r"without a response \('Hello there'\): give the data a response column"):
        DatasetCurator().curate(prompts, {})


@pytest.mark.parametrize(("make", "writer"), [(TeacherCurator, "teacher"), (StudentCurator, "student")])
def test_a_model_answers_after_each_prompt_and_only_its_answer_is_trained_on(make, writer):
    sampling, generator = Sampling(temperature=0.3), Scripted()
    curator = make(sampling, "epoch")
    assert list(curator.curate(PROMPTS, {writer: generator})) == [
        Row((5, 6, 20), (F, F, T), writer, "a"),
        Row((8, 9, 10, 21, 1), (F, F, F, T, T), writer, "b"),
    ]
    assert generator.asked == [(["a", "b"], 3, sampling)]
    assert (curator.writers, curator.needs_reference) == (frozenset({writer}), False)


def test_what_is_written_once_belongs_to_round_0_whatever_round_asks():
    generator = Scripted()
    TeacherCurator(rounds="once").curate(PROMPTS, {"teacher": generator})
    assert [number for _, number, _ in generator.asked] == [0]


@pytest.mark.parametrize(("rounds", "calls"), [("once", 1), ("epoch", 0), ("step", 0), ({"every": 4}, 0)])
def test_only_what_is_written_once_is_prepared(rounds, calls):
    generator = Scripted()
    StudentCurator(rounds=rounds).prepare(PROMPTS, {"student": generator})
    assert len(generator.asked) == calls


@pytest.mark.parametrize(
    ("rounds", "expected"), [("once", "once"), ("epoch", "epoch"), ("step", 1), ({"every": 1}, 1), ({"every": 25}, 25)]
)
def test_rounds_are_read_as_users_write_them(rounds, expected):
    assert TeacherCurator(rounds=rounds).rounds == expected


@pytest.mark.parametrize(
    "rounds", ["always", "", "1", {}, {"every": 0}, {"every": -3}, {"each": 2}, {"every": 2, "x": 1}]
)
def test_other_rounds_are_refused(rounds):
    with pytest.raises(ConfigError, match=r"StudentCurator\.rounds must be once, epoch, step or \{every: n\}"):
        StudentCurator(rounds=rounds)


def test_the_defaults_are_those_of_distillm_2():
    for curator, rounds in ((TeacherCurator(), "once"), (StudentCurator(), "epoch")):
        assert (curator.sampling.temperature, curator.sampling.top_p, curator.rounds) == (0.8, 0.95, rounds)
