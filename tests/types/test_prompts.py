import math

import pytest

from distillkit.errors import ConfigError
from distillkit.types import Prompt, Sampling


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"Sampling\.temperature must be at least 0 \(0 is greedy\), got -0\.1\."),
        ({"temperature": 1e-38}, r"Sampling\.temperature must be 0 \(greedy\) or at least 1e-06, got 1e-38: .*"),
        ({"temperature": math.nan}, r"Sampling\.temperature must be at least 0 \(0 is greedy\), got nan\."),
        ({"top_p": 0.0}, r"Sampling\.top_p must lie in \(0, 1\], got 0\.0\."),
        ({"top_p": 1.5}, r"Sampling\.top_p must lie in \(0, 1\], got 1\.5\."),
        ({"top_k": -1}, r"Sampling\.top_k must be at least 0 \(0 keeps every token\), got -1\."),
        ({"max_new_tokens": 0}, r"Sampling\.max_new_tokens must be at least 1, got 0\."),
    ],
)
def test_a_sampling_out_of_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Sampling(**settings)


def test_the_ends_of_the_ranges_are_accepted():
    Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=1)
    Sampling(temperature=1e-6)


def test_an_excerpt_is_the_start_of_the_turn_to_be_answered():
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?\n" + "x" * 100})
    assert Prompt("an id", turns, (5,)).excerpt == "'Why?\\n" + "x" * 55 + "'"
