import logging
import re
from collections import Counter

import pytest
from scipy.stats import binomtest, chisquare

from distillkit.curators.mixed import MixedCurator
from distillkit.curators.paired import PairedCurator
from distillkit.curators.replay import ReplayCurator
from distillkit.curators.shares import uniform_draw
from distillkit.curators.single import DatasetCurator, StudentCurator, TeacherCurator
from distillkit.errors import ConfigError
from distillkit.schedules import Constant, Linear, Piecewise
from distillkit.testing import SeededGenerator, make_prompts
from distillkit.types import Progress, Prompts
from helpers.recording import RecordingGenerator

MANY = make_prompts(1000)


@pytest.fixture
def generators():
    return {"teacher": RecordingGenerator("teacher"), "student": RecordingGenerator("student")}


def writers(rows):
    return [row.writer for row in rows]


def test_each_part_gets_its_share(generators):
    parts = [DatasetCurator(), TeacherCurator(rounds="epoch"), StudentCurator()]
    rows = MixedCurator(parts, [0.2, 0.5, 0.3]).curate(MANY, generators)
    found = Counter(writers(rows))
    observed = [found[name] for name in ("dataset", "teacher", "student")]
    assert chisquare(observed, [200, 500, 300]).pvalue > 0.001
    assert chisquare(observed, [200, 400, 400]).pvalue < 0.001, "or the test says nothing"


def test_rows_stand_in_the_prompts_order_and_a_part_is_asked_for_its_own_prompts_alone(generators):
    rows = MixedCurator([TeacherCurator(rounds="epoch"), StudentCurator()], [0.5, 0.5]).curate(MANY, generators)
    assert [row.prompt_id for row in rows] == [prompt.id for prompt in MANY]
    for name, generator in generators.items():
        assert generator.calls == [(0, [row.prompt_id for row in rows if row.writer == name])]
        assert len(generator.calls[0][1]) > 400


def test_a_draw_depends_on_seed_round_and_prompt_and_not_on_its_neighbours(generators):
    mixed = MixedCurator([TeacherCurator(rounds="epoch"), StudentCurator()], [0.5, 0.5])
    whole = {row.prompt_id: row.writer for row in mixed.curate(MANY, generators)}
    part = mixed.curate(Prompts(MANY.items[100:50:-1]), generators)
    assert {row.prompt_id: row.writer for row in part}.items() <= whole.items()
    other = writers(mixed.curate(MANY.at_round(1), generators))
    seeded = writers(
        MixedCurator([TeacherCurator(rounds="epoch"), StudentCurator()], [0.5, 0.5], seed=1).curate(MANY, generators)
    )
    first = list(whole.values())
    for second in (other, seeded):  # independent draws agree half of the time
        same = sum(one == two for one, two in zip(first, second, strict=True))
        assert binomtest(same, len(first), 0.5).pvalue > 0.001


def test_draws_are_uniform():
    numbers = [uniform_draw(0, 0, prompt.id) for prompt in MANY]
    assert 0 <= min(numbers) <= max(numbers) < 1
    assert chisquare(list(Counter(int(10 * number) for number in numbers).values())).pvalue > 0.001


@pytest.mark.parametrize(("shares", "only"), [([1.0, 0.0], "teacher"), ([0.0, 1.0], "student")])
def test_a_part_without_a_share_is_not_asked(shares, only, generators):
    rows = MixedCurator([TeacherCurator(rounds="epoch"), StudentCurator()], shares).curate(MANY, generators)
    assert set(writers(rows)) == {only}
    assert [name for name, generator in generators.items() if generator.calls] == [only]


def test_shares_that_sum_to_1_only_roughly_leave_no_prompt_out(generators):
    mixed = MixedCurator([StudentCurator(), TeacherCurator(), DatasetCurator()], [1 / 3, 2 / 3 - 1e-7, 0.0])
    assert set(writers(mixed.curate(MANY, generators))) == {"student", "teacher"}


def test_a_schedule_is_read_when_a_round_starts_and_kept_for_the_round(generators):
    mixed = MixedCurator([StudentCurator(rounds={"every": 5}), DatasetCurator()], Linear(0.0, 1.0))
    counts = []
    for number in range(3):
        mixed.update(Progress(5 * number, 10), {})
        counts.append(writers(mixed.curate(MANY.at_round(number), generators)).count("student"))
        mixed.update(Progress(5 * number + 3, 10), {})
        assert writers(mixed.curate(MANY.at_round(number), generators)).count("student") == counts[-1]
    assert counts[0] == 0
    assert binomtest(counts[1], len(MANY), 0.5).pvalue > 0.001
    assert counts[2] == len(MANY)


def test_a_schedule_beyond_a_share_is_refused(generators):
    mixed = MixedCurator([StudentCurator(), DatasetCurator()], Piecewise([(0.0, 1.5)]))
    with pytest.raises(ConfigError, match=r"MixedCurator\.shares must lie in \[0, 1\], got 1\.5"):
        mixed.curate(MANY, generators)


@pytest.mark.parametrize(
    ("parts", "shares", "expected"),
    [
        ([DatasetCurator(), StudentCurator(rounds="step")], [0.5, 0.5], 1),
        ([TeacherCurator(), StudentCurator()], [0.5, 0.5], "epoch"),
        ([TeacherCurator(), DatasetCurator()], [0.5, 0.5], "once"),
        ([TeacherCurator(), DatasetCurator()], Constant(0.5), "epoch"),
    ],
)
def test_a_round_lasts_as_long_as_that_of_the_parts_that_write_anew(parts, shares, expected):
    assert MixedCurator(parts, shares).rounds == expected


def test_parts_that_stay_keep_their_prompts_in_every_round(generators):
    mixed = MixedCurator([TeacherCurator(), DatasetCurator()], [0.5, 0.5])
    mixed.prepare(MANY, generators)
    first, second = (mixed.curate(MANY.at_round(number), generators) for number in (0, 4))
    assert first == second
    own = [row.prompt_id for row in first if row.writer == "teacher"]
    assert generators["teacher"].calls == [(0, own)] * 3


def test_a_part_that_is_written_once_is_prepared_for_all_prompts_where_others_move(generators):
    MixedCurator([TeacherCurator(), StudentCurator()], [0.5, 0.5]).prepare(MANY, generators)
    assert generators["teacher"].calls == [(0, [prompt.id for prompt in MANY])]
    assert generators["student"].calls == []


def test_pairs_can_be_mixed(generators):
    pairs = [PairedCurator(), PairedCurator(chosen=DatasetCurator())]
    rows = MixedCurator(pairs, [0.5, 0.5]).curate(MANY, generators)
    assert set(zip(writers(rows[::2]), writers(rows[1::2]), strict=True)) == {
        ("teacher", "student"),
        ("dataset", "student"),
    }
    assert [row.prompt_id for row in rows[::2]] == [row.prompt_id for row in rows[1::2]]


def test_parts_with_different_numbers_of_rows_are_refused(generators):
    mixed = MixedCurator([StudentCurator(), PairedCurator()], [0.5, 0.5])
    with pytest.raises(
        ConfigError, match=r"the same number of rows per prompt, got 1 of StudentCurator, 2 of PairedCurator"
    ):
        mixed.curate(MANY, generators)


def test_writers_and_what_they_need_are_those_of_all_parts():
    mixed = MixedCurator([PairedCurator(), DatasetCurator()], [1.0, 0.0])
    assert (mixed.writers, mixed.needs_reference) == ({"teacher", "student"}, True)
    own = SeededGenerator("teacher")
    assert MixedCurator([TeacherCurator(generator=own), StudentCurator()], [1.0, 0.0]).own_generators() == {
        "teacher": own
    }
    with pytest.raises(ConfigError, match="Two curators have different generators for the writer teacher"):
        MixedCurator([TeacherCurator(generator=SeededGenerator("a")) for _ in range(2)], [1.0, 0.0]).own_generators()


@pytest.mark.parametrize(
    ("parts", "shares", "message"),
    [
        (1, [1.0], r"parts needs at least two curators, got 1"),
        (2, [1.0], r"shares needs one number for each of 2 parts, got \[1\.0\]"),
        (2, [0.5, 0.6], r"shares must be at least 0 and sum to 1, got \[0\.5, 0\.6\]"),
        (2, [-0.5, 1.5], r"shares must be at least 0 and sum to 1"),
        (3, Constant(0.5), r"shares may be a schedule, .* only with two parts, got 3"),
    ],
)
def test_shares_that_do_not_fit_are_refused(parts, shares, message):
    with pytest.raises(ConfigError, match=rf"MixedCurator\.{message}"):
        MixedCurator([DatasetCurator() for _ in range(parts)], shares)


def test_parts_that_write_anew_at_different_times_are_refused():
    parts = [TeacherCurator(rounds="step"), StudentCurator(rounds="epoch")]
    with pytest.raises(ConfigError, match=r"MixedCurator\.parts must have the same rounds .* got 1, epoch"):
        MixedCurator(parts, [0.5, 0.5])


def test_the_log_says_what_share_each_writer_really_got(generators, caplog):
    mixed = MixedCurator([StudentCurator(), DatasetCurator()], [0.25, 0.75])
    with caplog.at_level(logging.INFO, "distillkit"):
        rows = mixed.curate(make_prompts(40).at_round(3), generators)
    counts = Counter(writers(rows))
    (line,) = caplog.messages
    found = re.fullmatch(
        r"MixedCurator, round 3, 40 prompts: student (\d+) \(([\d.]+)%, share 25\.0%\), "
        r"dataset (\d+) \(([\d.]+)%, share 75\.0%\)",
        line,
    )
    assert found is not None, line
    assert (int(found[1]), int(found[3])) == (counts["student"], counts["dataset"])
    assert float(found[2]) == pytest.approx(100 * counts["student"] / 40)


def test_schedules_have_names_for_the_log():
    replayed = ReplayCurator(StudentCurator(), Linear(0.0, 1.0))
    curator = MixedCurator([TeacherCurator(), replayed], Linear(1.0, 0.0))
    assert {name: schedule.start for name, schedule in curator.schedules().items()} == {
        "shares": 1.0,
        "1_ReplayCurator/replay": 0.0,
    }
    assert MixedCurator([TeacherCurator(), StudentCurator()], [0.5, 0.5]).schedules() == {}
