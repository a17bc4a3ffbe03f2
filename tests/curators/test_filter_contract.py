"""The built-in filters keep the contract of filters."""

import pytest

from distillkit import registry
from distillkit.curators.filters import Empty, Repeated, TooLong, Truncated
from distillkit.testing import check_filter

FILTERS = {Empty: {}, Truncated: {}, Repeated: {"window": 8}, TooLong: {"max_tokens": 10}}


def test_every_filter_is_checked():
    assert {part.__name__ for part in FILTERS} == {
        entry.name for entry in registry.entries("filter") if entry.distribution == "distillkit"
    }


@pytest.mark.parametrize("part", FILTERS)
def test_a_filter_keeps_the_contract(part):
    check_filter(part(**FILTERS[part]))
