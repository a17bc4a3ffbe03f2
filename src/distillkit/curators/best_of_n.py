"""Best-of-n sampling: the response that a verifier scores highest."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from distillkit.curators.base import WrappedCurator
from distillkit.curators.single import SampledCurator
from distillkit.devices.seeds import resolve_seed
from distillkit.errors import ConfigError, DataError, check_range
from distillkit.interfaces import Generator, Verifier
from distillkit.types import Prompts, Response, Row

_log = logging.getLogger(__name__)

SEED_STRIDE = 1_000_003
"""Difference between the base seeds of two samples."""


class BestOfN(WrappedCurator):
    """Samples n responses to each prompt and trains on the one that a verifier scores highest, the first of equal ones.

    Sample 0 is the response that the curator alone would give. The base seeds of the others lie far away, so that runs
    with neighbouring seeds share no sample.

    Args:
        curator: The curator whose model generates the samples.
        verifier: Scores the samples.
        n: Samples per prompt, at least 2.

    Raises:
        ConfigError: If `n` is below 2, or the curator samples at temperature 0, where all samples are equal.
    """

    curator: SampledCurator

    def __init__(self, curator: SampledCurator, verifier: Verifier, n: int = 4) -> None:
        super().__init__(curator)
        check_range("BestOfN.n", n, 2, note=" (a single sample is the curator's response)")
        if curator.sampling.temperature == 0:
            raise ConfigError(
                f"BestOfN needs different samples, and {type(curator).__name__}.sampling has temperature 0: raise it."
            )
        self.verifier, self.n = verifier, n
        self.needs_reference = curator.needs_reference or verifier.needs_reference

    def prepare(self, prompts: Prompts, generators: Mapping[str, Generator]) -> None:
        """Generates all samples if they are generated once."""
        self.verifier.check(prompts)
        if self.rounds == "once":
            self._samples(prompts, generators)

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """One row per prompt.

        Raises:
            DataError: If the verifier can't score a response, or does not return one number for each.
        """
        self.verifier.check(prompts)
        samples = self._samples(prompts, generators)
        scores = [self._scores(prompts, responses) for responses in samples]
        best = [column.index(max(column)) for column in zip(*scores, strict=True)]
        self._report(prompts.round, scores)
        return [
            self.curator.row(prompt, samples[sample_index][index])
            for index, (prompt, sample_index) in enumerate(zip(prompts, best, strict=True))
        ]

    def _samples(self, prompts: Prompts, generators: Mapping[str, Generator]) -> list[Sequence[Response]]:
        """The i-th sample of every prompt, for each i."""
        base = self.curator.sampling
        samplings = [
            replace(base, seed=resolve_seed(base.seed) + sample_index * SEED_STRIDE) for sample_index in range(self.n)
        ]
        return [self.curator.respond(prompts, generators, sampling) for sampling in samplings]

    def _scores(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        scores = self.verifier.verify(prompts, responses)
        if len(scores) != len(responses) or any(math.isnan(score) for score in scores):
            raise DataError(
                f"{type(self.verifier).__name__} must give a number for each of {len(responses)} responses, got "
                f"{len(scores)} with {sum(math.isnan(score) for score in scores)} NaN."
            )
        return scores

    def _report(self, round_index: int, scores: Sequence[Sequence[float]]) -> None:
        by_prompt = list(zip(*scores, strict=True))
        num_differing = sum(len(set(column)) > 1 for column in by_prompt)
        num_prompts = len(by_prompt)
        _log.info(
            "BestOfN, round %d, %d prompts: mean %s is %.4g over all samples, %.4g over the first and %.4g over "
            "the best of %d; the samples of %d prompts (%.1f %%) differ in score",
            round_index,
            num_prompts,
            type(self.verifier).__name__,
            sum(map(sum, by_prompt)) / (num_prompts * self.n),
            sum(scores[0]) / num_prompts,
            sum(map(max, by_prompt)) / num_prompts,
            self.n,
            num_differing,
            100 * num_differing / num_prompts,
        )
