"""Where two tokenisations of one text have read the same."""

from collections.abc import Sequence
from typing import Any

HALF = "�"
"""What a tokenizer writes for a character that isn't whole yet."""


def boundaries(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int | None]]:
    """A text, and how many characters of it have been read before each of its tokens and after the last.

    Each beginning of the tokens is decoded, which is quadratic in their number: a token alone does not tell its text,
    which may begin with a space that only shows after another, or be a part of a character.

    Args:
        tokenizer: A transformers tokenizer.
        ids: The tokens.

    Returns:
        The text, and a number for each place from 0 to the number of tokens; None within a character.
    """
    text = _decoded(tokenizer, ids)
    found: list[int | None] = []
    for place in range(len(ids) + 1):
        beginning = _decoded(tokenizer, ids[:place])
        found.append(len(beginning) if text.startswith(beginning) else None)
    return text, found


def aligned(student: Sequence[int | None], teacher: Sequence[int | None], same: int) -> list[int | None]:
    """The teacher's place for each of the student's, where both have read the same; None where they haven't.

    Args:
        student: Characters read at each place of the student's tokens.
        teacher: The same of the teacher's.
        same: Characters that both texts begin with alike.
    """
    places: dict[int, int] = {}
    for place, read in enumerate(teacher):
        if read is not None and read <= same:
            places.setdefault(read, place)
    return [None if read is None else places.get(read) for read in student]


def common(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.rstrip(HALF) + HALF if text.endswith(HALF) else text
