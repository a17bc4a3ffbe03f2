"""Words of texts in many scripts; the scripts without spaces come from Unicode's data, through the package `regex`."""

import unicodedata

import pytest
import regex

from distillkit.data.word_tokens import words
from helpers.languages import ANSWERS

WORDS = {
    "Who's there? STRASSE, straße; 3.5 über-all_1": "who s there strasse strasse 3 5 über all 1",
    " ?! 👍 ❤️ — ": "",
    "Старый мост, 1931 г.": "старый мост 1931 г",
    "नदी पर पुल।": "नदी पर पुल",
    "كِتَابٌ جديد؟": "كِتَابٌ جديد",
    "می‌خواهم": "میخواهم",  # the joiner inside the word is not seen
    "co\u00adoperate a\u200bb": "cooperate a b",
    "河上的桥建于1931年。": "河 上 的 桥 建 于 1931 年",
    "PyTorchは速い。": "pytorch は 速 い",
    "データ": "デ ー タ",
    "か\u3099 が": "が が",
    "ที่นี่ ๒๕": "ที่ นี่ ๒๕",  # a consonant with its vowel and tone marks
    "ស្ពាន": "ស្ ពា ន",
    "မြစ်": "မြ စ်",
    "다리는 1931년": "다리는 1931년",
    "e\u0301t\u00e9": "été",
    "ΌΣΟΣ όσος": "όσοσ όσοσ",
    "İ": "i̇",
    "x² + ⅷ": "x² ⅷ",
}


@pytest.mark.parametrize("text", WORDS)
def test_the_words_of_a_text(text):
    assert words(text) == tuple(unicodedata.normalize("NFC", WORDS[text]).split())


@pytest.mark.parametrize("script", ANSWERS)
def test_equal_texts_have_equal_words_in_every_script(script):
    text = ANSWERS[script]
    expected = words(text)
    assert len(expected) > 4
    assert words(text.upper()) == expected or script == "Georgian"  # capitals that no text has
    for form in ("NFC", "NFD"):
        assert words(unicodedata.normalize(form, text)) == expected
    assert words("".join(expected)) == expected or " " in text
    letters = [c for c in text if unicodedata.category(c)[0] in "LN"]
    assert sum(map(len, expected)) >= len(letters), "no letter is lost"


SPACELESS = regex.compile(
    r"(?V1)[[\p{lb=SA}\p{sc=Han}\p{scx=Hira}\p{scx=Kana}\p{sc=Bopo}\p{sc=Yiii}\p{sc=Nshu}\p{sc=Kits}\p{sc=Java}\p{sc=Bali}]"
    r"&&\p{L}]"
)
EXCEPTIONS = set("〆〻〱〲〳〴〵〼ꧏ\U00016fe3")
"""Marks of repetition and closing, which belong to several scripts."""


def test_the_scripts_without_spaces_are_those_of_unicode():
    letters = [chr(code) for code in range(0x20000) if unicodedata.category(chr(code))[0] == "L"]
    letters = [letter for letter in letters if unicodedata.name(letter, "")]
    assert len(letters) > 40_000
    alone = {letter for letter in letters if len(words(letter + letter)) == 2}
    assert alone ^ {letter for letter in letters if SPACELESS.match(letter)} <= EXCEPTIONS


@pytest.mark.parametrize("text", ["\ud83d", "a\ud83db", "\x00", "\ufffe", "\u0301", "\U000e0100", ""])
def test_any_text_has_words(text):
    assert all(word.strip() for word in words(text))
