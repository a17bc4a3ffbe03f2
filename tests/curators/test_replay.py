import io
import logging

import pytest
import torch
from scipy.stats import binomtest, chisquare

from distillkit.curators.filtered import FilteredCurator
from distillkit.curators.filters import Truncated
from distillkit.curators.paired import PairedCurator
from distillkit.curators.replay import ReplayCurator
from distillkit.curators.single import StudentCurator, TeacherCurator
from distillkit.errors import ConfigError
from distillkit.schedules import Linear
from distillkit.testing import make_prompts
from distillkit.types import Progress, Prompts
from helpers.recording import RecordingGenerator

PROMPTS = make_prompts(400)


@pytest.fixture
def generators():
    return {"student": RecordingGenerator("student"), "teacher": RecordingGenerator("teacher")}


def part(start, stop, number=0):
    return Prompts(PROMPTS.items[start:stop], number)


def run(curator, generators, sizes):
    """The rows of rounds of these sizes, each of the prompts that follow."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        curator.curate(part(start, start + size, number), generators)
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]


def test_everything_is_fresh_until_the_buffer_is_full(generators):
    run(ReplayCurator(StudentCurator(), replay=1.0, capacity=20), generators, [10, 10, 10])
    assert [len(ids) for _, ids in generators["student"].calls] == [10, 10], "the third round is replayed whole"


def test_a_share_of_the_places_is_taken_by_rows_of_the_buffer(generators):
    first, second = run(ReplayCurator(StudentCurator(), replay=0.3, capacity=100), generators, [100, 300])
    replayed = [row for row, prompt in zip(second, part(100, 400), strict=True) if row.prompt_id != prompt.id]
    assert binomtest(len(replayed), 300, 0.3).pvalue > 0.001
    assert set(replayed) <= set(first)
    fresh = [row.prompt_id for row, prompt in zip(second, part(100, 400), strict=True) if row.prompt_id == prompt.id]
    assert generators["student"].calls[1] == (1, fresh), "only the others are written"


def test_a_round_takes_no_group_twice_while_there_are_enough(generators):
    first, second = run(ReplayCurator(StudentCurator(), replay=1.0, capacity=100), generators, [100, 100])
    assert first != second
    assert sorted(row.prompt_id for row in first) == sorted(row.prompt_id for row in second)


def test_all_of_the_buffer_is_drawn_from_alike(generators):
    curator = ReplayCurator(StudentCurator(), replay=1.0, capacity=10)
    curator.curate(part(0, 10), generators)
    counts = dict.fromkeys((prompt.id for prompt in part(0, 10)), 0)
    for number in range(1, 301):
        for row in curator.curate(part(10, 13, number), generators):
            counts[row.prompt_id] += 1
    assert chisquare(list(counts.values())).pvalue > 0.001


def test_the_oldest_rows_leave_the_buffer(generators):
    curator = ReplayCurator(StudentCurator(), replay=1.0, capacity=15)
    run(curator, generators, [10, 10])
    held = {row.prompt_id for row in curator.curate(part(100, 115, 2), generators)}
    assert held == {prompt.id for prompt in part(5, 20)}


def test_replayed_rows_do_not_enter_the_buffer_again(generators):
    curator = ReplayCurator(StudentCurator(), replay=0.5, capacity=10)
    run(curator, generators, [10, 10])
    asked = generators["student"].calls[1][1]
    assert 0 < len(asked) < 10
    curator.replay._fixed = 1.0
    held = {row.prompt_id for row in curator.curate(part(100, 110, 2), generators)}
    assert held == {*asked, *(prompt.id for prompt in part(len(asked), 10))}


def test_pairs_are_replayed_together(generators):
    curator = ReplayCurator(PairedCurator(), replay=0.5, capacity=50)
    _, second = run(curator, generators, [50, 100])
    pairs = list(zip(second[::2], second[1::2], strict=True))
    assert any(chosen.prompt_id != prompt.id for (chosen, _), prompt in zip(pairs, part(50, 150), strict=True))
    assert all(chosen.prompt_id == rejected.prompt_id for chosen, rejected in pairs)
    assert {(chosen.writer, rejected.writer) for chosen, rejected in pairs} == {("teacher", "student")}


def test_rows_that_are_not_trained_on_do_not_enter_the_buffer(generators):
    curator = ReplayCurator(FilteredCurator(StudentCurator(), [Truncated()]), replay=1.0, capacity=40)
    first = curator.curate(part(0, 60), generators)
    trained = {row.prompt_id for row in first if any(row.response_mask)}
    assert 40 <= len(trained) < 60
    second = curator.curate(part(60, 100, 1), generators)
    assert {row.prompt_id for row in second} <= trained


def test_a_schedule_is_read_when_a_round_starts(generators):
    curator = ReplayCurator(StudentCurator(rounds={"every": 5}), Linear(0.0, 1.0), capacity=50)
    curator.curate(part(0, 50), generators)
    for number, (step, expected) in enumerate([(0, 0.0), (5, 0.5), (10, 1.0)], start=1):
        curator.update(Progress(step, 10), {})
        rows = curator.curate(part(100, 300, number), generators)
        curator.update(Progress(step + 2, 10), {})
        assert curator.curate(part(100, 300, number), generators) == rows
        replayed = 200 - sum(len(ids) for round_index, ids in generators["student"].calls if round_index == number) / 2
        assert binomtest(int(replayed), 200, expected).pvalue > 0.001


def test_the_wrapped_curators_schedules_move_too(generators):
    inner = ReplayCurator(StudentCurator(), Linear(0.0, 1.0), capacity=5)
    ReplayCurator(inner).update(Progress(5, 10), {})
    assert inner.replay.at(0) == 0.5


@pytest.mark.parametrize("stop", range(5))
def test_a_run_that_is_resumed_within_a_round_goes_on_with_the_same_rows(stop, generators):
    sizes = [15, 20, 30, 10, 25, 40]
    make = lambda: ReplayCurator(PairedCurator(), replay=0.5, capacity=25, seed=3)  # noqa: E731
    whole = run(make(), generators, sizes)
    stopped, file = make(), io.BytesIO()
    run(stopped, generators, sizes[: stop + 1])
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    for number in range(stop, len(sizes)):
        asked = part(starts[number], starts[number] + sizes[number], number)
        assert resumed.curate(asked, generators) == whole[number]
        (*_, last) = resumed.curate(asked, generators)
        assert (last.ended, last.blank) == (whole[number][-1].ended, whole[number][-1].blank)


def test_a_buffer_that_is_saved_empty_is_loaded_empty(generators):
    curator = ReplayCurator(StudentCurator(), capacity=5)
    curator.load_state_dict(ReplayCurator(StudentCurator(), capacity=5).state_dict())
    assert len(curator.curate(part(0, 5), generators)) == 5


def test_the_log_says_how_many_places_were_taken(generators, caplog):
    curator = ReplayCurator(StudentCurator(), replay=1.0, capacity=10)
    with caplog.at_level(logging.INFO, "distillkit"):
        run(curator, generators, [10, 20])
    assert caplog.messages == [
        "ReplayCurator, round 0: 0 of 10 prompts replayed from the buffer (0.0 %, share 0.0 %), which was filled with "
        "the rows of 0 of 10 prompts",
        "ReplayCurator, round 1: 20 of 20 prompts replayed from the buffer (100.0 %, share 100.0 %), which was filled "
        "with the rows of 10 of 10 prompts",
    ]


def test_settings_outside_their_range_are_refused():
    with pytest.raises(ConfigError, match=r"ReplayCurator\.capacity must be at least 1, got 0"):
        ReplayCurator(StudentCurator(), capacity=0)
    with pytest.raises(ConfigError, match=r"ReplayCurator\.replay must lie in \[0, 1\], got 1\.5"):
        ReplayCurator(StudentCurator(), replay=1.5)
    with pytest.raises(ConfigError, match=r"must generate new responses .* TeacherCurator has rounds `once`"):
        ReplayCurator(TeacherCurator())
