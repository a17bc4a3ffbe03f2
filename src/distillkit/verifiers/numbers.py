r"""Numbers in texts and in LaTeX, read exactly and in linear time.

Understood are signs, commas or thin spaces between thousands, decimal points, powers of ten (`1e3`, `1.5 \times 10^3`),
quotients and mixed numbers (`3/4`, `\frac{3}{4}`, `3 1/2`, `½`). Currency and per cent signs are ignored.
"""

import re
import unicodedata
from fractions import Fraction

MAX_DIGITS = 1000
"""Digits of a number; a longer one has no value."""

# Possessive quantifiers (`++`) never give characters back, so that a search takes linear time.
_DIGITS = r"(?:\d++(?:[.,]\d++)*+|\.\d++)"
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>(?<![\w)\]}])[-+]\s?)?[$€£¥]?\s?"
    r"(?:(?P<whole>\d++(?:,\d++)*+)[ \t]++(?P<part>\d++)\s?/\s?(?P<of>\d++)(?![\d.,/]*\d)"
    rf"|(?P<top>{_DIGITS})(?:[eE](?P<exponent>[-+]?\d++)(?!\w))?"
    r"(?:\s?[×*·]\s?10\s?\^\s?(?:\{\s?(?P<braced>[-+]?\d++)\s?\}|(?P<power>[-+]?\d++)))?"
    rf"(?P<bottoms>(?:\s?/\s?{_DIGITS})*+))"
)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(r"\d*\.?\d+")

_COMMAND_SPACE = re.compile(r"\\[,!;: ]|\\(?=[$%])|\\(?:left|right|displaystyle)(?![A-Za-z])|~")
_COMMANDS = (
    (r"\times", "×"),
    (r"\cdot", "·"),
    (r"\approx", "="),
    ("≈", "="),
    (r"{,}", ","),
    (r"\{", "{"),
    (r"\}", "}"),
)
_DEGREE = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|math(?:bf|rm|it|sf)|mbox|bm|boldsymbol|underline)\s*\{([^{}]*)\}")
_TEXT_POWER = re.compile(r"\^\s*(?:\{\s*-?\d\s*\}|\d)")
_THIN_SPACE = re.compile("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))")
_CHARACTERS: dict[int, str | int | None] = {
    **dict.fromkeys(map(ord, "−–‒﹣－"), "-"),
    **dict.fromkeys(map(ord, "⁄∕／"), "/"),
    **{
        ord(char): rf"\frac{{{unicodedata.normalize('NFKC', char).replace('⁄', '}{')}}}"
        for char in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
    },
    **str.maketrans("．，％＝＋（）٫٬", ".,%=+().,"),
}

_UNIT = re.compile(r"\s?[%°]?[CF]?(?:\s[^\W\d_]{2,})*[\s.*]?")
_LINE_UNIT = re.compile(r"\s?[%°]?\s?[^\W\d_]*[.!*]*")
_POWER_OF_TEXT = re.compile(r"\A\s?\^\s?(?:\{\s?-?\d\s?\}|\d)")
_NOT_A_UNIT = re.compile(r"\d|\b(?:and|or|to|[ei])\b")
_OPERAND_BEFORE = re.compile(r"[\^_√/×·]\s?$")
_OPERAND_AFTER = re.compile(r"_|\s?(?:[\^√π]|\\(?:sqrt|pi|overline)(?![A-Za-z]))")
_TUPLE_END = re.compile(r"\s?[)\]}]")
_TUPLE_START = re.compile(r"[(\[{][^()\[\]{}]*[,;][^()\[\]{},;]*$")
_WORD = re.compile(r"[^\W\d_]{2}")
_WINDOW = 1000
"""Characters before a number that are searched for the bracket around it."""


def last_number(text: str) -> Fraction | None:
    r"""Returns the last number in a text; None if there is none, or if it is a part of something else.

    A minus between two numbers is not a sign. The last number is a part of something else in an expression such as
    `2\sqrt{3}`, `10^{-3}` and `101_2`, in a tuple such as `(5, 7)`, and in digits that are no number, such as `1.2.3`.
    """
    plain = _plain(text)
    matches = list(_NUMBER.finditer(plain))
    return None if not matches or _is_operand(matches[-1]) else _value(matches[-1])


def only_number(text: str) -> Fraction | None:
    r"""Returns the value of a mathematical text that is one number; None if it is more or less than that.

    A name before an equals sign (`x = 5`), units and words in `\text{…}` or after a space, and brackets around the
    number are allowed. Not so letters next to a number, which are variables in LaTeX.
    """
    plain = _plain(text, words=False).strip(" $")
    name, equals, value = plain.rpartition("=")
    if equals and re.fullmatch(r"[^\d=,;]*", name):
        plain = value.strip()
    while plain[:1] + plain[-1:] in ("()", "{}"):
        plain = plain[1:-1].strip()
    match = _NUMBER.match(plain)
    return _value(match) if match is not None and _UNIT.fullmatch(plain, match.end()) else None


def line_number(line: str) -> Fraction | None:
    """Returns the number of a line that contains only a number and possibly a unit; None for another line."""
    plain = _plain(line).strip("* ")
    match = _NUMBER.match(plain)
    return _value(match) if match is not None and _LINE_UNIT.fullmatch(plain, match.end()) else None


def _plain(text: str, words: bool = True) -> str:
    r"""The text with quotients for fractions, one character for each sign, and single spaces.

    Args:
        text: A text, with or without LaTeX.
        words: Whether the words in `\text{…}` stay, and the exponents of units after them.
    """
    text = _THIN_SPACE.sub(",", text).translate(_CHARACTERS)
    for command, character in _COMMANDS:
        text = text.replace(command, character)
    text = _DEGREE.sub("°", _COMMAND_SPACE.sub("", text))
    text = _FRACTION.sub(_quotient, text)
    pieces = _TEXT.split(text)  # outside, inside, outside, …
    for index in range(1, len(pieces), 2):
        if not words and not _NOT_A_UNIT.search(pieces[index]):
            pieces[index] = ""
            pieces[index + 1] = _POWER_OF_TEXT.sub("", pieces[index + 1])
    return " ".join(" ".join(pieces).split())


def _quotient(match: re.Match[str]) -> str:
    """A LaTeX fraction as a quotient, apart from a number before it but not from a sign."""
    space = "" if match.string[max(match.start() - 1, 0)] in "+-" else " "
    return f"{space}{match[1] or match[2]}/{match[3] or match[4]} "


def _is_operand(match: re.Match[str]) -> bool:
    """True if a number is a part of an expression or a tuple."""
    text, start, end = match.string, match.start(), match.end()
    before = text[max(start - _WINDOW, 0) : start]
    if _OPERAND_BEFORE.search(before[-2:]) or _OPERAND_AFTER.match(text, end) or _in_argument(before):
        return True
    opening = _TUPLE_START.search(before) if _TUPLE_END.match(text, end) else None
    return opening is not None and _WORD.search(opening[0]) is None


def _in_argument(before: str) -> bool:
    r"""True if a text ends within the braces of a LaTeX command, as in `\sqrt{2 + `, or of an exponent."""
    depth = 0
    for index in range(len(before) - 1, 0, -1):
        depth += {"}": 1, "{": -1}.get(before[index], 0)
        if depth < 0:
            return re.search(r"[A-Za-z\]}^_]\s?$", before[max(index - 2, 0) : index]) is not None
    return False


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of what `_NUMBER` matched; None if that is no number, too long, or a division by zero."""
    if sum(map(str.isdigit, match[0])) > MAX_DIGITS:
        return None
    if match["whole"] is not None:
        whole, part, of = (_decimal(match[name]) for name in ("whole", "part", "of"))
        if whole is None or part is None or of is None or part >= of:
            return None
        value = whole + part / of
    else:
        bottoms = [_decimal(bottom.strip()) for bottom in match["bottoms"].split("/")[1:]]
        top, power = _decimal(match["top"]), _power(match)
        if top is None or power is None or len(bottoms) > 1 or not all(bottoms):
            return None
        value = top * power / (bottoms[0] or 1 if bottoms else 1)
    return -value if _is_negative(match) else value


def _decimal(digits: str) -> Fraction | None:
    """The value of digits with points and commas; None if the commas are not between thousands."""
    if _THOUSANDS.fullmatch(digits):
        digits = digits.replace(",", "")
    return Fraction(digits) if _DECIMAL.fullmatch(digits) else None


def _power(match: re.Match[str]) -> Fraction | None:
    """The power of ten of a number; None if its digits would be too many."""
    exponent = int(match["exponent"] or 0) + int(match["braced"] or match["power"] or 0)
    return Fraction(10) ** exponent if abs(exponent) < MAX_DIGITS else None


def _is_negative(match: re.Match[str]) -> bool:
    """True if a minus sign belongs to the number: in `= - 5` it does, in `3 - 5` and `x - 5` it does not."""
    sign = match["sign"] or "+"
    start = match.start("sign")
    before = match.string[max(start - 8, 0) : start].rstrip()
    is_between = sign[-1].isspace() and re.search(r"[\w)\]}]$", before) is not None
    return sign[0] == "-" and not is_between
