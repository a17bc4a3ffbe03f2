"""ROUGE-L against torchmetrics' on ASCII, and by hand in other scripts."""

import random
import unicodedata

import pytest
from torchmetrics.functional.text.rouge import rouge_score

from distillkit.evaluation.rouge import lcs_length, rouge_l
from helpers.languages import ANSWERS


def texts(seed):
    rng = random.Random(seed)
    fragments = ["the", "The", "cat", "sat", "on", "a_b", "3.5", "don't", "--", "\n", "x" * 9, ""]
    return [rng.choice([" ", ", ", ""]).join(rng.choices(fragments, k=rng.randint(0, 30))) for _ in range(2)]


@pytest.mark.parametrize("seed", range(40))
def test_it_is_torchmetrics_value_on_ascii(seed):
    answer, reference = texts(seed)
    expected = 100 * float(rouge_score(answer, reference, rouge_keys="rougeL")["rougeL_fmeasure"])
    if answer.strip() != reference.strip():
        assert rouge_l(answer, reference) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("script", ANSWERS)
def test_an_answer_equal_to_the_reference_is_perfect_in_every_script(script):
    text = ANSWERS[script]
    assert rouge_l(text, text) == 100
    assert rouge_l(unicodedata.normalize("NFD", text), unicodedata.normalize("NFC", text)) == 100
    other = ANSWERS["Greek" if script != "Greek" else "Latin"]
    assert rouge_l(other, text) < 20


PARTIAL = [
    ("老桥建于1931年", "老桥建于1932年", 2 * 5 / 12),  # 老 桥 建 于 年 of 老 桥 建 于 1931 年
    ("старый мост", "новый мост", 1 / 2),
    ("पुराना पुल", "पुराना घर", 1 / 2),
    ("👍", "👍 ", 1.0),
    ("👍", "👎", 0.0),
    ("+", "plus", 0.0),
    ("", "", 1.0),
    ("", "text", 0.0),
]


@pytest.mark.parametrize(("answer", "reference", "expected"), PARTIAL)
def test_a_part_of_the_reference_counts_as_such(answer, reference, expected):
    assert rouge_l(answer, reference) == pytest.approx(100 * expected)


def test_the_longest_common_subsequence_is_that_of_the_table():
    rng = random.Random(0)
    for _ in range(100):
        first, second = (rng.choices("abcd", k=rng.randint(0, 20)) for _ in range(2))
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        assert lcs_length(first, second) == table[-1][-1]
