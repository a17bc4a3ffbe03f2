"""The promises that every curator keeps, as tests: `check_curator` for one, `CuratorContract` for pytest."""

import copy
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import nn

from distillkit.interfaces import Curator, Generator
from distillkit.types import Progress, Prompt, Prompts, Response, Row, Sampling

NUM_PROMPTS, NUM_ROUNDS = 12, 4


def check_curator(curator: Curator) -> None:
    """Checks every promise of `CuratorContract`.

    Args:
        curator: The curator, before its first round; it is copied, not changed.

    Raises:
        AssertionError: If a promise is broken; the message says which.
    """
    contract = CuratorContract()
    contract.make = lambda: curator  # type: ignore[method-assign]
    for name in dir(contract):
        if name.startswith("test_"):
            getattr(contract, name)()


class CuratorContract:
    """What every `Curator` promises. Subclass it as `Test…`, and write `make`; pytest does the rest."""

    def make(self) -> Curator:
        """The curator under test, before its first round."""
        raise NotImplementedError("write make(), which returns the curator under test")

    def prompts(self) -> Prompts:
        """The prompts of a run, each with a response of its own; override it for a curator that needs others."""
        return make_prompts(NUM_PROMPTS)

    def test_says_how_long_a_round_lasts(self) -> None:
        """`rounds` is `once`, `epoch` or a number of optimizer steps."""
        rounds = self.make().rounds
        named = rounds in ("once", "epoch") or (isinstance(rounds, int) and rounds >= 1)
        self._require(named, f"rounds must be once, epoch or a number of steps from 1, got {rounds!r}")

    def test_gives_each_prompt_as_many_rows_as_every_other(self) -> None:
        """In every round, whatever its size; the rows of one prompt stand together."""
        curator, prompts = self._prepared()
        sizes = set()
        for number in range(NUM_ROUNDS):
            asked = Prompts(prompts.items[number:], number)
            rows = self._curate(curator, asked)
            size, rest = divmod(len(rows), len(asked))
            self._require(size > 0 and rest == 0, f"{len(asked)} prompts got {len(rows)} rows")
            sizes.add(size)
            groups = [rows[start : start + size] for start in range(0, len(rows), size)]
            together = all(len({row.prompt_id for row in group}) == 1 for group in groups)
            self._require(together, "the rows of one prompt must stand together")
        self._require(len(sizes) == 1, f"the number of rows per prompt must not change, got {sorted(sizes)}")

    def test_gives_rows_that_can_be_trained_on(self) -> None:
        """A row begins with its prompt; its mask is as long as its tokens and leaves out the first."""
        curator, prompts = self._prepared()
        known = {prompt.id: prompt for prompt in prompts}
        for number in range(NUM_ROUNDS):
            for row in self._curate(curator, prompts.at_round(number)):
                self._require(row.prompt_id in known, f"a row is of prompt {row.prompt_id}, for which nobody asked")
                own = known[row.prompt_id].input_ids
                self._require(row.input_ids[: len(own)] == own, "a row must begin with its prompt's tokens")
                self._require(len(row.response_mask) == len(row.input_ids), "a mask must be as long as the tokens")
                self._require(not row.response_mask[0], "a row must not train on its first token")

    def test_gives_the_same_rows_to_the_same_question(self) -> None:
        """On every rank: nothing depends on a random state, and a round may be asked for again."""
        (first, prompts), (second, _) = self._prepared(), self._prepared()
        for number in range(NUM_ROUNDS):
            torch.manual_seed(number)
            expected = self._curate(first, prompts.at_round(number))
            self._require(self._curate(second, prompts.at_round(number)) == expected, "two copies give different rows")
            again = self._curate(first, prompts.at_round(number))
            self._require(again == expected, "a round that is asked for again gives different rows")
            self._move(number, first, second)

    def test_goes_on_where_its_checkpoint_stopped(self) -> None:
        """Saved within a round and loaded into a fresh curator, it gives that round's rows again, and then the next."""
        for stop in range(NUM_ROUNDS):
            (curator, prompts), (resumed, _) = self._prepared(), self._prepared()
            for number in range(stop + 1):
                expected = self._curate(curator, prompts.at_round(number))
                self._move(number, curator)
            resumed.load_state_dict(copy.deepcopy(curator.state_dict()))
            self._move(stop, resumed)
            found = self._curate(resumed, prompts.at_round(stop))
            self._require(found == expected, f"resumed within round {stop} it gives other rows")
            following = [self._curate(one, prompts.at_round(stop + 1)) for one in (curator, resumed)]
            self._require(following[0] == following[1], f"resumed within round {stop} it goes on with other rows")

    def test_may_be_written_ahead(self) -> None:
        """Training moves between `begin` and `curate`; a checkpoint may hold two rounds that are asked for again."""
        (ahead, prompts), (plain, _), (resumed, _) = self._prepared(), self._prepared(), self._prepared()
        before: Sequence[Row] = ()
        for number in range(NUM_ROUNDS):
            ahead.begin(number)
            plain.begin(number)
            expected = self._curate(plain, prompts.at_round(number))
            self._move(number, ahead, plain)
            found = self._curate(ahead, prompts.at_round(number))
            self._require(found == expected, "a round that is written after training moved has other rows")
            resumed.load_state_dict(copy.deepcopy(ahead.state_dict()))
            for again, rows in ((number - 1, before), (number, found)):
                if again >= 0:
                    resumed.begin(again)
                    same = self._curate(resumed, prompts.at_round(again)) == rows
                    self._require(same, f"resumed while round {number} was written ahead, round {again} has other rows")
            before = found

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

    def _require(self, kept: bool, promise: str) -> None:
        if not kept:
            raise AssertionError(f"{type(self.make()).__name__} breaks its contract: {promise}.")


class SeededGenerator(Generator):
    """Writes random tokens, each response from its own seed alone, some of them cut; its text is their sum.

    Args:
        writer: Part of the seeds: two writers write differently.
    """

    models = ()

    def __init__(self, writer: str) -> None:
        self.writer = writer

    def refresh(self, model: nn.Module, tokenizer: Any) -> None:
        """Takes nothing."""

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
    """Prompts of different lengths, each with a response of its own that ends in a number.

    Args:
        count: Number of prompts.
    """
    return Prompts(tuple(_prompt(number) for number in range(count)))


def _prompt(number: int) -> Prompt:
    ids = tuple(range(10, 13 + number % 4))
    message = {"role": "user", "content": f"Question {number}"}
    mask = (False,) * len(ids) + (True, True)
    return Prompt(f"p{number}", (message,), ids, (*ids, 50 + number, 1), mask, reference=f"It is {number}.")
