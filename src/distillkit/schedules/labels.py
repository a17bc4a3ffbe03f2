"""Names of schedules as plots show them."""

import re
import unicodedata


def label(name: str) -> str:
    """The name under which a schedule is logged, with Greek letters for their names: `alpha_teacher` is `α teacher`."""
    return re.sub(r"(?<![A-Za-z])[a-z]+(?![A-Za-z])", lambda match: _greek(match[0]), name).replace("_", " ").strip()


def _greek(word: str) -> str:
    """The letter that a word names; the word itself if it names none."""
    try:
        return unicodedata.lookup(f"GREEK SMALL LETTER {'LAMDA' if word == 'lambda' else word.upper()}")
    except KeyError:
        return word
