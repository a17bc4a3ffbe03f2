"""Generation with a transformers model in this process.

Letters: R rows that are still generating, T tokens so far, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distillkit.devices.precision import fast_dtype
from distillkit.errors import ConfigError
from distillkit.generators.decoding import cache_use, decodable, start_rows
from distillkit.generators.progress import token_bar
from distillkit.generators.sampling import exact_dtype, sample_tokens, token_log_probs
from distillkit.generators.texts import decoded
from distillkit.interfaces import Generator
from distillkit.models.capabilities import capabilities
from distillkit.models.copies import deep_copy
from distillkit.models.heads import output_head
from distillkit.models.loading import DTYPES
from distillkit.models.modes import evaluating
from distillkit.models.structure import base_model
from distillkit.models.tokenizers import eos_ids, vocab_size
from distillkit.types import Prompt, Prompts, Response, Sampling, Tokenizer


@dataclass
class _Row:
    """A response in progress.

    Args:
        prompt: Token ids of the prompt.
        uniform: `[max_new_tokens]` uniform numbers, one per token of the response.
        tokens: Generated tokens, end of turn included.
        log_probs: Log-probability of each.
        ended: Whether the last token ends the turn.
    """

    prompt: tuple[int, ...]
    uniform: Tensor
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def ids(self) -> list[int]:
        """Token ids so far."""
        return [*self.prompt, *self.tokens]

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return 0 if self.ended else len(self.uniform) - len(self.tokens)


class TransformersGenerator(Generator):
    """Generates with the model in this process: left padding, KV cache, batches of prompts of similar length.

    A row that has ended leaves its batch. Each response is sampled with its own seed, and comes with the
    log-probability of each token under the model.

    Args:
        batch_size: Prompts per batch.
        dtype: Type of the weights during generation; float32 on a processor without instructions for that type. If it
            is not the model's type, the generator holds a copy of the weights; None shares the model's weights.
        progress: Whether a progress bar is shown.

    Raises:
        ConfigError: If `batch_size` is below 1.
    """

    _model: nn.Module
    _tokenizer: Tokenizer

    def __init__(
        self,
        batch_size: int = 64,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        progress: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"TransformersGenerator.batch_size must be at least 1, got {batch_size}.")
        self.batch_size, self.dtype, self.progress = batch_size, dtype, progress
        self._copy: nn.Module | None = None
        self._eos: tuple[int, ...] = ()
        self._vocab = 0

    def refresh(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Takes the current weights of `model`: shares them, or copies them if the types differ."""
        base = base_model(model)
        self._tokenizer, self._eos, self._vocab = tokenizer, eos_ids(tokenizer, base), vocab_size(tokenizer)
        dtype = base.dtype if self.dtype is None else fast_dtype(DTYPES[self.dtype], base.device)
        if dtype == base.dtype:
            self._model, self._copy = model, None
        else:
            self._model = self._copied(model, dtype)
        cache_use(self._model)  # tried before anything is generated

    def _copied(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The copy of another type, with the model's current weights."""
        if self._copy is None:
            self._copy = deep_copy(model).eval().requires_grad_(False)
            for parameter in self._copy.parameters():  # buffers keep float32: rotary frequencies lose too much
                parameter.data = parameter.data.to(dtype)
        with torch.no_grad():
            for target, source in zip(self._copy.parameters(), model.parameters(), strict=True):
                target.copy_(source)
        return self._copy

    def description(self) -> str:
        """The class, and the way in which the model is run where its cache is not used for padded rows."""
        note = {"padded": "", "equal": " (prompts of equal lengths together)", "none": " (without a cache)"}
        return type(self).__name__ + note[cache_use(self._model)]

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """Generates one response per prompt, in their order.

        Raises:
            ModelError: If a prompt and its new tokens take more positions than the model has.
        """
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].input_ids))
        if order:
            self._check_length(len(prompts[order[-1]].input_ids), sampling.max_new_tokens)
        responses: dict[int, Response] = {}
        with evaluating(self._model), token_bar("generate", len(prompts), self.progress) as advance:
            for start in range(0, len(order), self.batch_size):
                indices = order[start : start + self.batch_size]
                seeds = [sampling.seed_of(prompts.round, prompts[index].id) for index in indices]
                uniform = _uniform(seeds, sampling)
                rows = [_Row(prompts[index].input_ids, uniform[row]) for row, index in enumerate(indices)]
                self._generate_batch(rows, sampling)
                for index, row in zip(indices, rows, strict=True):
                    responses[index] = self._response(prompts[index], row)
                advance(len(indices), sum(len(row.tokens) for row in rows))
        return [responses[index] for index in range(len(prompts))]

    def _check_length(self, prompt: int, new_tokens: int) -> None:
        what = f"the longest prompt with {new_tokens} new tokens (max_new_tokens)"
        capabilities(self._model).positions.check(prompt + new_tokens, type(base_model(self._model)).__name__, what)

    def _response(self, prompt: Prompt, row: _Row) -> Response:
        text = decoded(self._tokenizer, row.tokens, self._eos, prompt)
        finish: Literal["stop", "length"] = "stop" if row.ended else "length"
        return Response(prompt.id, tuple(row.tokens), text, finish, tuple(row.log_probs))

    @torch.no_grad()
    def _generate_batch(self, rows: Sequence[_Row], sampling: Sampling) -> None:
        """Generates the responses of a batch of rows, in as many groups and turns as the model needs."""
        switch = capabilities(self._model).positions.switch
        while unfinished := [row for row in rows if row.remaining]:
            for group in decodable(self._model, [len(row.ids) for row in unfinished]):
                members = [unfinished[index] for index in group]
                limits = [row.remaining for row in members]
                if switch is not None and len(members[0].ids) <= switch:
                    # The token after the switch is read with other rotary frequencies, which no cache has.
                    limits = [min(row.remaining, switch + 1 - len(row.ids)) for row in members]
                self._generate_group(members, limits, sampling)

    def _generate_group(self, members: Sequence[_Row], limits: Sequence[int], sampling: Sampling) -> None:
        """Adds up to `limits` tokens to each row of a group, until its turn ends."""
        head, device = output_head(self._model, self._vocab), base_model(self._model).device
        longest, count = max(limits), len(members)
        uniform = torch.stack([pad(row.uniform[len(row.tokens) :], (0, len(row.tokens))) for row in members])
        uniform = uniform.to(device, exact_dtype(device))
        eos, limit = torch.tensor(self._eos, device=device), torch.tensor(limits, device=device)
        batch, rows = start_rows(self._model, [row.ids for row in members]), torch.arange(count, device=device)
        generated = torch.zeros(count, longest, dtype=torch.long, device=device)
        log_probs = torch.zeros(count, longest, dtype=torch.float32, device=device)
        lengths, ended = limit.clone(), torch.zeros(count, dtype=torch.bool, device=device)
        for step in range(longest):
            logits = head(batch.read()).float()
            tokens = sample_tokens(logits, sampling, uniform[rows, step])
            generated[rows, step], log_probs[rows, step] = tokens, token_log_probs(logits, tokens)
            ends = torch.isin(tokens, eos)
            alive = ~ends & (limit[rows] > step + 1)
            order = _compacted(alive)
            if len(order) < len(rows):
                ended[rows[ends]], lengths[rows[~alive]] = True, step + 1
                if len(order) == 0:
                    break
                batch.select(order)
                rows, tokens = rows[order], tokens[order]
            batch.append(tokens)
        results = (generated.tolist(), log_probs.tolist(), lengths.tolist(), ended.tolist())
        for row, tokens_of_row, log_probs_of_row, length, row_ended in zip(members, *results, strict=True):
            row.tokens += tokens_of_row[:length]
            row.log_probs += log_probs_of_row[:length]
            row.ended = row_ended


def _compacted(alive: Tensor) -> Tensor:
    """Indices of the rows that are alive; the last ones fill the slots of ended rows, so that few rows move."""
    remaining = alive.nonzero().squeeze(-1)
    order = torch.arange(len(remaining), device=alive.device)
    order[~alive[: len(remaining)]] = remaining[remaining >= len(remaining)]
    return order


def _uniform(seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """`[R, max_new_tokens]` uniform numbers, each row from its own seed; greedy decoding needs none."""
    length = sampling.max_new_tokens
    if sampling.temperature == 0:
        return torch.zeros(len(seeds), length, dtype=torch.float64)
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    # The type is explicit: a run in half precision changes torch's default type, also for a thread that generates.
    return torch.stack([torch.rand(length, generator=generator, dtype=torch.float64) for generator in generators])
