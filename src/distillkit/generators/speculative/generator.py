"""Generator for speculative decoding: the student drafts tokens, the teacher checks them."""

import logging
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from distillkit.errors import ConfigError
from distillkit.generators.progress import token_bar
from distillkit.generators.speculative.acceptance import Acceptance, Exact, Rule, TopK, Typical
from distillkit.generators.speculative.drafting import Drafting, SpeculativeResult
from distillkit.generators.texts import decoded
from distillkit.interfaces import Generator
from distillkit.models.heads import logits_width
from distillkit.models.modes import evaluating
from distillkit.models.structure import base_model
from distillkit.models.tokenizers import eos_ids, vocab_size
from distillkit.types import Prompt, Prompts, Response, Sampling, Tokenizer

_log = logging.getLogger(__name__)

RuleName = Literal["exact", "top_k", "typical"]


class SpeculativeGenerator(Generator):
    """Speculative decoding: the student drafts a block of tokens, and one forward pass of the teacher checks it.

    Both models sample with the same temperature, top-k and top-p. The draft is accepted up to the first token that the
    rule rejects; a token from the teacher's distribution replaces it, and the next block starts after it.

    Args:
        rule: Draft tokens that are accepted. `exact`: rejection sampling, the response is distributed as if the teacher
            had generated it. `top_k`: tokens among the teacher's `top_k` most likely. `typical`: tokens with
            p(token) > min(`epsilon`, `delta`·exp(−H(p))).
        block: Tokens per draft, at least 1. It changes the speed, not the distribution of the responses.
        top_k: K of the rule `top_k`, at least 1; None is 25, as in the paper. Not to be confused with `sampling.top_k`,
            which restricts the sampling.
        epsilon: ε of the rule `typical`, in (0, 1); None is 0.09.
        delta: δ of the rule `typical`, in (0, 1]; None is the square root of ε, as in the paper.
        batch_size: Prompts per batch.
        progress: Whether a progress bar is shown.

    Raises:
        ConfigError: If a setting is outside its range or belongs to another rule.
    """

    needs_models = ("student", "teacher")

    _models: nn.ModuleDict
    _tokenizer: Tokenizer

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
        for name, value in (("block", block), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"SpeculativeGenerator.{name} must be at least 1, got {value}.")
        self.rule = make_rule(rule, top_k, epsilon, delta)
        self.block, self.batch_size, self.progress = block, batch_size, progress
        self.acceptance = Acceptance()
        """Counts of draft tokens since `refresh`: those of one round."""
        self._eos: tuple[int, ...] = ()

    def refresh(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Takes the current weights of both models, without copying them, and resets the counts."""
        assert isinstance(model, nn.ModuleDict), "needs_models names two"
        self._models, self._tokenizer = model, tokenizer
        self._eos = eos_ids(tokenizer, base_model(self._models["teacher"]))
        self.acceptance = Acceptance()

    def identity(self) -> str:
        """The rule with its settings, and the block length."""
        return f"speculative {self.rule!r} block={self.block}"

    def metrics(self) -> Mapping[str, float]:
        """Share of the judged draft tokens that were accepted, and tokens per forward pass of the teacher."""
        if not self.acceptance.judged:
            return {}
        return {"acceptance": self.acceptance.rate, "tokens_per_check": self.acceptance.tokens_per_check}

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """Generates one response per prompt, in their order. `stop` means an end token of the teacher."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].input_ids))
        responses: dict[int, Response] = {}
        with evaluating(self._models), token_bar("generate", len(prompts), self.progress) as advance:
            for start in range(0, len(order), self.batch_size):
                indices = order[start : start + self.batch_size]
                results = self._generate_batch([prompts[index] for index in indices], prompts.round, sampling)
                for index, result in zip(indices, results, strict=True):
                    responses[index] = self._response(prompts[index], result)
                advance(len(indices), sum(len(result.tokens) for result in results))
        counts = self.acceptance
        _log.info(
            "the teacher accepted %d of %d draft tokens in round %d (%.1f %%), %.2f tokens per forward pass",
            counts.accepted,
            counts.judged,
            prompts.round,
            100 * counts.rate,
            counts.tokens_per_check,
        )
        return [responses[index] for index in range(len(prompts))]

    def _generate_batch(self, prompts: list[Prompt], round_index: int, sampling: Sampling) -> list[SpeculativeResult]:
        teacher, student = self._models["teacher"], self._models["student"]
        # A tokenizer may have tokens without logits, and the models may have logits without tokens.
        vocab = min(vocab_size(self._tokenizer), logits_width(student), logits_width(teacher))
        drafting = Drafting(student, teacher, vocab, self.rule, self.block, self._eos, sampling, self.acceptance)
        width = max(len(prompt.input_ids) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(prompt.input_ids)) + list(prompt.input_ids) for prompt in prompts])
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts])
        mask = (torch.arange(width) >= width - lengths[:, None]).long()  # [R, W]
        seeds = [sampling.seed_of(round_index, prompt.id) for prompt in prompts]
        uniform = torch.stack([_uniform(seed, sampling.max_new_tokens) for seed in seeds])
        device = base_model(student).device
        return drafting.generate(ids.to(device), mask.to(device), uniform.to(device))

    def _response(self, prompt: Prompt, result: SpeculativeResult) -> Response:
        tokens = result.tokens
        text = decoded(self._tokenizer, tokens, self._eos, prompt)
        finish: Literal["stop", "length"] = "stop" if tokens[-1] in self._eos else "length"
        return Response(prompt.id, tuple(tokens), text, finish, tuple(result.log_probs))


def make_rule(name: RuleName, top_k: int | None, epsilon: float | None, delta: float | None) -> Rule:
    """Builds the rule with this name and these settings; None selects a setting's default.

    Raises:
        ConfigError: If the name is unknown, or a setting is outside its range or belongs to another rule.
    """
    settings = {"top_k": ("top_k", top_k), "epsilon": ("typical", epsilon), "delta": ("typical", delta)}
    for setting, (owner, value) in settings.items():
        if value is not None and owner != name:
            raise ConfigError(
                f"SpeculativeGenerator.{setting} belongs to the rule {owner}, but rule is {name}. Remove it, or set "
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
