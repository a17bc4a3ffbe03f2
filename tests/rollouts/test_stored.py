import threading
from dataclasses import dataclass, field, replace

import pytest

from distillkit.errors import GenerationError, StoreError
from distillkit.generators.transformers import TransformersGenerator
from distillkit.interfaces import Generator
from distillkit.rollouts import stored as module
from distillkit.rollouts.stored import Ranks, StoredGenerator
from distillkit.storage.responses import Provenance, ResponseStore
from distillkit.storage.rows import stored_rows
from distillkit.types import Prompt, Prompts, Sampling
from helpers.models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SAMPLING = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=4)


class Counting(Generator):
    """A generator in process that counts what it is asked for, and breaks down after `until` calls."""

    def __init__(self, until=None):
        self.inner = TransformersGenerator(progress=False)
        self.asked, self.refreshed, self.until = [], 0, until

    def refresh(self, model, tokenizer):
        self.refreshed += 1
        self.inner.refresh(model, tokenizer)

    def generate(self, prompts, sampling):
        if self.until is not None and len(self.asked) >= self.until:
            raise KeyboardInterrupt
        self.asked.append([prompt.id for prompt in prompts])
        return self.inner.generate(prompts, sampling)


class GivesUp(Counting):
    """Gives up on its call number `call`, once, after all but the first of that call's prompts are answered."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def generate(self, prompts, sampling):
        responses = super().generate(prompts, sampling)
        if len(self.asked) == self.call:
            raise GenerationError("The server does not answer.", responses[:0:-1])
        return responses


@dataclass
class Weights:
    """Stands for a model: its fingerprint, and that of each round."""

    now: str = "w0"
    rounds: dict[int, str] = field(default_factory=dict)

    def of_round(self, number):
        return self.rounds.setdefault(number, self.now)


def some_prompts(count=7, round_index=0):
    ids = [tuple(range(2, 3 + (5 * i) % 7)) for i in range(count)]
    return Prompts(tuple(Prompt(f"p{i}", (), row) for i, row in enumerate(ids)), round_index)


def stored(folder, inner, weights=None, ranks=None):
    weights, ranks, model = weights or Weights(), ranks or Ranks(), tiny_model(len(TOKENIZER))
    store = ResponseStore(folder, ranks.rank)

    def refresh(generator):
        generator.refresh(model, TOKENIZER)

    return StoredGenerator("teacher", inner, store, ranks, weights.of_round, lambda: weights.now, refresh)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "RESPONSES_PER_SHARD", 2)


@pytest.fixture
def uninterrupted(tmp_path):
    inner = Counting()
    responses = stored(tmp_path / "whole", inner).generate(some_prompts(), SAMPLING)
    return responses, inner.asked


def test_gives_what_the_inner_generator_writes_in_the_prompts_order(uninterrupted):
    inner = TransformersGenerator(progress=False)
    inner.refresh(tiny_model(len(TOKENIZER)), TOKENIZER)
    assert uninterrupted[0] == inner.generate(some_prompts(), SAMPLING)


def test_groups_are_of_similar_length(uninterrupted):
    lengths = {prompt.id: len(prompt.input_ids) for prompt in some_prompts()}
    asked = [lengths[name] for group in uninterrupted[1] for name in group]
    assert [len(group) for group in uninterrupted[1]] == [2, 2, 2, 1]
    assert asked == sorted(asked)


def test_nothing_is_written_twice(tmp_path):
    inner = Counting()
    generator = stored(tmp_path, inner)
    first = generator.generate(some_prompts(), SAMPLING)
    calls = len(inner.asked)
    assert generator.generate(some_prompts(), SAMPLING) == first
    assert generator.generate(some_prompts()[2:5], SAMPLING) == first[2:5]
    again = Counting()
    assert stored(tmp_path, again).generate(some_prompts(), SAMPLING) == first  # another process
    assert (len(inner.asked), inner.refreshed, again.asked, again.refreshed) == (calls, 1, [], 0)


def test_only_missing_responses_are_written(tmp_path):
    inner = Counting()
    generator = stored(tmp_path, inner)
    few = generator.generate(some_prompts()[1:4], SAMPLING)
    inner.asked.clear()
    assert generator.generate(some_prompts(), SAMPLING)[1:4] == few
    assert sorted(name for group in inner.asked for name in group) == ["p0", "p4", "p5", "p6"]


@pytest.mark.parametrize("until", [0, 1, 3])
def test_resumed_equals_uninterrupted(until, tmp_path, uninterrupted):
    broken = Counting(until)
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path, broken).generate(some_prompts(), SAMPLING)
    resumed = Counting()
    assert stored(tmp_path, resumed).generate(some_prompts(), SAMPLING) == uninterrupted[0]
    assert broken.asked + resumed.asked == uninterrupted[1]  # in the same batches, and none of them twice


def test_what_a_generator_had_finished_when_it_gave_up_is_kept_and_only_the_rest_is_asked_for_again(
    tmp_path, uninterrupted
):
    gives_up = GivesUp(call=2)
    with pytest.raises(GenerationError, match="does not answer"):
        stored(tmp_path, gives_up).generate(some_prompts(), SAMPLING)
    first, second, *others = uninterrupted[1]
    assert gives_up.asked == [first, second]
    kept = ResponseStore(tmp_path).read(Provenance("teacher", "w0", SAMPLING, 0))
    assert sorted(kept) == sorted([*first, second[1]])
    resumed = Counting()
    assert stored(tmp_path, resumed).generate(some_prompts(), SAMPLING) == uninterrupted[0]
    assert resumed.asked == [[second[0]], *others]


def test_a_generator_that_gave_up_at_once_leaves_no_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RESPONSES_PER_SHARD", 1)
    with pytest.raises(GenerationError):
        stored(tmp_path, GivesUp(call=1)).generate(some_prompts(), SAMPLING)
    assert ResponseStore(tmp_path).shards() == []


@pytest.mark.parametrize(
    ("sampling", "round_index"),
    [(Sampling(temperature=1.0, top_p=0.9, max_new_tokens=5), 0), (SAMPLING, 1)],
    ids=["other sampling", "other round"],
)
def test_other_sampling_or_another_round_is_written_anew(sampling, round_index, tmp_path):
    inner = Counting()
    generator = stored(tmp_path, inner)
    generator.generate(some_prompts(), SAMPLING)
    generator.generate(some_prompts(round_index=round_index), sampling)
    assert len(inner.asked) == 2 * 4


def test_responses_of_a_round_are_read_after_the_weights_have_moved_on(tmp_path):
    weights, inner = Weights(), Counting()
    generator = stored(tmp_path, inner, weights)
    first = generator.generate(some_prompts(), SAMPLING)
    weights.now = "w1"
    assert generator.generate(some_prompts(), SAMPLING) == first
    generator.generate(some_prompts(round_index=1), SAMPLING)
    assert inner.refreshed == 2
    assert [entry["model"] for entry in generator.store.shards()] == ["w0"] * 4 + ["w1"] * 4


def test_missing_responses_of_weights_that_have_moved_on_are_an_error(tmp_path):
    weights = Weights()
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path, Counting(until=2), weights).generate(some_prompts(), SAMPLING)
    weights.now = "w1"
    inner = Counting()
    with pytest.raises(StoreError, match=r"lacks responses of round 0 by teacher, .* have changed since .*Resume from"):
        stored(tmp_path, inner, weights).generate(some_prompts(), SAMPLING)
    assert inner.asked == []


def run_ranks(jobs):
    """Runs each job in a thread of its own, and gives their results; an error in one is raised here."""
    results, errors = [None] * len(jobs), []

    def run(place):
        try:
            results[place] = jobs[place]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    if errors:
        raise errors[0]
    return results


def test_two_ranks_share_the_work_and_get_every_response(tmp_path, uninterrupted):
    barrier, inners = threading.Barrier(2, timeout=10), [Counting(), Counting()]
    parts = [stored(tmp_path, inners[rank], ranks=Ranks(rank, 2, lambda: barrier.wait())) for rank in range(2)]
    found = run_ranks([lambda part=part: part.generate(some_prompts(), SAMPLING) for part in parts])
    assert found == [uninterrupted[0]] * 2
    assert [inner.asked for inner in inners] == [uninterrupted[1][0::2], uninterrupted[1][1::2]]


def test_a_rank_that_looks_late_agrees_with_the_others_that_something_is_missing(tmp_path, uninterrupted):
    whole, written, barrier = uninterrupted[0], threading.Event(), threading.Barrier(2, timeout=5)
    missing = uninterrupted[1][1]  # a group of the second rank is all that is missing
    provenance = Provenance("teacher", "w0", SAMPLING, 0)
    ResponseStore(tmp_path).write(provenance, [r for r in whole if r.prompt_id not in missing])
    late, quick = (stored(tmp_path, Counting(), ranks=Ranks(rank, 2, lambda: barrier.wait())) for rank in range(2))
    read, write = late.store.read, quick.store.write

    def read_late(key):
        written.wait(timeout=0.3)  # for the other's responses, if it does not wait for this rank to look
        return read(key)

    def write_and_tell(*args):
        write(*args)
        written.set()

    late.store.read, quick.store.write = read_late, write_and_tell
    assert (
        run_ranks([lambda part=part: part.generate(some_prompts(), SAMPLING) for part in (late, quick)]) == [whole] * 2
    )


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_shards_write_the_groups_of_one_process_and_what_is_not_theirs_is_empty(shards, tmp_path, uninterrupted):
    whole, groups = uninterrupted
    for shard in range(shards):
        inner = Counting()
        generator = stored(tmp_path, inner, ranks=Ranks(shard=shard, shards=shards))
        found = generator.generate(some_prompts(), SAMPLING)
        assert inner.asked == groups[shard::shards]
        assert inner.refreshed == (1 if groups[shard::shards] else 0), "no engine is started for nothing"
        there = {name for part in range(shard + 1) for group in groups[part::shards] for name in group}
        assert {name for _, name in generator.pending_on_other_shards} == {one.id for one in some_prompts()} - there
        for response, expected in zip(found, whole, strict=True):
            assert response.prompt_id == expected.prompt_id
            assert response == expected if response.prompt_id in there else response.token_ids == ()
    assert stored(tmp_path, Counting()).generate(some_prompts(), SAMPLING) == whole
    assert generator.generate(some_prompts(), SAMPLING) == whole


def test_what_was_elsewhere_is_not_counted_once_it_is_there(tmp_path):
    first, second = (stored(tmp_path, Counting(), ranks=Ranks(shard=shard, shards=2)) for shard in range(2))
    first.generate(some_prompts(), SAMPLING)
    assert len(first.pending_on_other_shards) == 3
    second.generate(some_prompts(), SAMPLING)
    first.generate(some_prompts(), SAMPLING)
    assert first.pending_on_other_shards == second.pending_on_other_shards == set()


def test_the_ranks_of_a_shard_divide_its_groups(tmp_path, uninterrupted):
    barrier, inners = threading.Barrier(2, timeout=10), [Counting(), Counting()]
    parts = [stored(tmp_path, inners[rank], ranks=Ranks(rank, 2, lambda: barrier.wait(), 1, 2)) for rank in range(2)]
    run_ranks([lambda part=part: part.generate(some_prompts(), SAMPLING) for part in parts])
    assert [inner.asked for inner in inners] == [[uninterrupted[1][1]], [uninterrupted[1][3]]]


class Overtaken(Counting):
    """While it writes, another run writes the first response of each group."""

    def __init__(self, store, provenance):
        super().__init__()
        self.other, self.provenance = store, provenance

    def generate(self, prompts, sampling):
        responses = super().generate(prompts, sampling)
        self.other.write(self.provenance, responses[:1])
        return responses


def test_what_another_run_wrote_meanwhile_is_kept(tmp_path, uninterrupted):
    inner = Overtaken(ResponseStore(tmp_path), Provenance("teacher", "w0", SAMPLING, 0))
    assert stored(tmp_path, inner).generate(some_prompts(), SAMPLING) == uninterrupted[0]
    assert sum(shard["responses"] for shard in ResponseStore(tmp_path).shards()) == len(some_prompts())


def test_prompts_and_the_class_of_the_generator_are_stored(tmp_path):
    messages = ({"role": "user", "content": "Why?"},)
    stored(tmp_path, Counting()).generate(Prompts((Prompt("p", messages, (2, 3)),)), SAMPLING)
    store = ResponseStore(tmp_path)
    assert [shard["generator"] for shard in store.shards()] == ["Counting"]
    (row,) = stored_rows(store.catalog, list(store.catalog.provenances))
    assert row["messages"] == list(messages)


class Tiring(Counting):
    """Answers `until` prompts in all, then has to stop part of the way of a group."""

    def __init__(self, until):
        super().__init__()
        self.left, self.released = until, 0

    def release(self):
        self.released += 1

    def generate(self, prompts, sampling):
        done = prompts[: self.left]
        self.left -= len(done)
        self.asked.append([prompt.id for prompt in done])
        found = self.inner.generate(done, sampling) if done else []
        if len(done) < len(prompts):
            raise GenerationError("It is tired.", found)
        return found


@pytest.mark.parametrize("until", [0, 1, 2, 5])
def test_of_a_group_that_was_stopped_part_of_the_way_nothing_is_lost_or_written_twice(until, tmp_path, uninterrupted):
    tired = Tiring(until)
    with pytest.raises(GenerationError, match="It is tired"):
        stored(tmp_path, tired).generate(some_prompts(), SAMPLING)
    assert sum(shard["responses"] for shard in ResponseStore(tmp_path).shards()) == until
    resumed = Counting()
    assert stored(tmp_path, resumed).generate(some_prompts(), SAMPLING) == uninterrupted[0]
    names = [name for group in tired.asked + resumed.asked for name in group]
    assert sorted(names) == sorted(prompt.id for prompt in some_prompts())
    assert tired.released == 1


def test_the_inner_generator_is_told_when_a_round_is_written(tmp_path):
    inner = Tiring(until=100)
    generator = stored(tmp_path, inner)
    for _ in range(2):
        generator.generate(some_prompts(), SAMPLING)
        assert (inner.refreshed, inner.released) == (1, 1)  # the second time nothing is written


def test_a_generator_may_get_more_prompts_at_once(tmp_path):
    inner = Counting()
    inner.responses_per_shard = 5
    stored(tmp_path, inner).generate(some_prompts(), SAMPLING)
    assert [len(group) for group in inner.asked] == [5, 2]


def test_responses_know_what_they_were_generated_for(tmp_path):
    generator = stored(tmp_path, Counting())
    prompts = some_prompts(5)
    generator.generate(replace(prompts[:2], purpose="reference"), SAMPLING)
    generator.generate(prompts, SAMPLING)
    rows = list(stored_rows(generator.store.catalog, list(generator.store.catalog.provenances)))
    assert {row["prompt_id"]: row["purpose"] for row in rows} == {
        "p0": "reference",
        "p1": "reference",
        **dict.fromkeys(("p2", "p3", "p4"), "training"),
    }
