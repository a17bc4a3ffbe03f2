"""Cross-tokenizer teacher: it scores the student's text in its own tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distillkit.data import collate, require_chat_template
from distillkit.errors import DataError
from distillkit.models import eos_ids
from distillkit.teachers import TransformersTeacher
from distillkit.types import Batch, Message, Prompts, Row, Scores, Tokenizer
from distillkit_uld.spans import aligned, boundaries, common


@dataclass(frozen=True)
class AlignedScores(Scores):
    """A teacher's scores at the student's positions, valid where both predict what follows the same text.

    Args:
        aligned: `[N]` bool, True where the scores are valid; elsewhere they belong to an arbitrary position.
    """

    aligned: Tensor | None = None


class CrossTokenizerTeacher(TransformersTeacher):
    """A model with another tokenizer: it reads prompt and response by its own template and tokens.

    Positions are aligned by text: where a token of the student and a token of the teacher begin at the same character,
    both models predict what follows the same text. The end of the turn is aligned too.

    Args:
        source: The teacher's model, as for `TransformersTeacher`.
        dtype: Type of the weights, as for `TransformersTeacher`.
        attn_implementation: Attention implementation, as for `TransformersTeacher`.
    """

    shares_tokens = False

    def __init__(
        self,
        source: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__(source, dtype, attn_implementation)
        self._rows: dict[bytes, tuple[Row, list[int | None]]] = {}
        self._previous: dict[bytes, tuple[Row, list[int | None]]] = {}

    def prepare_alignment(self, tokenizer: Tokenizer, prompts: Prompts) -> None:
        """Stores both tokenizers and the messages of the prompts."""
        self._student_tokenizer, self._tokenizer = tokenizer, self.tokenizer()
        self._messages: dict[str, Sequence[Message]] = {prompt.id: prompt.messages for prompt in prompts}
        self._chat = bool(getattr(tokenizer, "chat_template", None))
        require_chat_template(self._tokenizer, self._chat)

    def prepare(self, rows: Sequence[Row]) -> None:
        """Tokenises a round's rows for the teacher; rows of the previous round stay available."""
        self._previous, self._rows = self._rows, {row.key: self._read(row) for row in rows}

    @torch.no_grad()
    def score(self, batch: Batch) -> AlignedScores:
        """Scores of the batch's N response positions, taken from the teacher's aligned positions."""
        rows = [self._rows.get(key) or self._previous[key] for key in batch.keys]
        teacher_batch = collate([row for row, _ in rows], self._tokenizer.pad_token_id).to(batch.input_ids.device)
        scores = super().score(teacher_batch)
        index: list[int] = []
        is_aligned: list[bool] = []
        start = 0
        for (_, positions), length in zip(rows, teacher_batch.lengths, strict=True):
            index += [start + (position or 0) for position in positions]
            is_aligned += [position is not None for position in positions]
            start += length
        chosen = torch.tensor(index, dtype=torch.long).to(batch.input_ids.device, non_blocking=True)
        mask = torch.tensor(is_aligned, dtype=torch.bool).to(batch.input_ids.device, non_blocking=True)
        return AlignedScores(scores.hidden[chosen], scores.head, scores.vocab, aligned=mask)

    def _read(self, row: Row) -> tuple[Row, list[int | None]]:
        """The row in the teacher's tokens, and for each response position of the student the aligned one or None."""
        start = row.response_mask.index(True) if any(row.response_mask) else len(row.input_ids)
        if not all(row.response_mask[start:]) or row.prompt_id not in self._messages:
            raise DataError(
                "CrossTokenizerTeacher scores one response to a prompt of the training data, but the row of prompt "
                f"{row.prompt_id} has several trained turns, or a prompt that is not in the data."
            )
        ids = row.input_ids[start:]
        ended = bool(ids) and ids[-1] in eos_ids(self._student_tokenizer, None)
        text, student_chars = boundaries(self._student_tokenizer, ids[:-1] if ended else ids)
        answer = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        teacher_text, teacher_chars = boundaries(self._tokenizer, answer)
        answer += [self._tokenizer.eos_token_id] if ended else []
        if not ended:  # nothing is predicted after the last token
            student_chars, teacher_chars = student_chars[:-1], teacher_chars[:-1]
        positions = aligned(student_chars, teacher_chars, common(text, teacher_text))
        prompt = self._prompt(self._messages[row.prompt_id])
        mask = (False,) * len(prompt) + (True,) * len(answer)
        if not answer:  # the teacher has no response position: nothing is aligned
            prompt, mask, positions = [*prompt, self._tokenizer.eos_token_id], (*mask, True), [None] * len(ids)
        return replace(row, input_ids=(*prompt, *answer), response_mask=mask), positions

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        if not self._chat:
            return list(self._tokenizer(messages[-1]["content"])["input_ids"])
        text = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
