"""The best of several responses, as a verifier judges them."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from distillkit.curators.single import SampledCurator
from distillkit.curators.wrapped import WrappedCurator
from distillkit.errors import ConfigError, DataError
from distillkit.interfaces import Generator, Verifier
from distillkit.types import Prompts, Response, Row

_log = logging.getLogger(__name__)


class BestOfN(WrappedCurator):
    """Of n samples of a model to each prompt the one that a verifier scores highest, the first of those that are equal.

    Sample i has the curator's own base seed plus i: sample 0 is what the curator would have written by itself.

    Args:
        curator: The curator whose model writes the samples.
        verifier: Scores them.
        n: Samples of each prompt, at least 2.

    Raises:
        ConfigError: If `n` is below 2, or the curator samples at temperature 0, where all samples are the same.
    """

    curator: SampledCurator

    def __init__(self, curator: SampledCurator, verifier: Verifier, n: int = 4) -> None:
        super().__init__(curator)
        if n < 2:
            raise ConfigError(f"BestOfN.n must be at least 2 (one sample is what the curator alone writes), got {n}.")
        if curator.sampling.temperature == 0:
            raise ConfigError(
                f"BestOfN needs samples that differ, and {type(curator).__name__}.sampling has temperature 0: raise it."
            )
        self.verifier, self.n = verifier, n
        self.needs_reference = curator.needs_reference or verifier.needs_reference

    def prepare(self, prompts: Prompts, generators: Mapping[str, Generator]) -> None:
        """Has every sample written that is written once."""
        self.verifier.check(prompts)
        if self.rounds == "once":
            self._samples(prompts, generators)

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """One row per prompt.

        Raises:
            DataError: If the verifier can't judge a response, or gives something else than a number for each.
        """
        self.verifier.check(prompts)
        samples = self._samples(prompts, generators)
        scores = [self._scores(prompts, responses) for responses in samples]
        best = [column.index(max(column)) for column in zip(*scores, strict=True)]
        self._report(prompts.round, scores)
        return [
            self.curator.row(prompt, samples[number][place])
            for place, (prompt, number) in enumerate(zip(prompts, best, strict=True))
        ]

    def _samples(self, prompts: Prompts, generators: Mapping[str, Generator]) -> list[Sequence[Response]]:
        """The i-th sample of every prompt, for each i."""
        base = self.curator.sampling
        settings = [replace(base, seed=base.seed + number) for number in range(self.n)]
        return [self.curator.respond(prompts, generators, sampling) for sampling in settings]

    def _scores(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        scores = self.verifier.verify(prompts, responses)
        if len(scores) != len(responses) or any(math.isnan(score) for score in scores):
            raise DataError(
                f"{type(self.verifier).__name__} must give a number for each of {len(responses)} responses, got "
                f"{len(scores)} with {sum(math.isnan(score) for score in scores)} NaN."
            )
        return scores

    def _report(self, round_number: int, scores: Sequence[Sequence[float]]) -> None:
        columns = list(zip(*scores, strict=True))
        differing = sum(len(set(column)) > 1 for column in columns)
        count = len(columns)
        _log.info(
            "BestOfN, round %d, %d prompts: %s is %.4g in the mean, %.4g of the first samples and %.4g of the best of "
            "%d; the choice mattered for %d prompts (%.1f %%)",
            round_number, count, type(self.verifier).__name__, sum(map(sum, columns)) / (count * self.n),
            sum(scores[0]) / count, sum(map(max, columns)) / count, self.n, differing, 100 * differing / count,
        )  # fmt: skip
