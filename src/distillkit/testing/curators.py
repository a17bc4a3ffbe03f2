"""Contract tests of curators: `check_curator` for a single one, `CuratorContract` for pytest."""

import copy
from collections.abc import Mapping, Sequence
from random import Random

import torch
from torch import nn

from distillkit.interfaces import Curator, Generator
from distillkit.testing.contract import broken, run_tests
from distillkit.training.schedule_checks import unlogged_schedules
from distillkit.types import Progress, Prompt, Prompts, Response, Row, Sampling, Tokenizer

NUM_PROMPTS, NUM_ROUNDS = 12, 4


def check_curator(curator: Curator) -> None:
    """Runs all tests of `CuratorContract`.

    Args:
        curator: The curator, before its first round; it is copied, not changed.

    Raises:
        AssertionError: If a promise is broken; the message says which one.
    """
    contract = CuratorContract()
    run_tests(contract, lambda: curator)


class CuratorContract:
    """The contract of every `Curator` as tests. Subclass it as `Test…` and implement `make`; pytest does the rest."""

    def make(self) -> Curator:
        """The curator under test, before its first round."""
        raise NotImplementedError("write make(): it returns the curator under test")

    def prompts(self) -> Prompts:
        """Prompts of a run, each with a reference response and a worse one; override it for other needs."""
        return make_prompts(NUM_PROMPTS)

    def test_rounds_is_valid(self) -> None:
        """`rounds` is `once`, `epoch` or a number of optimizer steps."""
        rounds = self.make().rounds
        valid = rounds in ("once", "epoch") or (isinstance(rounds, int) and rounds >= 1)
        self._require(valid, f"rounds must be once, epoch or a number of steps from 1, got {rounds!r}")

    def test_each_prompt_gets_equally_many_rows(self) -> None:
        """The number of rows per prompt is the same in every round, and the rows of a prompt are adjacent."""
        curator, prompts = self._prepared()
        sizes = set()
        for round_index in range(NUM_ROUNDS):
            round_prompts = Prompts(prompts.items[round_index:], round_index)
            rows = self._curate(curator, round_prompts)
            size, rest = divmod(len(rows), len(round_prompts))
            self._require(size > 0 and rest == 0, f"{len(round_prompts)} prompts got {len(rows)} rows")
            sizes.add(size)
            groups = [rows[start : start + size] for start in range(0, len(rows), size)]
            adjacent = all(len({row.prompt_id for row in group}) == 1 for group in groups)
            self._require(adjacent, "the rows of a prompt must be adjacent")
        self._require(len(sizes) == 1, f"the number of rows per prompt must not change, got {sorted(sizes)}")

    def test_gives_rows_that_can_be_trained_on(self) -> None:
        """A row begins with its prompt; its mask is as long as its tokens and excludes the first."""
        curator, prompts = self._prepared()
        by_id = {prompt.id: prompt for prompt in prompts}
        for round_index in range(NUM_ROUNDS):
            for row in self._curate(curator, prompts.at_round(round_index)):
                self._require(row.prompt_id in by_id, f"a row has prompt {row.prompt_id}, which is not in the run")
                prompt_ids = by_id[row.prompt_id].input_ids
                starts = row.input_ids[: len(prompt_ids)] == prompt_ids
                self._require(starts, "a row must begin with its prompt's tokens")
                self._require(len(row.response_mask) == len(row.input_ids), "a mask must be as long as the tokens")
                self._require(not row.response_mask[0], "a row must not train on its first token")

    def test_is_deterministic(self) -> None:
        """All ranks get the same rows: no random state matters, and a round may be curated again."""
        (first, prompts), (second, _) = self._prepared(), self._prepared()
        for round_index in range(NUM_ROUNDS):
            torch.manual_seed(round_index)
            round_prompts = prompts.at_round(round_index)
            expected = self._curate(first, round_prompts)
            self._require(self._curate(second, round_prompts) == expected, "two copies must return the same rows")
            again = self._curate(first, round_prompts)
            self._require(again == expected, "a round that is curated again must return the same rows")
            self._move(round_index, first, second)

    def test_resumes_from_a_checkpoint(self) -> None:
        """A new curator that loads its state within a round returns that round's rows again, and then the next ones."""
        for stop in range(NUM_ROUNDS):
            (curator, prompts), (resumed, _) = self._prepared(), self._prepared()
            for round_index in range(stop + 1):
                expected = self._curate(curator, prompts.at_round(round_index))
                self._move(round_index, curator)
            resumed.load_state_dict(copy.deepcopy(curator.state_dict()))
            self._move(stop, resumed)
            rows = self._curate(resumed, prompts.at_round(stop))
            self._require(rows == expected, f"resumed within round {stop}, it must return the same rows")
            original, continued = (self._curate(each, prompts.at_round(stop + 1)) for each in (curator, resumed))
            self._require(original == continued, f"resumed within round {stop}, the next round must have the same rows")

    def test_may_be_prefetched(self) -> None:
        """Training continues between `on_round_start` and `curate`; after a resume two rounds may be curated again."""
        (prefetching, prompts), (plain, _), (resumed, _) = self._prepared(), self._prepared(), self._prepared()
        previous: Sequence[Row] = ()
        for round_index in range(NUM_ROUNDS):
            prefetching.on_round_start(round_index)
            plain.on_round_start(round_index)
            expected = self._curate(plain, prompts.at_round(round_index))
            self._move(round_index, prefetching, plain)
            rows = self._curate(prefetching, prompts.at_round(round_index))
            self._require(rows == expected, "curate must use the state at on_round_start, not that after training")
            resumed.load_state_dict(copy.deepcopy(prefetching.state_dict()))
            for again, same_rows in ((round_index - 1, previous), (round_index, rows)):
                if again >= 0:
                    resumed.on_round_start(again)
                    same = self._curate(resumed, prompts.at_round(again)) == same_rows
                    self._require(
                        same, f"resumed after prefetching round {round_index}, round {again} must be the same"
                    )
            previous = rows

    def test_each_schedule_has_a_name_in_the_log(self) -> None:
        """`schedules` returns every schedule within the curator."""
        missing = unlogged_schedules(self.make())
        self._require(not missing, f"schedules() must name each schedule for the log, it leaves out {missing}")

    def _prepared(self) -> tuple[Curator, Prompts]:
        curator, prompts = copy.deepcopy(self.make()), self.prompts()
        curator.prepare(prompts, self._generators(curator))
        return curator, prompts

    def _generators(self, curator: Curator) -> Mapping[str, Generator]:
        return {name: SeededGenerator(name) for name in curator.writers}

    def _curate(self, curator: Curator, prompts: Prompts) -> Sequence[Row]:
        return list(curator.curate(prompts, self._generators(curator)))

    def _move(self, step: int, *curators: Curator) -> None:
        for curator in curators:
            curator.update(Progress(step + 1, NUM_ROUNDS), {})

    def _require(self, condition: bool, promise: str) -> None:
        if not condition:
            raise broken(self.make(), promise)


class SeededGenerator(Generator):
    """Generates random tokens, each response from its own seed only, some of them cut; its text is their sum.

    Args:
        writer: Name that is part of the seeds: generators of different writers return different responses.
    """

    needs_models = ()

    def __init__(self, writer: str) -> None:
        self.writer = writer

    def refresh(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Does nothing."""

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """One response of 1 to 6 tokens per prompt, in their order."""
        return [self._response(prompt, sampling.seed_of(prompts.round, prompt.id)) for prompt in prompts]

    def _response(self, prompt: Prompt, seed: int) -> Response:
        random = Random(f"{self.writer}/{seed}")
        tokens = tuple(random.randrange(2, 100) for _ in range(random.randint(1, 6)))
        log_probs = tuple(-random.random() for _ in tokens)
        cut = random.random() < 0.2
        return Response(prompt.id, tokens, str(sum(tokens)), "length" if cut else "stop", log_probs)


def make_prompts(count: int) -> Prompts:
    """Prompts of different lengths, each with its own reference response that ends in a number.

    Args:
        count: Number of prompts.
    """
    return Prompts(tuple(_prompt(index) for index in range(count)))


def _prompt(index: int) -> Prompt:
    ids = tuple(range(10, 13 + index % 4))
    message = {"role": "user", "content": f"Question {index}"}
    mask = (False,) * len(ids) + (True, True)
    worse = (*ids, 50 + index, 60 + index, 1)
    reference = f"It is {index}."
    return Prompt(f"p{index}", (message,), ids, (*ids, 50 + index, 1), mask, reference, rejected_ids=worse)
