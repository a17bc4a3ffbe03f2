"""Generation with a transformers model in this process.

Letters: R rows that are still being written, T tokens so far, V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distillkit.errors import ConfigError
from distillkit.generators.progress import token_bar
from distillkit.generators.sampling import draw, log_probs_of
from distillkit.hardware import native
from distillkit.interfaces import Generator
from distillkit.models.scoring import base_model, evaluating, output_head
from distillkit.models.tokenizers import eos_ids
from distillkit.types import Prompt, Prompts, Response, Sampling


class TransformersGenerator(Generator):
    """Continues prompts with the model in this process: left padding, KV cache, batches of prompts of similar length.

    A row that has ended leaves its batch. Each response is drawn with a seed of its own, and comes with what the model
    says of its tokens.

    Args:
        batch_size: Prompts continued at once.
        dtype: Type of the weights that write, float32 on a processor without instructions for it. If it is not the
            model's own, the generator keeps a copy; None shares the model's weights.
        progress: Whether a progress bar is shown.

    Raises:
        ConfigError: If `batch_size` is below 1.
    """

    def __init__(
        self,
        batch_size: int = 64,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        progress: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"TransformersGenerator.batch_size must be at least 1, got {batch_size}.")
        self.batch_size, self.dtype, self.progress = batch_size, dtype, progress
        self._model: Any = None
        self._copy: Any = None
        self._tokenizer: Any = None
        self._eos: tuple[int, ...] = ()

    def refresh(self, model: nn.Module, tokenizer: Any) -> None:
        """Takes the weights that `model` has now: shares them, or copies them where the type differs."""
        base = base_model(model)
        self._tokenizer, self._eos = tokenizer, eos_ids(tokenizer, base)
        wanted = base.dtype if self.dtype is None else native(getattr(torch, self.dtype), base.device)
        if wanted == base.dtype:
            self._model, self._copy = model, None
            return
        if self._copy is None:
            self._copy = copy.deepcopy(model).eval().requires_grad_(False)
            for parameter in self._copy.parameters():  # buffers keep float32: rotary frequencies lose too much
                parameter.data = parameter.data.to(wanted)
        with torch.no_grad():
            for ours, theirs in zip(self._copy.parameters(), model.parameters(), strict=True):
                ours.copy_(theirs)
        self._model = self._copy

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """One response per prompt, in their order."""
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].input_ids))
        found: dict[int, Response] = {}
        with evaluating(self._model), token_bar("generate", len(prompts), self.progress) as advance:
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                seeds = [sampling.seed_of(prompts.round, prompts[place].id) for place in places]
                written = self._continue([prompts[place].input_ids for place in places], seeds, sampling)
                for place, (tokens, log_probs) in zip(places, written, strict=True):
                    found[place] = self._response(prompts[place], tokens, log_probs)
                advance(len(places), sum(len(found[place].token_ids) for place in places))
        return [found[place] for place in range(len(prompts))]

    def _response(self, prompt: Prompt, tokens: list[int], log_probs: list[float]) -> Response:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
        finish: Literal["stop", "length"] = "stop" if tokens[-1] in self._eos else "length"
        return Response(prompt.id, tuple(tokens), text, finish, tuple(log_probs))

    @torch.no_grad()
    def _continue(
        self, ids: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[tuple[list[int], list[float]]]:
        """The tokens written after each of `ids`, end of turn included, and the log-probability of each."""
        from distillkit.generators.kv_cache import roomy_cache  # imports transformers, which takes a second

        base = base_model(self._model)
        body, head, device = base.get_decoder(), output_head(self._model, len(self._tokenizer)), base.device
        uniform = _uniform(seeds, sampling).to(device)  # [R, max_new_tokens]
        step_ids, mask = _left_padded(ids, device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        eos = torch.tensor(self._eos, device=device)
        cache, rows = roomy_cache(base.config), torch.arange(len(ids), device=device)
        written = torch.zeros(len(ids), sampling.max_new_tokens, dtype=torch.long, device=device)
        log_probs = torch.zeros(len(ids), sampling.max_new_tokens, dtype=torch.float32, device=device)
        lengths = torch.full((len(ids),), sampling.max_new_tokens, device=device)
        for step in range(sampling.max_new_tokens):
            hidden = body(
                input_ids=step_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]  # [R, D]; a strided [R, 1, D] makes the head's product copy its weight R times
            logits = head(hidden).float()
            tokens = draw(logits, sampling, uniform[rows, step])
            written[rows, step], log_probs[rows, step] = tokens, log_probs_of(logits, tokens)
            alive = ~torch.isin(tokens, eos)
            kept = _closed_up(alive)
            if len(kept) < len(rows):
                lengths[rows[~alive]] = step + 1
                if len(kept) == 0:
                    break
                cache.batch_select_indices(kept)
                rows, mask, tokens, positions = rows[kept], mask[kept], tokens[kept], positions[kept]
            step_ids, positions = tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)  # [R, T + 1]
        return [
            (own[:length], said[:length])
            for own, said, length in zip(written.tolist(), log_probs.tolist(), lengths.tolist(), strict=True)
        ]


def _closed_up(alive: Tensor) -> Tensor:
    """The places of the rows that are alive, the last ones in those of the rows that are not: few have to move."""
    kept = alive.nonzero().squeeze(-1)
    order = torch.arange(len(kept), device=alive.device)
    order[~alive[: len(kept)]] = kept[kept >= len(kept)]
    return order


def _uniform(seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """`[R, max_new_tokens]` uniform numbers, each row from its own seed; greedy tokens need none."""
    length = sampling.max_new_tokens
    if sampling.temperature == 0:
        return torch.zeros(len(seeds), length, dtype=torch.float32)
    own = (torch.Generator().manual_seed(seed) for seed in seeds)
    # The type is given: a run in half precision changes the default one, also for a thread that writes meanwhile.
    return torch.stack([torch.rand(length, generator=generator, dtype=torch.float32) for generator in own])


def _left_padded(ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """`[R, T]` token ids, padded on the left with 0, and their mask."""
    width = max(len(row) for row in ids)
    tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    return tokens, mask
