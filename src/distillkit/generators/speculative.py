"""Speculative writing: the student drafts, the teacher checks."""

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from distillkit.errors import ConfigError
from distillkit.generators.acceptance import Acceptance, Exact, Rule, TopK, Typical
from distillkit.generators.drafting import Drafting, Written
from distillkit.generators.progress import token_bar
from distillkit.interfaces import Generator
from distillkit.models.scoring import base_model, evaluating
from distillkit.models.tokenizers import eos_ids
from distillkit.types import Prompt, Prompts, Response, Sampling

_log = logging.getLogger(__name__)

RuleName = Literal["exact", "top_k", "typical"]


class SpeculativeGenerator(Generator):
    """The student drafts a block of tokens, and one forward pass of the teacher checks it.

    Both draw with the same temperature, top-k and top-p. The draft is kept up to the first token that the rule rejects;
    a token that the teacher's distribution gives takes its place, and the next block begins behind it.

    Args:
        rule: Which draft tokens stay. `exact`: rejection sampling, the response is distributed as the teacher's own.
            `top_k`: those among the teacher's `top_k` likeliest. `typical`: those with
            p(token) > min(`epsilon`, `delta`·exp(−H(p))).
        block: Tokens that are drafted at once, at least 1. It changes the speed, not the distribution of the responses.
        top_k: K of the rule `top_k`, at least 1; None is 25, the paper's. Not `sampling.top_k`, which bounds what is
            drawn.
        epsilon: ε of the rule `typical`, in (0, 1); None is 0.09.
        delta: δ of the rule `typical`, in (0, 1]; None is the square root of ε, as in the paper.
        batch_size: Prompts continued at once.
        progress: Whether a progress bar is shown.

    Raises:
        ConfigError: If a setting is outside its range or belongs to another rule.
    """

    models = ("student", "teacher")

    def __init__(
        self,
        rule: RuleName = "exact",
        block: int = 4,
        top_k: int | None = None,
        epsilon: float | None = None,
        delta: float | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> None:
        for name, number in (("block", block), ("batch_size", batch_size)):
            if number < 1:
                raise ConfigError(f"SpeculativeGenerator.{name} must be at least 1, got {number}.")
        self.rule = make_rule(rule, top_k, epsilon, delta)
        self.block, self.batch_size, self.progress = block, batch_size, progress
        self.acceptance = Acceptance()
        """How the drafts fared since the weights came: those of one round."""
        self._models: Any = None
        self._tokenizer: Any = None
        self._eos: tuple[int, ...] = ()

    def refresh(self, model: nn.Module, tokenizer: Any) -> None:
        """Takes the weights that both models have now, without copying them, and counts from 0."""
        self._models, self._tokenizer = model, tokenizer
        self._eos = eos_ids(tokenizer, base_model(self._models["teacher"]))
        self.acceptance = Acceptance()

    def identity(self) -> str:
        """Rule, its settings and the length of a block."""
        return f"speculative {self.rule!r} block={self.block}"

    def figures(self) -> Mapping[str, float]:
        """Share of the judged draft tokens that stayed, and tokens per forward pass of the teacher."""
        if not self.acceptance.judged:
            return {}
        return {"acceptance": self.acceptance.rate, "tokens_per_check": self.acceptance.tokens_per_check}

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """One response per prompt, in their order. `stop` is an end of turn as the teacher has it."""
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].input_ids))
        found: dict[int, Response] = {}
        with evaluating(self._models), token_bar("generate", len(prompts), self.progress) as advance:
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                asked = [prompts[place] for place in places]
                written = self._write(asked, prompts.round, sampling)
                found |= {
                    place: self._response(prompt, own)
                    for place, prompt, own in zip(places, asked, written, strict=True)
                }
                advance(len(places), sum(len(own.tokens) for own in written))
        counts = self.acceptance
        _log.info(
            "the teacher kept %d of %d draft tokens in round %d (%.1f %%), %.2f tokens for each of its forward passes",
            counts.accepted, counts.judged, prompts.round, 100 * counts.rate, counts.tokens_per_check,
        )  # fmt: skip
        return [found[place] for place in range(len(prompts))]

    def _write(self, prompts: list[Prompt], round_number: int, sampling: Sampling) -> list[Written]:
        teacher, student = self._models["teacher"], self._models["student"]
        drafting = Drafting(
            student, teacher, len(self._tokenizer), self.rule, self.block, self._eos, sampling, self.acceptance
        )
        width = max(len(prompt.input_ids) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(prompt.input_ids)) + list(prompt.input_ids) for prompt in prompts])
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts])
        mask = (torch.arange(width) >= width - lengths[:, None]).long()  # [R, W]
        seeds = [sampling.seed_of(round_number, prompt.id) for prompt in prompts]
        uniform = torch.stack([_uniform(seed, sampling.max_new_tokens) for seed in seeds])
        device = base_model(student).device
        return drafting.write(ids.to(device), mask.to(device), uniform.to(device))

    def _response(self, prompt: Prompt, written: Written) -> Response:
        tokens = written.tokens
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
        finish: Literal["stop", "length"] = "stop" if tokens[-1] in self._eos else "length"
        return Response(prompt.id, tuple(tokens), text, finish, tuple(written.log_probs))


def make_rule(name: RuleName, top_k: int | None, epsilon: float | None, delta: float | None) -> Rule:
    """The rule of that name with its settings, or its own where they are None.

    Raises:
        ConfigError: If the name is unknown, or a setting is outside its range or belongs to another rule.
    """
    settings = {"top_k": ("top_k", top_k), "epsilon": ("typical", epsilon), "delta": ("typical", delta)}
    for setting, (owner, value) in settings.items():
        if value is not None and owner != name:
            raise ConfigError(
                f"SpeculativeGenerator.{setting} belongs to the rule {owner}, and rule is {name}: leave it out, or set "
                f"rule to {owner}."
            )
    if name == "exact":
        return Exact()
    if name == "top_k":
        k = 25 if top_k is None else top_k
        if k < 1:
            raise ConfigError(f"SpeculativeGenerator.top_k must be at least 1, got {k}.")
        return TopK(k)
    if name == "typical":
        epsilon = 0.09 if epsilon is None else epsilon
        if not 0 < epsilon < 1:
            raise ConfigError(f"SpeculativeGenerator.epsilon must lie strictly between 0 and 1, got {epsilon}.")
        delta = math.sqrt(epsilon) if delta is None else delta
        if not 0 < delta <= 1:
            raise ConfigError(f"SpeculativeGenerator.delta must lie in (0, 1], got {delta}.")
        return Typical(epsilon, delta)
    raise ConfigError(f"SpeculativeGenerator.rule must be exact, top_k or typical, got {name!r}.")


def _uniform(seed: int, length: int) -> torch.Tensor:
    """`[length, 3]` uniform numbers in [0, 1)."""
    return torch.rand(length, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
