import pytest

from distillkit.errors import ConfigError, DataError
from distillkit.types import Prompts, Response
from distillkit.verifiers.distinct import Distinct
from distillkit.verifiers.length import TargetLength
from distillkit.verifiers.likelihood import MeanLogProb

RESPONSES = [
    Response("a", (5, 6, 1), "", "stop", (-1.0, -0.5, 0.0)),
    Response("b", (5,), "", "length", (-0.25,)),
]


@pytest.mark.parametrize(("target", "expected"), [(0, [-3, -1]), (2, [-1, -1]), (10, [-7, -9])])
def test_a_length_is_judged_by_its_distance(target, expected):
    assert TargetLength(target).verify(Prompts(()), RESPONSES) == expected


def test_a_negative_length_is_refused():
    with pytest.raises(ConfigError, match=r"TargetLength\.target must be at least 0, got -1"):
        TargetLength(-1)


def test_the_likelihood_is_the_mean_of_its_tokens():
    assert MeanLogProb().verify(Prompts(()), RESPONSES) == [-0.5, -0.25]


def test_a_response_without_log_probabilities_is_refused():
    with pytest.raises(DataError, match="the response to prompt c has none: use a generator that reports them"):
        MeanLogProb().verify(Prompts(()), [*RESPONSES, Response("c", (5,), "", "stop")])


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ((1, 2, 3), 2, 1.0),
        ((1, 2, 1, 2, 1), 2, 2 / 4),  # 12 21 12 21: two of the four are new
        ((7, 7, 7, 7), 1, 1 / 4),
        ((7, 7, 7, 7), 3, 1 / 2),
        ((7,), 2, 1.0),
        ((), 1, 1.0),
    ],
)
def test_repetition_is_judged_by_the_share_of_new_n_grams(tokens, n, expected):
    assert Distinct(n).verify(Prompts(()), [Response("a", tokens, "", "stop")]) == [expected]


def test_an_n_gram_of_no_token_is_refused():
    with pytest.raises(ConfigError, match=r"Distinct\.n must be at least 1, got 0"):
        Distinct(0)
