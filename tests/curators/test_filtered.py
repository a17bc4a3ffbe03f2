import logging

import pytest

from distillkit.curators.filtered import FilteredCurator
from distillkit.curators.filters import Empty, Repeated, ResponseFilter, TooLong, Truncated
from distillkit.curators.paired import PairedCurator
from distillkit.curators.single import DatasetCurator, StudentCurator, TeacherCurator
from distillkit.errors import ConfigError, DataError
from distillkit.interfaces import Generator
from distillkit.types import Prompt, Prompts, Response, Row

T, F = True, False
NAMES = ("good", "blank", "cut", "loop")
PROMPTS = Prompts(tuple(Prompt(name, (), (5, 6), (5, 6, 7), (F, F, T)) for name in NAMES), round=4)
LOOP = (30, 31, 32, 33) * 10


class Scripted(Generator):
    """Answers a prompt as its id says."""

    def refresh(self, model, tokenizer):
        pass

    def generate(self, prompts, sampling):
        answers = {
            "good": ((20, 21, 1), "Yes", "stop"),
            "blank": ((9, 1), " \n", "stop"),
            "cut": ((20, 21), "Yes and", "length"),
            "loop": ((*LOOP, 1), "a b c d " * 10, "stop"),
        }
        return [Response(prompt.id, *answers[prompt.id]) for prompt in prompts]


GENERATORS = {"teacher": Scripted(), "student": Scripted()}


def trained(rows):
    return [row.prompt_id for row in rows if any(row.response_mask)]


def row(tokens, **facts):
    return Row((5, *tokens), (F, *(T for _ in tokens)), "student", "a", **facts)


def test_refused_rows_keep_their_place_and_are_not_trained_on():
    plain = StudentCurator().curate(PROMPTS, GENERATORS)
    rows = FilteredCurator(StudentCurator()).curate(PROMPTS, GENERATORS)
    assert [(row.input_ids, row.prompt_id, row.writer) for row in rows] == [
        (row.input_ids, row.prompt_id, row.writer) for row in plain
    ]
    assert trained(rows) == ["good"]
    assert rows[0] == plain[0]
    assert all(len(row.response_mask) == len(row.input_ids) for row in rows)


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        (Empty(), ["good", "cut", "loop"]),
        (Truncated(), ["good", "blank", "loop"]),
        (Repeated(), ["good", "blank", "cut"]),
        (TooLong(3), ["good", "blank", "cut"]),
        (TooLong(2), ["blank", "cut"]),
    ],
)
def test_each_filter_refuses_its_own(own, kept):
    assert trained(FilteredCurator(StudentCurator(), [own]).curate(PROMPTS, GENERATORS)) == kept


def test_one_refused_row_leaves_out_its_pair():
    rows = FilteredCurator(PairedCurator(DatasetCurator(), StudentCurator())).curate(PROMPTS, GENERATORS)
    assert [row.writer for row in rows] == ["dataset", "student"] * 4
    assert trained(rows) == ["good", "good"]


def test_the_log_counts_what_each_filter_refused_and_names_the_first(caplog):
    with caplog.at_level(logging.INFO, "distillkit"):
        FilteredCurator(StudentCurator()).curate(PROMPTS, GENERATORS)
        FilteredCurator(StudentCurator(), [TooLong(99)]).curate(PROMPTS[:1], GENERATORS)
    assert caplog.messages == [
        "FilteredCurator, round 4: 3 of 4 prompts left out; of 4 rows 1 empty, 1 truncated, 1 repeated; "
        "the first left out is blank",
        "FilteredCurator, round 4: 0 of 1 prompts left out; of 1 rows none refused",
    ]


def test_a_row_counts_for_the_first_filter_that_refuses_it(caplog):
    with caplog.at_level(logging.INFO, "distillkit"):
        FilteredCurator(StudentCurator(), [TooLong(2), Repeated()]).curate(PROMPTS, GENERATORS)
    assert "2 of 4 prompts left out; of 4 rows 2 too long; the first left out is good" in caplog.messages[0]


def test_a_round_of_which_nothing_is_left_is_an_error():
    with pytest.raises(
        DataError,
        match=r"refused the responses to all 3 prompts of round 4 \(1 empty, 1 truncated, 1 repeated\): look at",
    ):
        FilteredCurator(StudentCurator()).curate(PROMPTS[1:], GENERATORS)


def test_it_has_the_rounds_writers_and_needs_of_what_it_wraps():
    curator = FilteredCurator(PairedCurator(DatasetCurator(), StudentCurator(rounds={"every": 3})))
    assert (curator.rounds, curator.writers, curator.needs_reference) == (3, {"student"}, True)
    own = Scripted()
    assert FilteredCurator(TeacherCurator(generator=own)).own_generators() == {"teacher": own}


def test_a_filter_of_ones_own_is_asked_too():
    class NoEights(ResponseFilter):
        reason = "with an eight"

        def refuses(self, row):
            return 8 in row.input_ids

    prompts = Prompts(tuple(Prompt(str(n), (), (5,), (5, n), (F, T)) for n in (7, 8, 9)))
    assert trained(FilteredCurator(DatasetCurator(), [NoEights()]).curate(prompts, {})) == ["7", "9"]


def test_a_row_of_no_response_is_empty():
    assert Empty().refuses(Row((5, 6), (F, F), "student", "a"))
    assert Empty().refuses(row((1,), blank=True))
    assert not Empty().refuses(row((9, 1)))


@pytest.mark.parametrize(
    ("tokens", "refused"),
    [
        (tuple(range(200)), False),
        ((7,) * 30, True),
        (tuple(range(300)) + (8, 9) * 50, True),  # a loop after a long sound text
        (tuple(range(20)) * 2, False),  # 17 of 37 4-grams come again
        (tuple(range(20)) * 3, True),  # 37 of 57 do
        ((7, 7, 7), False),  # no 4-gram
        ((), False),
    ],
)
def test_what_counts_as_a_loop(tokens, refused):
    assert Repeated().refuses(row(tokens)) is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Repeated(ngram=0), r"Repeated\.ngram must be at least 1, got 0"),
        (lambda: Repeated(window=0), r"Repeated\.window must be at least 1, got 0"),
        (lambda: Repeated(share=1.0), r"Repeated\.share must lie in \[0, 1\), got 1\.0"),
        (lambda: TooLong(0), r"TooLong\.max_tokens must be at least 1, got 0"),
        (lambda: FilteredCurator(StudentCurator(), []), r"FilteredCurator\.filters is empty"),
    ],
)
def test_settings_outside_their_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
