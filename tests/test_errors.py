import math
import re

import pytest

from distillkit.errors import ConfigError, DataError, check_range, one_line


@pytest.mark.parametrize(
    ("value", "low", "high", "closed"),
    [
        (None, 1, math.inf, "both"),
        (1, 1, math.inf, "both"),
        (0.5, 0, math.inf, "neither"),
        (0, 0, 1, "both"),
        (1, 0, 1, "both"),
        (0, 0, 1, "left"),
        (1, 0, 1, "right"),
        (0.5, 0, 1, "neither"),
    ],
)
def test_values_within_the_range_and_none_pass(value, low, high, closed):
    check_range("Part.size", value, low, high, closed)


@pytest.mark.parametrize(
    ("value", "low", "high", "closed", "message"),
    [
        (0, 1, math.inf, "both", "Part.size must be at least 1, got 0."),
        (0.0, 0, math.inf, "neither", "Part.size must be above 0, got 0.0."),
        (1.5, 0, 1, "both", "Part.size must lie in [0, 1], got 1.5."),
        (-0.1, 0, 1, "both", "Part.size must lie in [0, 1], got -0.1."),
        (1, 0, 1, "left", "Part.size must lie in [0, 1), got 1."),
        (0, 0, 1, "right", "Part.size must lie in (0, 1], got 0."),
        (0, 0, 1, "neither", "Part.size must lie in (0, 1), got 0."),
        (math.nan, 0, 1, "both", "Part.size must lie in [0, 1], got nan."),
        (math.nan, 0, math.inf, "neither", "Part.size must be above 0, got nan."),
    ],
)
def test_values_outside_the_range_are_refused(value, low, high, closed, message):
    with pytest.raises(ConfigError) as caught:
        check_range("Part.size", value, low, high, closed)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", ["0.1", [1.0], {}])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ConfigError, match=rf"^Part\.size must be a number, got {re.escape(repr(value))}\.$"):
        check_range("Part.size", value, 0, 1)


def test_a_note_follows_the_range():
    with pytest.raises(ConfigError, match=r"^Part\.size must be at least 1 \(null reads all rows\), got 0\.$"):
        check_range("Part.size", 0, 1, note=" (null reads all rows)")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain é 世界", "plain é 世界"),
        ("two\nlines\tand a\r\nthird", "two lines and a  third"),
        ("\x1b[31mred \x07\ud83d\u202e", "\\x1b[31mred \\x07\\ud83d\\u202e"),
        ("", ""),
    ],
)
def test_a_message_is_one_line_that_a_terminal_shows_as_it_is(text, line):
    assert one_line(text) == line == str(DataError(text))


@pytest.mark.parametrize("length", [99, 100, 101, 150, 1000])
@pytest.mark.parametrize("letter", ["x", "\x1b"])
def test_of_a_long_message_both_ends_are_shown(length, letter):
    line = one_line(f"begin{letter * (length - 8)}end", 100)
    assert len(line) <= 100
    assert line.startswith("begin")
    assert line.endswith("end")
    assert (" … " in line) == (length > 100 or letter != "x")
