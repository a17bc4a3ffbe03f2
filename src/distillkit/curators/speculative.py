"""Speculative decoding: responses that the student drafts and the teacher verifies."""

from typing import ClassVar

from distillkit.curators.base import Rounds
from distillkit.curators.single import SampledCurator
from distillkit.generators.speculative.generator import RuleName, SpeculativeGenerator
from distillkit.types import Sampling


class SpeculativeCurator(SampledCurator):
    """Responses drafted by the student as it is when the round starts; the teacher replaces the tokens it rejects.

    Args:
        rule: Rule by which draft tokens are accepted. `exact`: rejection sampling, responses follow the teacher's
            distribution. `top_k`: those among the teacher's `top_k` likeliest. `typical`: those with
            p(token) > min(`epsilon`, `delta`·exp(−H(p))).
        block: Tokens drafted at once, at least 1. It changes the speed, not the distribution of the responses.
        top_k: K of the rule `top_k`, at least 1; None is 25, the paper's. Not `sampling.top_k`, which
            restricts sampling.
        epsilon: ε of the rule `typical`, in (0, 1); None is 0.09.
        delta: δ of the rule `typical`, in (0, 1]; None is the square root of ε, as in the paper.
        sampling: Sampling of both models; None is temperature 0.8 and top-p 0.95.
        rounds: How long a round lasts: `once`, `epoch`, `step`, or `{every: n}` optimizer steps. None is `once` for the
            rule `exact`, whose responses don't change as the student learns, and `epoch` for the others.
        batch_size: Prompts continued at once.
        progress: Whether a progress bar is shown.

    Raises:
        ConfigError: If a setting is outside its range or belongs to another rule, or `rounds` is none of these.
    """

    writer: ClassVar[str] = "speculative"

    def __init__(
        self,
        rule: RuleName = "exact",
        block: int = 4,
        top_k: int | None = None,
        epsilon: float | None = None,
        delta: float | None = None,
        sampling: Sampling | None = None,
        rounds: Rounds | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> None:
        generator = SpeculativeGenerator(rule, block, top_k, epsilon, delta, batch_size, progress)
        rounds = ("once" if generator.rule.lossless else "epoch") if rounds is None else rounds
        super().__init__(sampling or Sampling(), rounds, generator)
