"""Continuing prompts with the model that is given."""

from typing import Any

import torch
from distillkit.errors import ConfigError
from distillkit.interfaces import Generator
from distillkit.models.scoring import base_model, evaluating
from distillkit.models.tokenizers import eos_ids
from distillkit.types import Prompt, Prompts, Response, Sampling
from torch import Tensor, nn


class MyPlugin(Generator):
    """Min-p sampling: a token may be drawn if it is at least `min_p` times as likely as the likeliest.

    Nguyen et al. 2024, arXiv 2407.01082. One prompt at a time and without a cache of keys and values, for clarity:
    `distillkit.generators.in_process` has both.

    Args:
        min_p: Share in [0, 1] of the likeliest token's probability.

    Raises:
        ConfigError: If `min_p` is outside [0, 1].
    """

    def __init__(self, min_p: float = 0.1) -> None:
        if not 0 <= min_p <= 1:
            raise ConfigError(f"MyPlugin.min_p must lie in [0, 1], got {min_p}.")
        self.min_p = min_p
        self._model: Any = None
        self._tokenizer: Any = None
        self._eos: tuple[int, ...] = ()

    def identity(self) -> str:
        """`min_p`: the responses depend on it."""
        return f"min_p={self.min_p}"

    def check(self, sampling: Sampling) -> None:
        """Refuses top-p and top-k, in whose place `min_p` stands.

        Raises:
            ConfigError: If they would be applied.
        """
        if sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0):
            raise ConfigError(
                f"MyPlugin draws by min_p, got top_p {sampling.top_p} and top_k {sampling.top_k}: "
                "set sampling to top_p 1 and top_k 0."
            )

    def refresh(self, model: nn.Module, tokenizer: Any) -> None:
        """Takes the model as it is now."""
        self._model, self._tokenizer, self._eos = model, tokenizer, eos_ids(tokenizer, base_model(model))

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """One response per prompt, in their order, each from a seed of its own."""
        with evaluating(self._model), torch.no_grad():
            return [self._respond(each, sampling, sampling.seed_of(prompts.round, each.id)) for each in prompts]

    def _respond(self, prompt: Prompt, sampling: Sampling, seed: int) -> Response:
        random = torch.Generator().manual_seed(seed)
        device = base_model(self._model).device
        tokens: list[int] = []
        log_probs: list[float] = []
        while len(tokens) < sampling.max_new_tokens and (not tokens or tokens[-1] not in self._eos):
            ids = torch.tensor([[*prompt.input_ids, *tokens]], device=device)
            # A head may be wider than the tokenizer: those tokens are never written.
            logits = self._model(input_ids=ids, use_cache=False).logits[0, -1, : len(self._tokenizer)].float().cpu()
            tokens.append(self._draw(logits, sampling.temperature, random))
            log_probs.append(float(logits.log_softmax(-1)[tokens[-1]]))
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
        ended = tokens[-1] in self._eos
        return Response(prompt.id, tuple(tokens), text, "stop" if ended else "length", tuple(log_probs))

    def _draw(self, logits: Tensor, temperature: float, random: torch.Generator) -> int:
        """A token by `[V]` logits."""
        if temperature == 0:
            return int(logits.argmax())
        probs = (logits / temperature).softmax(-1)
        kept = probs.masked_fill(probs < self.min_p * probs.max(), 0.0)
        return int(torch.multinomial(kept, 1, generator=random))
