"""Speculative writing of a batch of rows: the student drafts a block, the teacher checks it in one forward pass.

Letters: R rows that are still being written, W columns, n draft tokens, V vocabulary. p is the teacher, q the student.

Rows get different numbers of tokens from a block. After each, every row is moved to the right end of the batch, so that
its tokens, and what both caches hold of them, lie side by side behind padding on the left: positions, causal masks and
sliding windows are then those of any padded batch. The move reads the caches once, as appending a single token does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distillkit.errors import ModelError
from distillkit.generators.acceptance import Acceptance, Check, Rule
from distillkit.generators.sampling import draw_from, processed
from distillkit.models.scoring import base_model, output_head
from distillkit.types import Sampling

_DRAFT, _KEEP, _INSTEAD = range(3)
"""Uniform numbers of each place of a response: for the draft token, its check, and the token that is not drafted."""


class Reader:
    """A model that reads rows and keeps what it has read in a cache that can be moved and cut.

    Args:
        model: A transformers causal language model.
        vocab: V, the tokens of the tokenizer.
        lag: Tokens at a row's end that are taken back from the cache when rows are moved.

    Raises:
        ModelError: If the model keeps a state from which a token can't be taken back.
    """

    def __init__(self, model: nn.Module, vocab: int, lag: int) -> None:
        from transformers import DynamicCache  # a second to import: only where a model has been loaded anyway
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        base = base_model(model)
        kinds = {type(layer) for layer in DynamicCache(config=base.config).layers}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            raise ModelError(
                f"{type(base).__name__} keeps more than keys and values of what it has read, so that rejected tokens "
                "can't be taken back: it can neither draft nor check. Use TeacherCurator or StudentCurator."
            )
        self.body, self.head, self.lag = base.get_decoder(), output_head(model, vocab), lag
        self.device = base.device
        # Without the config: a layer that forgets what has left its window could not be cut. Its mask stays its own.
        self.cache = DynamicCache()
        self.width = 0

    def read(self, ids: Tensor, mask: Tensor, last: int) -> Tensor:
        """Reads the columns that it has not read.

        Args:
            ids: `[R, W]` token ids.
            mask: `[R, W]` 1 at each token, 0 at padding, which is on the left.
            last: Number of columns, at the end, that are told of.

        Returns:
            `[R, last, V]` logits.
        """
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        hidden = self.body(
            input_ids=ids[:, self.width :], attention_mask=mask, position_ids=positions[:, self.width :],
            past_key_values=self.cache, use_cache=True,
        ).last_hidden_state[:, -last:]  # fmt: skip
        self.width = ids.shape[1]
        logits = self.head(hidden.flatten(0, 1))  # [R·last, D] in one piece, see TransformersGenerator
        return logits.view(len(ids), last, -1)

    def move(self, rows: Tensor, columns: Tensor) -> None:
        """Keeps some rows, and of each some columns.

        Args:
            rows: `[R]` places of the rows.
            columns: `[R, W]` places of the columns, of which the last `lag` are left out.
        """
        columns = columns[:, : columns.shape[1] - self.lag].to(self.device)
        rows = rows[:, None].to(self.device)
        for layer in self.cache.layers:
            layer.keys = layer.keys[rows, :, columns].transpose(1, 2)  # [R, W, heads, width] -> [R, heads, W, width]
            layer.values = layer.values[rows, :, columns].transpose(1, 2)
        self.width = columns.shape[1]


@dataclass
class Written:
    """What has been written after a prompt.

    Args:
        tokens: Its tokens, end of turn included.
        log_probs: The teacher's log-probability of each, of its logits as they are; empty where the tokens are not
            distributed as the teacher's.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """One block of each row, after the check.

    Args:
        tokens: `[R, n + 1]` the draft tokens that stay, then the token after them, then what is to be ignored.
        stayed: `[R]` number of draft tokens that stay.
        log_probs: `[R, n + 1]` teacher's log-probabilities of the tokens; None where nobody wants them.
    """

    tokens: Tensor
    stayed: Tensor
    log_probs: Tensor | None


class Drafting:
    """A batch of rows that student and teacher write together.

    Args:
        student: Drafts.
        teacher: Checks.
        vocab: V, the tokens of the tokenizer that both share.
        rule: How the teacher checks.
        block: n, draft tokens of a block.
        ends: Tokens that end a turn.
        sampling: How tokens are drawn, by both.
        acceptance: Counts what stays.
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
        # After a block that stays whole, and the teacher's token behind it, the student has not read its own last
        # token: the cache of the student lacks two tokens then, and is made to lack two always.
        self.student, self.teacher = Reader(student, vocab, lag=2), Reader(teacher, vocab, lag=1)
        self.rule, self.block, self.ends, self.sampling = rule, block, frozenset(ends), sampling
        self.acceptance = acceptance

    @torch.no_grad()
    def write(self, ids: Tensor, mask: Tensor, uniform: Tensor) -> list[Written]:
        """Writes a response to each prompt.

        Args:
            ids: `[R, W]` tokens of the prompts, padded on the left.
            mask: `[R, W]` 1 at each token, 0 at padding.
            uniform: `[R, max_new_tokens, 3]` uniform numbers. They belong to places of a response, not to the order of
                their use: what is thrown away changes no other draw.

        Returns:
            The responses, in the rows' order.
        """
        longest = uniform.shape[1]
        written = [Written() for _ in range(len(ids))]
        rows = list(range(len(ids)))
        while rows:
            places = torch.tensor([len(written[row].tokens) for row in rows], device=ids.device)
            n = min(self.block, longest - int(places.min()))
            # Past the longest response, numbers are used twice, for tokens that are cut off.
            columns = (places[:, None] + torch.arange(n + 1, device=ids.device)).clamp_max(longest - 1)
            numbers = uniform[torch.tensor(rows, device=ids.device)[:, None], columns]  # [R, n + 1, 3]
            block = self._block(ids, mask, n, numbers)
            advance = self._take(block, n, [written[row] for row in rows], longest)
            alive = [place for place, steps in enumerate(advance) if steps]
            rows = [rows[place] for place in alive]
            if rows:
                ids, mask = self._moved(ids, mask, block.tokens, alive, [advance[place] for place in alive])
        return written

    def _block(self, ids: Tensor, mask: Tensor, n: int, uniform: Tensor) -> Block:
        """Drafts n tokens of each row and has them checked."""
        drawn_by = []
        for step in range(n):
            drawn_by.append(processed(self.student.read(ids, mask, 1)[:, 0], self.sampling))
            token = draw_from(drawn_by[-1], uniform[:, step, _DRAFT])
            ids, mask = torch.cat([ids, token[:, None]], -1), torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        log_q, drafts = torch.stack(drawn_by, 1), ids[:, -n:]
        read = slice(None) if self.rule.lossless else slice(-1)  # otherwise nobody asks what follows the last one
        logits = self.teacher.read(ids[:, read], mask[:, read], n + self.rule.lossless).to(ids.device)
        log_p = processed(logits.flatten(0, 1), self.sampling).view(logits.shape)
        check = Check(drafts, logits[:, :n], log_p[:, :n], log_q, uniform[:, :n, _KEEP])
        stayed = self.rule.keeps(check).long().cumprod(-1).sum(-1)  # [R] up to the first that does not stay
        if self.rule.lossless:  # behind the draft nothing was drafted: q is 0 there
            log_q = torch.cat([log_q, log_q.new_full((len(ids), 1, log_q.shape[-1]), -torch.inf)], 1)
        rows, place = torch.arange(len(ids), device=ids.device), stayed.clamp_max(log_p.shape[1] - 1)
        by = self.rule.instead(log_p[rows, place], log_q[rows, place])
        instead = draw_from(by, uniform[rows, stayed, _INSTEAD])
        tokens = torch.cat([drafts, drafts[:, -1:]], -1).scatter(-1, stayed[:, None], instead[:, None])
        if not self.rule.lossless:
            return Block(tokens, stayed, None)
        own = logits.gather(-1, tokens[..., None]).squeeze(-1).float() - logits.float().logsumexp(-1)
        return Block(tokens, stayed, own)

    def _take(self, block: Block, n: int, written: Sequence[Written], longest: int) -> list[int]:
        """Appends to each row what it has got; the number of tokens by which each goes on, 0 for those that end."""
        advance = []
        stays, tokens = block.stayed.tolist(), block.tokens.tolist()
        log_probs = None if block.log_probs is None else block.log_probs.tolist()
        for place, (row, stayed) in enumerate(zip(written, stays, strict=True)):
            got = tokens[place][: min(stayed + 1, n + self.rule.lossless, longest - len(row.tokens))]
            end = next((i + 1 for i, token in enumerate(got) if token in self.ends), None)
            got = got[:end]
            row.tokens += got
            row.log_probs += [] if log_probs is None else log_probs[place][: len(got)]
            self.acceptance.add(len(got), stayed, n)
            advance.append(len(got) if end is None and len(row.tokens) < longest else 0)
        return advance

    def _moved(
        self, ids: Tensor, mask: Tensor, tokens: Tensor, alive: Sequence[int], advance: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The rows that go on with their new tokens, on the right; both caches follow."""
        rows, steps = (torch.tensor(numbers, device=ids.device) for numbers in (alive, advance))
        ids = torch.cat([ids[rows], tokens[rows]], -1)
        lengths = mask[rows].sum(-1) + steps  # [R]
        width, stop = int(lengths.max()), mask.shape[1] + steps  # the column behind each row's last token
        columns = (stop[:, None] - width + torch.arange(width, device=ids.device)).clamp_min(0)  # [R, W]
        for model in (self.student, self.teacher):
            model.move(rows, columns)
        reach = torch.arange(width, device=ids.device) >= (width - lengths)[:, None]
        return ids.gather(-1, columns), reach.long()
