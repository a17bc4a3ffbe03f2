"""Exact numeric answers: finding the answer in a text, and comparing it with that of a reference."""

import re
from collections.abc import Sequence
from fractions import Fraction

from distillkit.errors import DataError
from distillkit.interfaces import Verifier
from distillkit.types import Prompts, Response

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)?(?:(?<=\d)\.\d+|(?<![\d.])\.\d+)?(?<=\d)(?:[eE][-+]?\d{1,3}(?!\d))?"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>(?<![\w)\]}}])[-+−–]\s?)?[$€£]?\s?(?P<top>{_DECIMAL})(?:\s?/\s?(?P<bottom>{_DECIMAL}))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\{,\}|\\[,!;:]|\\(?=[$%])")
_MARKED = re.compile(r"^[ \t]*#{4}[ \t]*(?P<answer>.*?)[ \t]*$", re.MULTILINE)
_UNIT = re.compile(r"[ \t]*[%°]?[ \t]*[^\W\d]*[.!*]*")


class NumericAnswer(Verifier):
    r"""1 if a response ends in the same number as the response that came with the prompt, else 0.

    The answer is the number after the last `####` line, as in GSM8K, or in the last `\boxed{…}`, or else the last
    number of the text. Numbers are compared exactly, as fractions: 0.5, 1/2, .50 and \frac{1}{2} are equal.
    """

    needs_reference = True

    def check(self, prompts: Prompts) -> None:
        """Refuses prompts whose own response has no number.

        Raises:
            DataError: If one has none.
        """
        for prompt in prompts:
            if prompt.reference is None or answer(prompt.reference) is None:
                found = "has no response of its own" if prompt.reference is None else "has a response without a number"
                raise DataError(
                    f"NumericAnswer compares with the number in the data's response, and prompt "
                    f"{prompt.messages[-1]['content'][:60]!r} {found}: correct the data or use another verifier."
                )

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """0 or 1 for each response.

        Raises:
            DataError: If a prompt's own response has no number.
        """
        self.check(prompts)
        wanted = [answer(prompt.reference or "") for prompt in prompts]
        return [float(answer(response.text) == own) for response, own in zip(responses, wanted, strict=True)]


def answer(text: str) -> Fraction | None:
    r"""The numeric answer that a text gives; None if it has no number.

    Args:
        text: A response, with an answer after `####`, in `\boxed{…}`, or as its last number.
    """
    marked = [found for line in _MARKED.finditer(text) if (found := _only_number(line["answer"])) is not None]
    if marked:
        return marked[-1]
    boxed = _last_boxed(text)
    inside = None if boxed is None else last_number(boxed)
    return last_number(text) if inside is None else inside


def last_number(text: str) -> Fraction | None:
    r"""The last number of a text; None if it has none.

    Read are signs, thousands separated by commas, decimals with a point, powers of ten (`1e3`), fractions (`3/4`,
    `\frac{3}{4}`), and what stands around a number: currency, per cent and units. A minus between two numbers is not a
    sign.
    """
    plain = _plain(text)
    values = [value for found in _NUMBER.finditer(plain) if (value := _value(found)) is not None]
    return values[-1] if values else None


def _only_number(line: str) -> Fraction | None:
    """The number of a line that has nothing but it and a unit: a heading of the fourth level is no answer."""
    plain = _plain(line).strip("* \t")
    found = _NUMBER.match(plain)
    return _value(found) if found is not None and _UNIT.fullmatch(plain, found.end()) else None


def _plain(text: str) -> str:
    """LaTeX fractions as quotients, and its spaces and escapes within numbers gone."""
    text = _FRACTION.sub(lambda found: f" {found[1].strip()}/{found[2].strip()}", text)
    return _LATEX_SPACE.sub(lambda found: "," if found[0] == "{,}" else "", text)


def _value(found: re.Match[str]) -> Fraction | None:
    top = Fraction(found["top"].replace(",", ""))
    bottom = Fraction((found["bottom"] or "1").replace(",", ""))
    if bottom == 0:
        return None
    return -top / bottom if _is_negative(found) else top / bottom


def _is_negative(found: re.Match[str]) -> bool:
    """Whether a minus stands before a number, and not between two: `= - 5` has one, `3 - 5` and `x - 5` have none."""
    sign = found["sign"] or "+"
    start = found.start("sign")
    before = found.string[max(start - 8, 0) : start].rstrip()
    is_between = sign[-1].isspace() and re.search(r"[\w)\]}]$", before) is not None
    return sign[0] in "-−–" and not is_between


def _last_boxed(text: str) -> str | None:
    r"""What stands in the braces of the last `\boxed{…}`; None if there is none or it does not end."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None
