"""A teacher that reads the student's text in tokens of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from distillkit.data.chat import require_chat_template
from distillkit.data.collate import collate
from distillkit.errors import DataError
from distillkit.models.tokenizers import eos_ids
from distillkit.teachers.in_process import TransformersTeacher
from distillkit.types import Batch, Message, Prompts, Row, Scores
from distillkit_uld.spans import aligned, boundaries, common


@dataclass(frozen=True)
class AlignedScores(Scores):
    """A teacher's scores at the student's positions, where both have read the same text.

    Args:
        aligned: `[N]` whether that is so; elsewhere the scores are of some other position.
    """

    aligned: Tensor | None = None


class CrossTokenizerTeacher(TransformersTeacher):
    """A model with another tokenizer: it reads prompt and response by its own template and tokens.

    Positions of the two are aligned by text: where a token of the student begins at a character at which one of the
    teacher's begins too, both predict what comes after the same text. The end of a turn is one of these places.

    Args:
        source: As of `TransformersTeacher`.
        dtype: As of `TransformersTeacher`.
        attn_implementation: As of `TransformersTeacher`.
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
        self._before: dict[bytes, tuple[Row, list[int | None]]] = {}

    def meet(self, tokenizer: Any, prompts: Prompts) -> None:
        """Keeps what is needed to read rows."""
        self._student, self._own = tokenizer, self.tokenizer()
        self._messages: dict[str, Sequence[Message]] = {prompt.id: prompt.messages for prompt in prompts}
        self._chat = bool(getattr(tokenizer, "chat_template", None))
        require_chat_template(self._own, self._chat)

    def prepare(self, rows: Sequence[Row]) -> None:
        """Reads a round's rows; those of the round before stay."""
        self._before, self._rows = self._rows, {row.key: self._read(row) for row in rows}

    @torch.no_grad()
    def score(self, batch: Batch) -> AlignedScores:
        """Scores of the batch's N response positions, of those places that are aligned with them."""
        found = [self._rows.get(key) or self._before[key] for key in batch.keys]
        own = collate([row for row, _ in found], self._own.pad_token_id).to(batch.input_ids.device)
        scores = super().score(own)
        index: list[int] = []
        same: list[bool] = []
        start = 0
        for (_, places), length in zip(found, own.lengths, strict=True):
            index += [start + (place or 0) for place in places]
            same += [place is not None for place in places]
            start += length
        chosen = torch.tensor(index, dtype=torch.long, device=batch.input_ids.device)
        mask = torch.tensor(same, dtype=torch.bool, device=batch.input_ids.device)
        return AlignedScores(scores.hidden[chosen], scores.head, scores.vocab, aligned=mask)

    def _read(self, row: Row) -> tuple[Row, list[int | None]]:
        """The row in the teacher's tokens, and its place for each of the student's positions."""
        start = row.response_mask.index(True) if any(row.response_mask) else len(row.input_ids)
        if not all(row.response_mask[start:]) or row.prompt_id not in self._messages:
            raise DataError(
                f"CrossTokenizerTeacher reads a prompt of the data and one response to it, and the row of prompt "
                f"{row.prompt_id} has several turns that are trained on, or another prompt."
            )
        ids = row.input_ids[start:]
        ended = bool(ids) and ids[-1] in eos_ids(self._student, None)
        text, read = boundaries(self._student, ids[:-1] if ended else ids)
        answer = self._own(text, add_special_tokens=False)["input_ids"]
        own_text, own_read = boundaries(self._own, answer)
        answer += [self._own.eos_token_id] if ended else []
        places = aligned(read if ended else read[:-1], own_read if ended else own_read[:-1], common(text, own_text))
        prompt = self._prompt(self._messages[row.prompt_id])
        mask = (False,) * len(prompt) + (True,) * len(answer)
        if not answer:  # no position of the teacher's: nothing is aligned
            prompt, mask, places = [*prompt, self._own.eos_token_id], (*mask, True), [None] * len(ids)
        return replace(row, input_ids=(*prompt, *answer), response_mask=mask), places

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        if not self._chat:
            return list(self._own(messages[-1]["content"])["input_ids"])
        text = self._own.apply_chat_template(
            [dict(own) for own in messages], add_generation_prompt=True, tokenize=False
        )
        return list(self._own(text, add_special_tokens=False)["input_ids"])
