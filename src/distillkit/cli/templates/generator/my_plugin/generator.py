"""A generator that samples responses with min-p."""

import torch
from distillkit.errors import ConfigError
from distillkit.generators import decoded
from distillkit.interfaces import Generator
from distillkit.models import base_model, eos_ids, evaluating, vocab_size
from distillkit.types import Prompt, Prompts, Response, Sampling, Tokenizer
from torch import Tensor, nn


class MyPlugin(Generator):
    """Min-p sampling: excludes tokens that are less than `min_p` times as likely as the most likely token.

    Nguyen et al. 2024, arXiv 2407.01082. For clarity it generates one prompt at a time, without a key-value cache;
    `distillkit.generators.transformers` has batches and a cache.

    Args:
        min_p: Minimum probability in [0, 1], relative to the most likely token.

    Raises:
        ConfigError: If `min_p` is outside [0, 1].
    """

    def __init__(self, min_p: float = 0.1) -> None:
        if not 0 <= min_p <= 1:
            raise ConfigError(f"MyPlugin.min_p must lie in [0, 1], got {min_p}.")
        self.min_p = min_p
        self._model: nn.Module | None = None
        self._tokenizer: Tokenizer | None = None
        self._eos: tuple[int, ...] = ()

    def identity(self) -> str:
        """The settings that the responses depend on."""
        return f"min_p={self.min_p}"

    def check(self, sampling: Sampling) -> None:
        """Refuses top-p and top-k, which `min_p` replaces.

        Raises:
            ConfigError: If top-p or top-k would take effect.
        """
        if sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0):
            raise ConfigError(
                f"MyPlugin samples with min_p only, got top_p {sampling.top_p} and top_k {sampling.top_k}. "
                "Set top_p to 1 and top_k to 0 in the sampling settings."
            )

    def refresh(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Uses this model and its current weights from now on."""
        self._model, self._tokenizer, self._eos = model, tokenizer, eos_ids(tokenizer, base_model(model))

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """Generates one response per prompt, in the order of the prompts; each has its own seed."""
        assert self._model is not None
        with evaluating(self._model), torch.no_grad():
            return [self._respond(prompt, sampling, sampling.seed_of(prompts.round, prompt.id)) for prompt in prompts]

    def _respond(self, prompt: Prompt, sampling: Sampling, seed: int) -> Response:
        assert self._model is not None
        assert self._tokenizer is not None
        random = torch.Generator().manual_seed(seed)
        device = base_model(self._model).device
        tokens: list[int] = []
        log_probs: list[float] = []
        while len(tokens) < sampling.max_new_tokens and (not tokens or tokens[-1] not in self._eos):
            ids = torch.tensor([[*prompt.input_ids, *tokens]], device=device)
            # The output head may be padded beyond the vocabulary: never sample its padding.
            output = self._model(input_ids=ids, use_cache=False)
            logits = output.logits[0, -1, : vocab_size(self._tokenizer)].float().cpu()
            tokens.append(self._sample(logits, sampling.temperature, random))
            log_probs.append(float(logits.log_softmax(-1)[tokens[-1]]))
        text = decoded(self._tokenizer, tokens, self._eos, prompt)
        ended = tokens[-1] in self._eos
        return Response(prompt.id, tuple(tokens), text, "stop" if ended else "length", tuple(log_probs))

    def _sample(self, logits: Tensor, temperature: float, random: torch.Generator) -> int:
        """Samples a token id from `[V]` logits."""
        if temperature == 0:
            return int(logits.argmax())
        probs = (logits / temperature).softmax(-1)
        likely = probs.masked_fill(probs < self.min_p * probs.max(), 0.0)
        return int(torch.multinomial(likely, 1, generator=random))
