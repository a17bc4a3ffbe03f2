"""Contract tests of verifiers: `check_verifier` for a single one, `VerifierContract` for pytest."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from distillkit.interfaces import Verifier
from distillkit.testing.contract import broken, run_tests
from distillkit.testing.curators import SeededGenerator, make_prompts
from distillkit.types import Prompts, Response, Sampling

NUM_PROMPTS = 8


def check_verifier(verifier: Verifier) -> None:
    """Runs all tests of `VerifierContract`.

    Args:
        verifier: The verifier under test.

    Raises:
        AssertionError: If a promise is broken; the message says which one.
    """
    contract = VerifierContract()
    run_tests(contract, lambda: verifier)


class VerifierContract:
    """The contract of every `Verifier` as tests. Subclass it as `Test…` and implement `make`; pytest does the rest."""

    def make(self) -> Verifier:
        """The verifier under test."""
        raise NotImplementedError("write make(): it returns the verifier under test")

    def prompts(self) -> Prompts:
        """Prompts, each with its own reference response; override it for a verifier that needs different ones."""
        return make_prompts(NUM_PROMPTS)

    def responses(self, prompts: Prompts) -> Sequence[Response]:
        """A response to each prompt, one of them without text; override it for a verifier that needs different ones."""
        first, *rest = SeededGenerator("student").generate(prompts, Sampling())
        return [replace(first, text=""), *rest]

    def test_each_response_gets_a_finite_score(self) -> None:
        """One number per response, neither infinite nor NaN."""
        prompts = self.prompts()
        scores = self._verify(prompts, self.responses(prompts))
        self._require(len(scores) == len(prompts), f"{len(prompts)} responses got {len(scores)} scores")
        finite = all(isinstance(score, int | float) and math.isfinite(score) for score in scores)
        self._require(finite, f"a score must be a finite number, got {scores}")

    def test_scores_each_response_independently(self) -> None:
        """A score depends neither on the other responses of the call nor on their order."""
        prompts = self.prompts()
        responses = self.responses(prompts)
        scores = self._verify(prompts, responses)
        alone = [self._verify(prompts[i : i + 1], responses[i : i + 1])[0] for i in range(len(scores))]
        self._require(alone == scores, "a response must get the same score when it is verified alone")
        backwards = self._verify(prompts[::-1], list(responses)[::-1])
        self._require(backwards[::-1] == scores, "responses must get the same scores in any order")

    def test_is_deterministic(self) -> None:
        """Scores depend neither on the global random state nor on earlier calls."""
        prompts = self.prompts()
        responses = self.responses(prompts)
        runs = []
        for seed in range(3):
            random.seed(seed)
            torch.manual_seed(seed)
            runs.append(self._verify(prompts, responses))
        self._require(runs[0] == runs[1] == runs[2], "a response must get the same score when it is verified again")

    def test_no_responses_get_no_scores(self) -> None:
        """An empty list of responses gets an empty list of scores."""
        self._require(
            self._verify(self.prompts()[:0], []) == [], "an empty list of responses must get an empty list of scores"
        )

    def _verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        verifier = self.make()
        verifier.check(prompts)
        return list(verifier.verify(prompts, responses))

    def _require(self, condition: bool, promise: str) -> None:
        if not condition:
            raise broken(self.make(), promise)
