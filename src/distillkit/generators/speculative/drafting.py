"""Speculative decoding of a batch: the student drafts a block of tokens, the teacher checks it in one forward pass.

Letters: R rows that are still generating, W columns, n draft tokens, V vocabulary. p is the teacher, q the student.

Rows get different numbers of tokens from a block. After each block, every row is moved to the right end of the batch,
so that its tokens and their entries in both caches are contiguous, with padding on the left: positions, causal masks
and sliding windows are then those of any padded batch. The move reads the caches once, as appending a token does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distillkit.errors import ModelError
from distillkit.generators.decoding import cache_use
from distillkit.generators.sampling import sample_from, sampling_log_probs
from distillkit.generators.speculative.acceptance import Acceptance, Check, Rule
from distillkit.models.capabilities import capabilities
from distillkit.models.heads import output_head
from distillkit.models.structure import base_model, last_states, text_body
from distillkit.types import Sampling

_DRAFT, _CHECK, _REPLACE = range(3)
"""Index of the uniform number for each use at a response position: draft token, its check, and its replacement."""


class CachedDecoder:
    """A model with a key-value cache whose rows and columns can be moved and cut.

    Args:
        model: A transformers causal language model.
        vocab: V, the tokens of the tokenizer.
        lag: Tokens at each row's end that are removed from the cache when rows are moved.

    Raises:
        ModelError: If the model has a recurrent state, from which a token can't be removed, or a cache that does not
            serve padded rows.
    """

    def __init__(self, model: nn.Module, vocab: int, lag: int) -> None:
        from transformers import DynamicCache  # a second to import: only where a model has been loaded anyway
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        base = base_model(model)
        padded = cache_use(model) == "padded"
        kinds = {type(layer) for layer in DynamicCache(config=base.config).layers} if padded else set()
        if not padded or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            raise ModelError(
                f"{type(base).__name__} keeps more than the keys and values of padded rows between steps, so rejected "
                "tokens can't be removed, and it can neither draft nor check. Use TeacherCurator or StudentCurator."
            )
        self.name, self.switch = type(base).__name__, capabilities(model).positions.switch
        self.body, self.head, self.lag = text_body(model), output_head(model, vocab), lag
        self.device = base.device
        # Without the config: a layer that drops tokens outside its window could not be cut. Its mask is not affected.
        self.cache = DynamicCache()
        self.width = 0

    def read(self, ids: Tensor, mask: Tensor, num_last: int) -> Tensor:
        """Runs the model on the columns that are not in the cache yet.

        Args:
            ids: `[R, W]` token ids.
            mask: `[R, W]` 1 at each token, 0 at padding, which is on the left.
            num_last: Number of columns at the end whose logits are returned.

        Returns:
            `[R, num_last, V]` logits.

        Raises:
            ModelError: If the rows pass the length at which their rotary frequencies change.
        """
        if self.switch is not None and ids.shape[1] > self.switch:
            raise ModelError(
                f"{self.name} has other rotary frequencies past {self.switch} tokens (longrope), where it can neither "
                "draft nor check: shorten prompts and max_new_tokens, or use TeacherCurator or StudentCurator."
            )
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        hidden = last_states(
            self.body,
            input_ids=ids[:, self.width :],
            attention_mask=mask,
            position_ids=positions[:, self.width :],
            past_key_values=self.cache,
            use_cache=True,
        )[:, -num_last:]
        self.width = ids.shape[1]
        logits = self.head(hidden.flatten(0, 1))  # [R·num_last, D] contiguous, see TransformersGenerator
        return logits.view(len(ids), num_last, -1)

    def move(self, rows: Tensor, columns: Tensor) -> None:
        """Selects rows of the cache, and columns of each row.

        Args:
            rows: `[R]` row indices.
            columns: `[R, W]` column indices of each row; the last `lag` of them are left out.
        """
        columns = columns[:, : columns.shape[1] - self.lag].to(self.device)
        rows = rows[:, None].to(self.device)
        for layer in self.cache.layers:
            layer.keys = layer.keys[rows, :, columns].transpose(1, 2)  # [R, W, heads, width] -> [R, heads, W, width]
            layer.values = layer.values[rows, :, columns].transpose(1, 2)
        self.width = columns.shape[1]


@dataclass
class SpeculativeResult:
    """The response to a prompt so far.

    Args:
        tokens: Generated tokens, end of turn included.
        log_probs: Log-probability of each token under the teacher (temperature 1, full vocabulary); empty if the rule
            is not lossless.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """One block of each row, after the check.

    Args:
        tokens: `[R, n + 1]` accepted draft tokens, then the token after them, then tokens to be ignored.
        accepted: `[R]` number of accepted draft tokens.
        log_probs: `[R, n + 1]` teacher's log-probabilities of the tokens; None if the rule is not lossless.
    """

    tokens: Tensor
    accepted: Tensor
    log_probs: Tensor | None


class Drafting:
    """A batch of rows that student and teacher generate together.

    Args:
        student: Model that drafts.
        teacher: Model that checks.
        vocab: V, the tokens of the tokenizer that both share.
        rule: Acceptance rule of the teacher.
        block: n, draft tokens of a block.
        ends: Tokens that end a turn.
        sampling: Sampling of both models.
        acceptance: Counters that each block is added to.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        vocab: int,
        rule: Rule,
        block: int,
        ends: Sequence[int],
        sampling: Sampling,
        acceptance: Acceptance,
    ) -> None:
        # After a fully accepted block and the teacher's additional token, the student has not read its own last draft
        # token: its cache then lacks two tokens, and is made to lack two in all cases.
        self.student, self.teacher = CachedDecoder(student, vocab, lag=2), CachedDecoder(teacher, vocab, lag=1)
        self.rule, self.block, self.ends, self.sampling = rule, block, frozenset(ends), sampling
        self.acceptance = acceptance

    @torch.no_grad()
    def generate(self, ids: Tensor, mask: Tensor, uniform: Tensor) -> list[SpeculativeResult]:
        """Generates a response to each prompt.

        Args:
            ids: `[R, W]` tokens of the prompts, padded on the left.
            mask: `[R, W]` 1 at each token, 0 at padding.
            uniform: `[R, max_new_tokens, 3]` uniform numbers. They belong to response positions, not to the order of
                their use: discarded tokens change no later sample.

        Returns:
            The responses, in the order of the rows.
        """
        longest = uniform.shape[1]
        results = [SpeculativeResult() for _ in range(len(ids))]
        rows = list(range(len(ids)))
        while rows:
            lengths = torch.tensor([len(results[row].tokens) for row in rows], device=ids.device)
            n = min(self.block, longest - int(lengths.min()))
            # Beyond the longest response, uniform numbers are used twice, for tokens that are cut off.
            columns = (lengths[:, None] + torch.arange(n + 1, device=ids.device)).clamp_max(longest - 1)
            block_uniform = uniform[torch.tensor(rows, device=ids.device)[:, None], columns]  # [R, n + 1, 3]
            block = self._draft_and_check(ids, mask, n, block_uniform)
            advance = self._append(block, n, [results[row] for row in rows], longest)
            alive = [index for index, steps in enumerate(advance) if steps]
            rows = [rows[index] for index in alive]
            if rows:
                ids, mask = self._moved(ids, mask, block.tokens, alive, [advance[index] for index in alive])
        return results

    def _draft_and_check(self, ids: Tensor, mask: Tensor, n: int, uniform: Tensor) -> Block:
        """Drafts n tokens of each row with the student and checks them with the teacher."""
        student_log_probs = []
        for step in range(n):
            student_log_probs.append(sampling_log_probs(self.student.read(ids, mask, 1)[:, 0], self.sampling))
            token = sample_from(student_log_probs[-1], uniform[:, step, _DRAFT])
            ids, mask = torch.cat([ids, token[:, None]], -1), torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        log_q, drafts = torch.stack(student_log_probs, 1), ids[:, -n:]
        read = slice(None) if self.rule.lossless else slice(-1)  # only a lossless rule samples after the last draft
        logits = self.teacher.read(ids[:, read], mask[:, read], n + self.rule.lossless).to(ids.device)
        log_p = sampling_log_probs(logits.flatten(0, 1), self.sampling).view(logits.shape)
        check = Check(drafts, logits[:, :n], log_p[:, :n], log_q, uniform[:, :n, _CHECK])
        accepted = self.rule.accepts(check).long().cumprod(-1).sum(-1)  # [R] up to the first rejected token
        if self.rule.lossless:  # nothing was drafted after the last draft token: q is 0 there
            log_q = torch.cat([log_q, log_q.new_full((len(ids), 1, log_q.shape[-1]), -torch.inf)], 1)
        rows, index = torch.arange(len(ids), device=ids.device), accepted.clamp_max(log_p.shape[1] - 1)
        replacement_log_probs = self.rule.replacement(log_p[rows, index], log_q[rows, index])
        replacement = sample_from(replacement_log_probs, uniform[rows, accepted, _REPLACE])
        tokens = torch.cat([drafts, drafts[:, -1:]], -1).scatter(-1, accepted[:, None], replacement[:, None])
        if not self.rule.lossless:
            return Block(tokens, accepted, None)
        teacher_logp = logits.gather(-1, tokens[..., None]).squeeze(-1).float() - logits.float().logsumexp(-1)
        return Block(tokens, accepted, teacher_logp)

    def _append(self, block: Block, n: int, results: Sequence[SpeculativeResult], longest: int) -> list[int]:
        """Appends a block's tokens to each row; returns how many tokens each row advances, 0 for rows that end."""
        advance = []
        counts, tokens = block.accepted.tolist(), block.tokens.tolist()
        log_probs = None if block.log_probs is None else block.log_probs.tolist()
        for index, (result, accepted) in enumerate(zip(results, counts, strict=True)):
            new_tokens = tokens[index][: min(accepted + 1, n + self.rule.lossless, longest - len(result.tokens))]
            end = next((i + 1 for i, token in enumerate(new_tokens) if token in self.ends), None)
            new_tokens = new_tokens[:end]
            result.tokens += new_tokens
            result.log_probs += [] if log_probs is None else log_probs[index][: len(new_tokens)]
            self.acceptance.add(len(new_tokens), accepted, n)
            advance.append(len(new_tokens) if end is None and len(result.tokens) < longest else 0)
        return advance

    def _moved(
        self, ids: Tensor, mask: Tensor, tokens: Tensor, alive: Sequence[int], advance: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask of the rows that go on, right-aligned with their new tokens; moves both caches accordingly."""
        rows, steps = (torch.tensor(values, device=ids.device) for values in (alive, advance))
        ids = torch.cat([ids[rows], tokens[rows]], -1)
        lengths = mask[rows].sum(-1) + steps  # [R]
        width, stop = int(lengths.max()), mask.shape[1] + steps  # the column after each row's last token
        columns = (stop[:, None] - width + torch.arange(width, device=ids.device)).clamp_min(0)  # [R, W]
        for model in (self.student, self.teacher):
            model.move(rows, columns)
        is_token = torch.arange(width, device=ids.device) >= (width - lengths)[:, None]
        return ids.gather(-1, columns), is_token.long()
