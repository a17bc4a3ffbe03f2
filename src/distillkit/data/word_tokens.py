"""Words of a text in any script: the one tokenisation of metrics, decontamination and prompt filters."""

import re
import unicodedata

_ASCII_WORD = re.compile(r"[a-z0-9]+")

_SPACELESS = (
    *("CJK", "IDEOGRAPHIC", "HANGZHOU", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "HENTAIGANA", "BOPOMOFO"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TAI ", "NEW TAI", "AHOM", "JAVANESE", "BALINESE", "YI ", "NUSHU", "KHITAN"),
)
"""First words of the Unicode names of characters whose scripts put no spaces between words."""

_SPACELESS_WORD, _LETTER, _MARK, _INVISIBLE, _SEPARATOR = "slmi "
_WORD = re.compile("sm*|l[lm]*")


class _Classes(dict[int, str]):
    """The class of each character, by its code point; filled as characters are met."""

    def __missing__(self, code: int) -> str:
        self[code] = value = _class_of(chr(code))
        return value


def _class_of(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] in "LN":
        spaceless = unicodedata.name(character, "").startswith(_SPACELESS) and category != "Nd"
        return _SPACELESS_WORD if spaceless else _LETTER
    if character == "\u200b":  # a zero-width space separates words
        return _SEPARATOR
    if category == "Cf" or "VARIATION SELECTOR" in unicodedata.name(character, ""):
        return _INVISIBLE  # soft hyphens, joiners, marks of direction
    return _MARK if category[0] == "M" else _SEPARATOR


_classes = _Classes()


def words(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, without punctuation.

    A word is a run of letters and digits with their combining marks. In scripts written without spaces, such as
    Chinese, Japanese kana, Thai, Lao, Khmer and Burmese, each character with its marks is a word. Texts that Unicode
    regards as equal have the same words: é as one character or as an e with a mark, capital or small. For ASCII these
    are the words of ROUGE (Lin 2004) without stemming.
    """
    if text.isascii():
        return tuple(_ASCII_WORD.findall(text.lower()))
    # Case folding is canonical on decomposed text alone (Unicode standard, section 3.13, definition D145).
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    classes = text.translate(_classes)
    if _INVISIBLE in classes:
        text = "".join(char for char, kind in zip(text, classes, strict=True) if kind != _INVISIBLE)
        classes = classes.replace(_INVISIBLE, "")
    return tuple(text[match.start() : match.end()] for match in _WORD.finditer(classes))
