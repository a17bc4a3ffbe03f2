"""Fuzzers of what reads answers: wild texts, numbers written in many ways, code, verdicts."""

import random
import time
from fractions import Fraction

import pytest

from distillkit.data.word_tokens import words
from distillkit.evaluation.rouge import rouge_l
from distillkit.verifiers.code_blocks import code_blocks
from distillkit.verifiers.final_answer import final_answer
from distillkit.verifiers.judge import read_verdict
from distillkit.verifiers.numeric import answer
from helpers.fuzzing import TEXTS, any_text, fuzz

FRAGMENTS = (
    *TEXTS,
    *("####", "\\boxed{", "}", "{", "(", ")", "[", "]", ",", ".", "/", "-", "−", "^", "_", "=", "$", "%", "\\%", "°"),
    *("\\frac", "\\frac{1}{2}", "\\frac12", "\\sqrt{", "\\text{", "\\text{ km}", "\\times", "×", "10^", "e", "E+", "½"),
    *("1", "12", "1,234", "3.5", "٣", "２", "<think>", "</think>", "x", "km", "und", "的", "กุ", "\u00a0", "\t"),
)


def test_any_text_has_an_answer_or_none():
    def read(text):
        number = answer(text)
        assert number is None or isinstance(number, Fraction)
        assert final_answer(text) in text or "<think" in text
        assert all(words(text)) or not words(text)
        assert rouge_l(text, text) == 100

    fuzz("texts with numbers", lambda rng: any_text(rng, FRAGMENTS, most=30), read, seconds=2)


CODE = (
    *TEXTS,
    *("```", "~~~", "````", "```python\n", "```py\r\n", "```bash\n", "\n", "\n    ", "\t", "> ", "1. "),
    *("<think>", "</think>", "def f(x):\n    return x\n", "import os\n", "f(2)\n", "print(input())\n", "if x:"),
    *('"""', "#", "\\", "\x0c", "\u00a0"),
)


def test_any_text_has_code_or_none():
    def read(text):
        blocks = code_blocks(text)
        assert all(isinstance(block.source, str) for block in blocks)
        assert not blocks or not all(block.is_example for block in blocks)

    fuzz("texts with code", lambda rng: any_text(rng, CODE, most=30), read, seconds=2)


VERDICTS = (
    *TEXTS,
    *("A", "B", "a", "b", "tie", "Answer ", "is better", " than ", "**", "[[", "]]", ". ", ", ", "\n", "not "),
    *("I prefer ", "The better answer is ", "Verdict: ", " wins", "<think>", "</think>", " "),
)


def test_any_reply_of_a_judge_has_a_verdict_or_none():
    def read(text):
        assert read_verdict(text) in ("a", "b", "tie", None)

    fuzz("replies of a judge", lambda rng: any_text(rng, VERDICTS, most=20), read, seconds=1)


@pytest.mark.parametrize(
    "text",
    ["A" * 50_000, "not " * 20_000, "[[" * 30_000, "A is the " * 9000, "*" * 50_000 + "A", " " * 50_000, "the " * 9000],
    ids=lambda text: text[:9],
)
def test_a_long_reply_of_a_judge_takes_no_time(text):
    start = time.process_time()
    read_verdict(text)
    assert time.process_time() - start < 1


def written(rng: random.Random) -> tuple[str, Fraction]:
    """A number in one of the ways in which people write it, and its value."""
    whole, decimals = rng.choice((rng.randrange(20), rng.randrange(10**7))), rng.randrange(1, 1000)
    top, bottom = rng.randrange(1, 50), rng.randrange(51, 99)
    text, value = rng.choice(
        [
            (f"{whole}", Fraction(whole)),
            (f"{whole:,}", Fraction(whole)),
            (f"{whole:,}".replace(",", rng.choice(["{,}", "\\,", "\u202f"])), Fraction(whole)),
            (f"{whole}.{decimals:03}", whole + Fraction(decimals, 1000)),
            (f"{whole:,}.{decimals:03}", whole + Fraction(decimals, 1000)),
            (f"{top}/{bottom}", Fraction(top, bottom)),
            (rf"\{rng.choice(['', 'd', 't'])}frac{{{top}}}{{{bottom}}}", Fraction(top, bottom)),
            (rf"{whole}\frac{{{top}}}{{{bottom}}}", whole + Fraction(top, bottom)),
            (f"{whole} {top}/{bottom}", whole + Fraction(top, bottom)),
            (f"{top}e{decimals % 9}", Fraction(top * 10 ** (decimals % 9))),
            (rf"{top} \times 10^{{{decimals % 9}}}", Fraction(top * 10 ** (decimals % 9))),
        ]
    )
    if rng.random() < 0.3:
        text, value = rng.choice("-−") + text, -value
    return text, value


def test_a_number_is_read_however_it_is_written_and_wherever_it_stands():
    frames = [
        "{}",
        "It is {}.",
        "x = {}",
        "First 3, then {} apples.",
        "#### {}",
        "2 + 2 is 4.\n#### {}\n",
        r"So \boxed{{{}}}.",
        r"So $\boxed{{x = {}}}$, not 5.",
        r"\boxed{{{}\text{{ km}}^2}}",
        r"\boxed{{\${}}}",
        r"\boxed{{{}\%}}",
        "<think>5? \\boxed{{6}}?</think>{}",
    ]

    def read(case):
        (text, value), frame = case
        assert answer(frame.format(text)) == value, (frame, text)

    fuzz("numbers as written", lambda rng: (written(rng), rng.choice(frames)), read)
