"""The promises that every verifier keeps, as tests: `check_verifier` for one, `VerifierContract` for pytest."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from distillkit.interfaces import Verifier
from distillkit.testing.curators import SeededGenerator, make_prompts
from distillkit.types import Prompts, Response, Sampling

NUM_PROMPTS = 8


def check_verifier(verifier: Verifier) -> None:
    """Checks every promise of `VerifierContract`.

    Args:
        verifier: The verifier.

    Raises:
        AssertionError: If a promise is broken; the message says which.
    """
    contract = VerifierContract()
    contract.make = lambda: verifier  # type: ignore[method-assign]
    for name in dir(contract):
        if name.startswith("test_"):
            getattr(contract, name)()


class VerifierContract:
    """What every `Verifier` promises. Subclass it as `Test…`, and write `make`; pytest does the rest."""

    def make(self) -> Verifier:
        """The verifier under test."""
        raise NotImplementedError("write make(), which returns the verifier under test")

    def prompts(self) -> Prompts:
        """Prompts, each with a response of its own; override it for a verifier that needs others."""
        return make_prompts(NUM_PROMPTS)

    def responses(self, prompts: Prompts) -> Sequence[Response]:
        """A response to each prompt, one of them without text; override it for a verifier that needs others."""
        first, *others = SeededGenerator("student").generate(prompts, Sampling())
        return [replace(first, text=""), *others]

    def test_gives_each_response_one_finite_number(self) -> None:
        """As many numbers as responses, none of them infinite or not a number."""
        prompts = self.prompts()
        found = self._verify(prompts, self.responses(prompts))
        self._require(len(found) == len(prompts), f"{len(prompts)} responses got {len(found)} numbers")
        finite = all(isinstance(own, int | float) and math.isfinite(own) for own in found)
        self._require(finite, f"a number must be finite, got {found}")

    def test_judges_each_response_by_itself(self) -> None:
        """The number does not depend on what else is judged along with it, nor on the order."""
        prompts = self.prompts()
        responses = self.responses(prompts)
        found = self._verify(prompts, responses)
        alone = [
            self._verify(prompts[place : place + 1], responses[place : place + 1])[0] for place in range(len(found))
        ]
        self._require(alone == found, "a response that is judged alone gets another number")
        backwards = self._verify(prompts[::-1], list(responses)[::-1])
        self._require(backwards[::-1] == found, "in another order responses get other numbers")

    def test_gives_the_same_number_again(self) -> None:
        """Nothing depends on a random state, or on what was judged before."""
        prompts = self.prompts()
        responses = self.responses(prompts)
        found = []
        for seed in range(3):
            random.seed(seed)
            torch.manual_seed(seed)
            found.append(self._verify(prompts, responses))
        self._require(found[0] == found[1] == found[2], "a response that is judged again gets another number")

    def test_has_nothing_to_say_of_no_response(self) -> None:
        """No response, no number."""
        self._require(self._verify(self.prompts()[:0], []) == [], "no response must give no number")

    def _verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        verifier = self.make()
        verifier.check(prompts)
        return list(verifier.verify(prompts, responses))

    def _require(self, kept: bool, promise: str) -> None:
        if not kept:
            raise AssertionError(f"{type(self.make()).__name__} breaks its contract: {promise}.")
