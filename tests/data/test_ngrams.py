import random

import pytest

from distillkit.data.ngrams import ngrams, repetition


def test_every_run_of_n_items_is_an_ngram():
    assert list(ngrams("abcd", 2)) == [("a", "b"), ("b", "c"), ("c", "d")]
    assert list(ngrams("ab", 3)) == []


@pytest.mark.parametrize(
    ("text", "expected"), [("abcdef", 0.0), ("aaaaa", 0.75), ("ababab", 0.6), ("ab", 0.0), ("", 0.0)]
)
def test_the_share_of_repeated_bigrams(text, expected):
    assert repetition(text, 2, 99) == pytest.approx(expected)


def test_the_worst_stretch_counts():
    generator = random.Random(0)
    for _ in range(20):
        text = "".join(generator.choices("abc", k=30))
        runs = [text[start : start + 2] for start in range(29)]
        shares = [1 - len(set(runs[start : start + 5])) / 5 for start in range(25)]
        assert repetition(text, 2, 5) == pytest.approx(max(shares))
