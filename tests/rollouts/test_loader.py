import math
from dataclasses import replace

import pytest

from distillkit.rollouts.loader import Batching, FixedLoader, FixedLoop, RoundLoader, rank_rows
from distillkit.types import Prompt, Prompts, Row

T, F = True, False


def some_prompts(count):
    return Prompts(tuple(Prompt(f"p{i}", (), (i + 2,)) for i in range(count)))


class Recorder:
    """Curates with `rows_per_prompt` rows, whose response is the round's number, and keeps what it was asked."""

    def __init__(self, rows_per_prompt=1):
        self.asked, self.prepared, self.rows_per_prompt = [], [], rows_per_prompt
        self.length, self.prefetch_device = "epoch", None

    def prepare(self, prompts):
        self.prepared.append([prompt.id for prompt in prompts])

    def rows(self, prompts):
        self.asked.append((prompts.round, [prompt.id for prompt in prompts]))
        return [
            Row((*prompt.input_ids, 1000 + prompts.round), (F, T), f"w{number}", prompt.id)
            for prompt in prompts
            for number in range(self.rows_per_prompt)
        ]


def loader(count=10, recorder=None, epoch=0, done=0, limit=math.inf, **settings):
    recorder = recorder or Recorder()
    recorder.length = settings.pop("rounds", recorder.length)
    place = {name: settings.pop(name) for name in ("rank", "world") if name in settings}
    batching = Batching(**{"batch_size": 2, "pad_id": 0} | settings)
    return RoundLoader(some_prompts(count), recorder, batching, FixedLoop(epoch, done, limit), **place)


def ids(batches):
    """The prompts' places, batch by batch."""
    return [[token - 2 for token in batch.input_ids[:, 0].tolist()] for batch in batches]


def flat(lists):
    return [item for part in lists for item in part]


def test_every_prompt_comes_once_in_an_epoch():
    batches = ids(loader(7))
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    assert sorted(flat(batches)) == list(range(7))
    assert len(loader(7)) == 4


def test_without_shuffling_the_order_is_that_of_the_data():
    assert ids(loader(5, shuffle=False, epoch=3)) == [[0, 1], [2, 3], [4]]


def test_the_order_depends_on_seed_and_epoch_alone():
    plain = flat(ids(loader(30)))
    for settings in ({"batch_size": 7}, {"accumulate": 3}, {"rounds": 2}, {"rounds": "once"}, {}):
        assert flat(ids(loader(30, **settings))) == plain
    orders = [plain, *(flat(ids(loader(30, **other))) for other in ({"seed": 1}, {"epoch": 2}, {"seed": 7}))]
    assert len({tuple(order) for order in orders}) == 4


def test_the_epoch_is_asked_for_at_each_iteration():
    one = loader(30)
    for one.loop.epoch in (0, 1, 5):
        assert ids(one) == ids(loader(30, epoch=one.loop.epoch))


@pytest.mark.parametrize(("accumulate", "windows"), [(1, [1, 1, 1, 1, 1]), (2, [2, None, 2, None, 1])])
def test_the_first_batch_of_a_step_carries_the_whole_step(accumulate, windows):
    batches = list(loader(9, accumulate=accumulate))
    assert [batch.window and len(batch.window) for batch in batches] == windows
    for place, batch in enumerate(batches):
        if batch.window is not None:
            assert ids(batch.window) == ids(batches[place : place + len(batch.window)])


def test_the_rows_of_a_prompt_stay_in_one_batch():
    (first, *_) = loader(9, Recorder(rows_per_prompt=2), shuffle=False)
    assert first.pair == (0, 0, 1, 1)
    assert first.writer == ("w0", "w1", "w0", "w1")


def run_epochs(epochs, **settings):
    """What is asked of the curator, epoch by epoch, and the places that were trained on."""
    recorder, trained = Recorder(), []
    for epoch in range(epochs):
        trained.append(ids(loader(10, recorder, epoch, **settings)))
    return recorder.asked, trained


@pytest.mark.parametrize("rounds", ["epoch", "once"])
def test_a_round_of_an_epoch_asks_for_every_prompt_under_the_epochs_number(rounds):
    asked, trained = run_epochs(2, rounds=rounds)
    assert [number for number, _ in asked] == [0, 1]
    for (_, prompts), batches in zip(asked, trained, strict=True):
        assert prompts == [f"p{place}" for place in flat(batches)]


@pytest.mark.parametrize(
    ("every", "accumulate", "sizes"),
    [(1, 1, [2, 2, 2, 2, 2]), (2, 1, [4, 4, 2]), (2, 2, [8, 2]), (1, 2, [4, 4, 2]), (9, 1, [10])],
)
def test_a_round_of_steps_asks_for_what_its_steps_train_on(every, accumulate, sizes):
    asked, trained = run_epochs(2, rounds=every, accumulate=accumulate)
    assert [number for number, _ in asked] == list(range(2 * len(sizes)))
    assert [len(prompts) for _, prompts in asked] == 2 * sizes
    assert flat(prompts for _, prompts in asked) == [f"p{place}" for place in flat(flat(trained))]


def test_a_round_is_asked_for_only_when_its_first_step_comes():
    recorder = Recorder()
    batches = iter(loader(8, recorder, rounds=2))
    asked = [len(recorder.asked) for _ in batches]
    assert asked == [1, 1, 2, 2]


def test_a_batch_is_made_of_its_own_rounds_responses():
    found = [batch.input_ids[:, 1].tolist() for batch in loader(10, rounds=2, epoch=1)]
    assert found == [[1003, 1003], [1003, 1003], [1004, 1004], [1004, 1004], [1005, 1005]]


def test_preparation_comes_once_with_all_prompts_in_the_datas_order():
    recorder = Recorder()
    one = loader(4, recorder)
    assert recorder.prepared == []
    list(one)
    list(one)
    assert recorder.prepared == [["p0", "p1", "p2", "p3"]]


def same(first, second):
    return (
        (ids([first]), first.writer, first.input_ids.tolist())
        == (ids([second]), second.writer, second.input_ids.tolist())
        and (first.window is None) == (second.window is None)
        and (first.window is None or all(same(*two) for two in zip(first.window, second.window, strict=True)))
    )


@pytest.mark.parametrize("rounds", ["once", "epoch", 1, 2])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_resumed_epoch_gives_the_very_same_remaining_batches(rounds, accumulate, steps):
    settings = {"rounds": rounds, "accumulate": accumulate, "epoch": 4}
    whole, done = list(loader(19, **settings)), steps * accumulate
    recorder = Recorder()
    rest = list(loader(19, recorder, done=done, **settings))
    assert len(rest) == len(whole) - done
    assert all(same(*two) for two in zip(rest, whole[done:], strict=True))
    # The round that was under way is asked for as a whole and under its own number: the store has its responses.
    full = Recorder()
    list(loader(19, full, **settings))
    assert recorder.asked == full.asked[len(full.asked) - len(recorder.asked) :]


@pytest.mark.parametrize(("accumulate", "windows"), [(1, [1, 1, 1]), (2, [2, None, 1]), (4, [3, None, None])])
@pytest.mark.parametrize("rounds", ["epoch", 2])
def test_a_limit_ends_the_epoch_its_last_step_and_its_rounds(accumulate, windows, rounds):
    recorder = Recorder()
    batches = list(loader(19, recorder, limit=3, accumulate=accumulate, rounds=rounds))
    assert ids(batches) == ids(loader(19))[:3]
    assert [batch.window and len(batch.window) for batch in batches] == windows
    assert sum(len(prompts) for _, prompts in recorder.asked) == 6, "nothing is curated that no step trains on"
    assert len(loader(19, limit=3)) == 10, "the trainer applies the limit to the length"


def test_the_order_of_the_first_epoch_may_be_repeated():
    assert ids(loader(9, epoch=3, repeat=True)) == ids(loader(9)) != ids(loader(9, epoch=3))


@pytest.mark.parametrize("count", [24, 19])
def test_ranks_share_each_global_batch_among_them(count):
    settings = {"batch_size": 2, "accumulate": 2, "epoch": 1}
    ranks = [list(loader(count, rank=rank, world=3, **settings)) for rank in range(3)]
    whole = list(loader(count, **settings | {"batch_size": 6}))
    assert {len(batches) for batches in ranks} == {len(whole)} == {len(loader(count, world=3, **settings))}
    for place, batch in enumerate(whole):
        parts = [batches[place] for batches in ranks]
        trained = flat(ids([part])[0] for part in parts if part.num_tokens)
        assert sorted(trained) == sorted(ids([batch])[0])
        assert sum(part.num_tokens for part in parts) == batch.num_tokens
        assert len({part.window and len(part.window) for part in parts}) == 1


def test_every_rank_asks_for_the_prompts_of_all():
    recorders = [Recorder() for _ in range(2)]
    for rank, recorder in enumerate(recorders):
        list(loader(9, recorder, rank=rank, world=2, rounds=1))
    assert recorders[0].asked == recorders[1].asked
    assert [len(prompts) for _, prompts in recorders[0].asked] == [4, 4, 1]


def test_a_rank_without_a_prompt_gets_a_row_without_positions():
    *_, last = loader(9, shuffle=False, rank=1, world=2)
    assert last.num_tokens == 0
    assert last.response_mask.sum() == 0
    assert ids([last]) == [[8]]


def test_rows_are_dealt_out_prompt_by_prompt():
    groups = [[Row((1, 2), (F, T), writer, name) for writer in ("teacher", "student")] for name in "abcde"]
    dealt = [[row.prompt_id for row in rank_rows(groups, rank, 2)] for rank in range(2)]
    assert dealt == [list("aaccee"), list("bbdd")]
    assert [row.response_mask for row in rank_rows(groups[:1], 1, 2)] == [(F, F), (F, F)]


def test_no_prompts_give_no_batches():
    recorder = Recorder()
    assert list(loader(0, recorder)) == []
    assert recorder.asked == []


def test_fixed_batches_come_again_each_time():
    batches = list(loader(5))
    fixed = FixedLoader(batches)
    assert len(fixed) == 3
    assert list(fixed) == list(fixed) == batches


class Refusing(Recorder):
    """Nothing of the named prompts is trained on."""

    def __init__(self, refused, rows_per_prompt=1):
        super().__init__(rows_per_prompt)
        self.refused = refused

    def rows(self, prompts):
        rows = super().rows(prompts)
        return [replace(row, response_mask=(F, F)) if row.prompt_id in self.refused else row for row in rows]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_prompts_that_are_not_trained_on_are_left_out_of_their_batch(layout):
    settings = {"shuffle": False, "batch_size": 4, "layout": layout}
    first, second, _ = batches = list(loader(9, Refusing({"p1", "p6", "p7"}, 2), **settings))
    assert ids(batches) == [[0, 0, 2, 2, 3, 3], [4, 4, 5, 5], [8, 8]]
    assert (first.pair, first.lengths, first.num_tokens) == ((0, 0, 1, 1, 2, 2), (1,) * 6, 6)
    assert second.num_tokens == 4
    assert len(loader(9, Refusing({"p1"}), **settings)) == 3, "the epoch has as many batches as before"


def test_a_batch_of_which_nothing_is_trained_on_keeps_one_prompt():
    batches = list(loader(6, Refusing({"p2", "p3"}, 2), shuffle=False))
    assert ids(batches) == [[0, 0, 1, 1], [2, 2], [4, 4, 5, 5]]
    assert [batch.num_tokens for batch in batches] == [4, 0, 4]


def test_what_is_left_of_a_batch_is_dealt_to_all_ranks():
    settings = {"shuffle": False, "batch_size": 2, "world": 2}
    ranks = [list(loader(8, Refusing({"p0", "p2", "p4", "p5", "p6"}), rank=rank, **settings)) for rank in range(2)]
    assert [ids(batches) for batches in ranks] == [[[1], [7]], [[3], [7]]]
    assert [[batch.num_tokens for batch in batches] for batches in ranks] == [[1, 1], [1, 0]]


def test_two_groups_of_one_prompt_are_two_pairs():
    class Replaying(Recorder):
        def rows(self, prompts):
            return [replace(row, prompt_id="p0") for row in super().rows(prompts)]

    (batch,) = loader(3, Replaying(2), batch_size=3)
    assert batch.pair == (0, 0, 1, 1, 2, 2)
