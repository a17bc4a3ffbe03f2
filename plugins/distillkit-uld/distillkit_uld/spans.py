"""Alignment of two tokenisations of the same text by character positions."""

from collections.abc import Sequence

from distillkit.types import Tokenizer

HALF = "�"
"""Replacement character that a tokenizer decodes an incomplete character to."""


def boundaries(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[int | None]]:
    """The text of tokens, and the number of characters before each token and after the last.

    Every prefix of the tokens is decoded, which is quadratic in their number: the text of a token depends on its
    context, because it may begin with a space that is dropped at the start, or be part of a character.

    Args:
        tokenizer: A transformers tokenizer.
        ids: Token ids.

    Returns:
        The text, and the number of characters at each boundary from 0 to the number of tokens; None inside a character.
    """
    text = _decoded(tokenizer, ids)
    num_chars: list[int | None] = []
    for boundary in range(len(ids) + 1):
        prefix = _decoded(tokenizer, ids[:boundary])
        num_chars.append(len(prefix) if text.startswith(prefix) else None)
    return text, num_chars


def aligned(student: Sequence[int | None], teacher: Sequence[int | None], same: int) -> list[int | None]:
    """For each token boundary of the student, the teacher's boundary after the same text; None if there is none.

    Args:
        student: Number of characters before each boundary of the student's tokens.
        teacher: The same for the teacher's tokens.
        same: Length of the common prefix of both texts, in characters.
    """
    boundary_at: dict[int, int] = {}  # number of characters -> the teacher's first boundary there
    for boundary, num_chars in enumerate(teacher):
        if num_chars is not None and num_chars <= same:
            boundary_at.setdefault(num_chars, boundary)
    return [None if num_chars is None else boundary_at.get(num_chars) for num_chars in student]


def common(first: str, second: str) -> int:
    """Length of the common prefix of two texts, in characters."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.rstrip(HALF) + HALF if text.endswith(HALF) else text
