"""Python code in the text of a response."""

import ast
import re
import textwrap
import warnings
from dataclasses import dataclass

from distillkit.verifiers.final_answer import final_answer

_FENCE = re.compile(r"[ \t]*+(?P<marks>`{3,}+|~{3,}+)[ \t]*+(?P<info>[^`]*)")
_PYTHON = re.compile(r"[{.\s]*(?:python|py)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """A piece of Python code.

    Args:
        source: The code.
        is_example: Whether it only uses what other blocks define, so that an error in it doesn't count.
    """

    source: str
    is_example: bool = False


def code_blocks(text: str) -> list[Block]:
    """Returns the Python code of a response.

    Of the fenced blocks those marked as Python count, or the unmarked ones if there are none; blocks of other languages
    and code in the response's reasoning do not. Of several blocks, those that are not valid Python are left out. A text
    without fences is code as a whole.

    Args:
        text: A response.

    Returns:
        The blocks, in their order; none if the text has blocks of other languages alone.
    """
    text = re.sub(r"\r\n?", "\n", final_answer(text))
    fenced = _fenced(text)
    if not fenced:
        return [Block(text)]
    marked = [code for info, code in fenced if _PYTHON.match(info)] or [code for info, code in fenced if not info]
    trees = [_tree(source) for source in marked]
    if not any(trees):
        return [Block(source) for source in marked]
    valid = [(source, _defines(tree)) for source, tree in zip(marked, trees, strict=True) if tree is not None]
    has_definition = any(defines for _, defines in valid)
    return [Block(source, has_definition and not defines) for source, defines in valid]


def _fenced(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a text, each with the word or words after its opening fence."""
    blocks: list[tuple[str, str]] = []
    before: list[str] = []
    marks, info, lines = "", "", before
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line)
        if fence is not None and not marks:
            marks, info, lines = fence["marks"], fence["info"].strip(), []
        elif fence is not None and fence["marks"].startswith(marks) and not fence["info"].strip():
            blocks.append((info, textwrap.dedent("\n".join(lines))))
            marks, lines = "", before
        else:
            lines.append(line)
    if not marks:
        return blocks
    rest = textwrap.dedent("\n".join(lines))
    # A single fence without a word closes a block that the prompt had opened, if the text before it is code.
    is_closing = not blocks and not info and _tree("\n".join(before)) is not None and "\n".join(before).strip()
    return [("", "\n".join(before))] if is_closing else [*blocks, (info, rest)]


def _tree(source: str) -> ast.Module | None:
    """The syntax tree of some code; None if it is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the response's escapes and comparisons
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defines(tree: ast.Module) -> bool:
    """True if some code defines or imports something."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    return any(isinstance(statement, kinds) for statement in tree.body)
