"""The tokens of a run: its tokenizer and chat template, and how far the teacher's agree with them."""

import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Literal

from torch import nn

from distillkit.data.chat_templates import TEACHER, prints_date, with_date
from distillkit.data.template_spans import render
from distillkit.errors import DataError
from distillkit.interfaces import Teacher
from distillkit.models.scoring import share_vocab
from distillkit.models.student import Student
from distillkit.models.tokenizers import fingerprint, require_same
from distillkit.storage.dates import fixed_date
from distillkit.types import Prompts, Row, Tokenizer

_log = logging.getLogger(__name__)


def run_tokenizer(student: Student, teacher: Teacher | None, store: str | Path | None) -> Tokenizer:
    """The student's tokenizer, with the run's chat template and the store's date if the template prints one.

    Args:
        student: The student.
        teacher: The teacher, if it uses the student's tokenizer.
        store: Folder of the response store; None outside a run: a template then prints today's date.

    Raises:
        ConfigError: If the chat template does not suit the tokenizer.
    """
    teacher_tokenizer = teacher.tokenizer() if teacher is not None and student.chat_template == TEACHER else None
    tokenizer = student.tokenizer(teacher_tokenizer)
    if (template := _dated_template(tokenizer)) is not None:
        tokenizer.chat_template = with_date(template, date.today() if store is None else fixed_date(store))
    return tokenizer


def _dated_template(tokenizer: Tokenizer) -> str | None:
    """The template that renders a tokenizer's conversations if it prints the date: of several by name, the default."""
    template: object = tokenizer.chat_template
    text = template.get("default") if isinstance(template, Mapping) else template
    return text if isinstance(text, str) and prints_date(text) else None


def rendering(tokenizer: Tokenizer, chat: bool) -> str:
    """A name for the way in which a run turns messages into tokens: part of the provenance of every response.

    Args:
        tokenizer: The run's tokenizer.
        chat: Whether prompts go through the chat template.
    """
    return f"template:{fingerprint(tokenizer)}" if chat else "plain"


def log_template_difference(tokenizer: Tokenizer, teacher: Tokenizer, store: str | Path) -> None:
    """Logs that the teacher's chat template renders a prompt differently from the run's, if it does.

    Args:
        tokenizer: The run's tokenizer.
        teacher: The teacher's tokenizer, which is changed if its template prints the date.
        store: Folder of the response store.
    """
    if not tokenizer.chat_template or not teacher.chat_template:
        return
    if (template := _dated_template(teacher)) is not None:
        teacher.chat_template = with_date(template, fixed_date(store))
    messages = [{"role": "user", "content": "Hello"}]
    if render(messages, tokenizer, True, "a prompt") == render(messages, teacher, True, "a prompt"):
        return
    _log.info(
        "Prompts are rendered with the student's chat template, and the teacher's is another: a teacher that was tuned "
        "with it may answer and score worse. Use it for both with `model.student.chat_template: teacher`."
    )


def compare_tokens(
    tokenizer: Tokenizer,
    teacher: Tokenizer,
    student_name: str,
    teacher_name: str,
    added_tokens: Literal["same", "unused"],
    prompts: Mapping[str, Prompts],
) -> dict[int, str]:
    """Compares the tokens of student and teacher, and refuses prompts with a token that is another one for the teacher.

    Args:
        tokenizer: The run's tokenizer.
        teacher: The teacher's tokenizer.
        student_name: Name of the student in messages, such as its source.
        teacher_name: Name of the teacher in messages.
        added_tokens: Whether the added tokens must be the `same`, or those that differ be `unused`.
        prompts: The prompts of each split.

    Returns:
        Tokens that differ by id, each with what it is for student and teacher.

    Raises:
        ConfigError: If the tokenizers do not match.
        DataError: If a prompt or its response has a token that differs.
    """
    names = f"the student {student_name}", f"the teacher {teacher_name}"
    unshared = require_same(tokenizer, teacher, *names, added_tokens)
    for split in prompts.values():
        check_tokens(unshared, split)
    return unshared


def share_logits(
    student: nn.Module,
    teacher: Teacher | None,
    tokenizer: Tokenizer,
    added_tokens: Literal["same", "unused"],
    log: Callable[[str], None],
) -> int:
    """Limits the teacher to the logits that both models have, as `share_vocab` does; every token needs one.

    Args:
        student: A transformers causal language model.
        teacher: The teacher, after `setup`; None for a run without one.
        tokenizer: The run's tokenizer. If its padding token has no logit, it pads with its end token afterwards.
        added_tokens: `same`: every token needs a logit; `unused`: added tokens need none.
        log: Called with a message if the widths differ.

    Returns:
        V, the number of logits that both have.

    Raises:
        ModelError: If a token that needs a logit, or the end token, has none.
    """
    added = set(tokenizer.get_added_vocab().values()) if added_tokens == "unused" else set[int]()
    needed = set(tokenizer.get_vocab().values()) - added | {tokenizer.eos_token_id}
    vocab = share_vocab(student, teacher, max(token_id for token_id in needed if token_id is not None) + 1, log)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= vocab:
        tokenizer.pad_token = tokenizer.eos_token
    return vocab


def without_logits(tokenizer: Tokenizer, vocab: int, prompts: Mapping[str, Prompts]) -> dict[int, str]:
    """Finds the tokens that the models have no logits for, and refuses prompts with one of them.

    Args:
        tokenizer: The run's tokenizer.
        vocab: V, number of logits.
        prompts: The prompts of each split.

    Returns:
        Such tokens by id, each with a note for `check_tokens`.

    Raises:
        DataError: If a prompt or its response has such a token.
    """
    surplus = {
        token_id: f"{token!r} for the tokenizer and past the {vocab} logits of the models"
        for token, token_id in tokenizer.get_vocab().items()
        if token_id >= vocab
    }
    for split in prompts.values():
        check_tokens(surplus, split)
    return surplus


def check_tokens(unshared: Mapping[int, str], prompts: Prompts | Iterable[Row]) -> None:
    """Refuses prompts or rows with a token that is another one for the teacher.

    Args:
        unshared: Those tokens by id, each with what it is for student and teacher.
        prompts: The prompts or rows.

    Raises:
        DataError: If one has such a token.
    """
    if not unshared:
        return
    for item in prompts:
        ids = item.input_ids if isinstance(item, Row) else (*item.input_ids, *item.reference_ids)
        if unshared.keys().isdisjoint(ids):
            continue
        token_id = next(token_id for token_id in ids if token_id in unshared)
        prompt_id = item.prompt_id if isinstance(item, Row) else item.id
        raise DataError(
            f"Prompt {prompt_id} or its response has the token {token_id}, which is {unshared[token_id]}. "
            "`model.added_tokens: unused` requires that such tokens never occur: leave such rows out, or use another "
            "teacher."
        )
