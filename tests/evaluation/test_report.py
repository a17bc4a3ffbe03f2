"""Reports of an evaluation: the table of the metrics."""

from distillkit.evaluation.report import MEANING, table


def test_the_table_fits_a_terminal_and_loses_no_word() -> None:
    metrics = dict.fromkeys(MEANING, 1.0) | {"mine": 2.0}
    lines = table(metrics, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    assert all(word in words for meaning in MEANING.values() for word in meaning.split())
    assert lines[-1].split() == ["mine", "2.0000"]


def test_without_a_terminal_each_metric_has_one_line() -> None:
    assert len(table(dict.fromkeys(MEANING, 1.0)).splitlines()) == len(MEANING)
