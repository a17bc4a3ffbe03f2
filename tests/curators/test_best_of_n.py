import logging

import pytest

from distillkit.curators.best_of_n import SEED_STRIDE, BestOfN
from distillkit.curators.single import StudentCurator, TeacherCurator
from distillkit.errors import ConfigError, DataError
from distillkit.interfaces import Verifier
from distillkit.rollouts.stored import Ranks, StoredGenerator
from distillkit.storage.responses import ResponseStore
from distillkit.testing import SeededGenerator, make_prompts
from distillkit.types import Prompt, Prompts, Response, Row, Sampling
from distillkit.verifiers.length import TargetLength
from distillkit.verifiers.numeric import NumericAnswer

T, F = True, False
PROMPTS = make_prompts(5)


class Listed(SeededGenerator):
    """Answers with the token that is listed for its seed and prompt."""

    def __init__(self, tokens):
        super().__init__("teacher")
        self.tokens, self.asked = tokens, []

    def generate(self, prompts, sampling):
        self.asked.append((prompts.round, sampling.seed))
        return [Response(p.id, (token := self.tokens[sampling.seed][p.id],), str(token), "stop") for p in prompts]


class Token(Verifier):
    """The response's only token is its score."""

    def verify(self, prompts, responses):
        assert [prompt.id for prompt in prompts] == [response.prompt_id for response in responses]
        return [float(response.token_ids[0]) for response in responses]


TWO = Prompts((Prompt("a", (), (5,)), Prompt("b", (), (6, 6))), round=2)
SEEDS = [10, 10 + SEED_STRIDE, 10 + 2 * SEED_STRIDE]
TOKENS = dict(zip(SEEDS, ({"a": 20, "b": 40}, {"a": 30, "b": 40}, {"a": 25, "b": 40}), strict=True))


def best(tokens=TOKENS, rounds="epoch", n=3):
    generators = {"teacher": Listed(tokens)}
    return BestOfN(TeacherCurator(Sampling(seed=10), rounds), Token(), n), generators


def test_the_highest_score_is_kept_and_only_it_is_trained_on():
    curator, generators = best()
    assert list(curator.curate(TWO, generators)) == [
        Row((5, 30), (F, T), "teacher", "a"),
        Row((6, 6, 40), (F, F, T), "teacher", "b"),
    ]
    assert generators["teacher"].asked == [(2, seed) for seed in SEEDS]


def test_of_equal_scores_the_first_sample_is_kept():
    class Same(Verifier):
        def verify(self, prompts, responses):
            return [1.0] * len(responses)

    curator, generators = best()
    curator.verifier = Same()
    assert [row.input_ids[-1] for row in curator.curate(TWO, generators)] == [20, 40]


def test_the_first_sample_is_what_the_curator_writes_alone_and_is_found_in_the_store(tmp_path):
    def stored():
        inner = SeededGenerator("teacher")
        return {
            "teacher": StoredGenerator(
                "teacher", inner, ResponseStore(tmp_path), Ranks(), lambda _: "w", lambda: "w", lambda _: None
            )
        }

    alone = TeacherCurator()
    rows = alone.curate(PROMPTS, stored())
    assert [shard["responses"] for shard in ResponseStore(tmp_path).shards()] == [5]
    chosen = BestOfN(TeacherCurator(), TargetLength(3), n=2).curate(PROMPTS, stored())
    assert [shard["sampling"]["seed"] for shard in ResponseStore(tmp_path).shards()] == [0, SEED_STRIDE]
    assert any(own == other for own, other in zip(chosen, rows, strict=True))
    distance = lambda row: abs(sum(row.response_mask) - 3)  # noqa: E731
    assert all(distance(own) <= distance(other) for own, other in zip(chosen, rows, strict=True))


def test_what_is_written_once_is_written_ahead_in_every_sample():
    curator, generators = best(rounds="once")
    curator.prepare(TWO, generators)
    assert generators["teacher"].asked == [(0, seed) for seed in SEEDS]
    assert curator.rounds == "once"
    moving, generators = best()
    moving.prepare(TWO, generators)
    assert generators["teacher"].asked == []


def test_prompts_that_cant_be_judged_are_refused_before_anything_is_written():
    curator, generators = best(rounds="once")
    curator.verifier = NumericAnswer()
    asking = Prompts((Prompt("a", ({"role": "user", "content": "How many?"},), (5,), reference="Many."),))
    for ask in (curator.prepare, curator.curate):
        with pytest.raises(DataError, match=r"prompt 'How many\?' has a response without a numeric answer"):
            ask(asking, generators)
    assert generators["teacher"].asked == []


def test_a_verifier_that_needs_a_reference_makes_every_prompt_need_one():
    assert BestOfN(StudentCurator(), NumericAnswer()).needs_reference
    assert not BestOfN(StudentCurator(), TargetLength()).needs_reference


def test_the_log_says_what_the_choice_was_worth(caplog):
    curator, generators = best()
    with caplog.at_level(logging.INFO, "distillkit"):
        curator.curate(TWO, generators)
    assert caplog.messages == [  # (20 + 30 + 25 + 3 · 40) / 6, (20 + 40) / 2, (30 + 40) / 2
        "BestOfN, round 2, 2 prompts: mean Token is 32.5 over all samples, 30 over the first and 35 over the best of "
        "3; the samples of 1 prompts (50.0 %) differ in score"
    ]


@pytest.mark.parametrize(("scores", "found"), [([1.0], "got 1 with 0 NaN"), ([float("nan"), 1.0], "got 2 with 1 NaN")])
def test_a_verifier_without_a_number_for_each_response_is_refused(scores, found):
    class Broken(Verifier):
        def verify(self, prompts, responses):
            return scores

    curator, generators = best()
    curator.verifier = Broken()
    with pytest.raises(DataError, match=rf"Broken must give a number for each of 2 responses, {found}"):
        curator.curate(TWO, generators)


def test_one_sample_or_equal_samples_are_refused():
    with pytest.raises(ConfigError, match=r"BestOfN\.n must be at least 2 .* got 1"):
        BestOfN(TeacherCurator(), Token(), n=1)
    with pytest.raises(ConfigError, match=r"TeacherCurator\.sampling has temperature 0: raise it"):
        BestOfN(TeacherCurator(Sampling(temperature=0.0)), Token())
