"""pass@k, by counting all choices."""

import itertools

import pytest

from distillkit.evaluation.pass_at_k import pass_at_k, powers


@pytest.mark.parametrize(("samples", "right"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (7, 1)])
def test_it_is_the_share_of_choices_with_a_right_answer(samples: int, right: int) -> None:
    answers = [place < right for place in range(samples)]
    for k in range(1, samples + 1):
        choices = list(itertools.combinations(answers, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_the_estimate_has_no_bias() -> None:
    # Over all outcomes of five answers that are right with probability 0.3.
    mean = 0.0
    for answers in itertools.product((0, 1), repeat=5):
        weight = 0.3 ** sum(answers) * 0.7 ** (5 - sum(answers))
        mean += weight * pass_at_k(5, sum(answers), 2)
    assert mean == pytest.approx(1 - 0.7**2)


def test_powers_go_up_to_the_number_of_answers() -> None:
    assert [list(powers(most)) for most in (1, 2, 3, 8, 9)] == [[1], [1, 2], [1, 2], [1, 2, 4, 8], [1, 2, 4, 8]]
