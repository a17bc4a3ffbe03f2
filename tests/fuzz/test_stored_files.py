"""Fuzzers of stored files: each change of a file is noticed or changes nothing, and none ends the process.

A thousand for each kind of file: `DISTILLKIT_FUZZ=1000 pytest tests/fuzz/test_stored_files.py`.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.fuzzing import fuzz, indices, mutated
from helpers.stored_files import KINDS, Kind, sign

NUM_KINDS = 8
SIGNED = ("responses", "prompts", "manifest of a store", "manifest of scores", "teacher.json")
"""Files whose checksums a forger can compute anew with `sign`."""


def flipped(data: bytes, rng: random.Random) -> bytes:
    """A copy with one bit flipped."""
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def changed_file(kind: Kind, folder: Path, change: Callable[[bytes, random.Random], bytes], signed: bool) -> None:
    """Changes a file of this kind again and again; what is read must be what was written, unless it is signed."""
    path = kind.write(folder)
    expected, whole = kind.read(folder), {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def read(data: bytes) -> None:
        path.write_bytes(data)
        if signed:
            sign(path, folder)
        try:
            found = kind.read(folder)
            assert signed or found == expected, "other data was read, and nothing was noticed"
        finally:
            for file, content in whole.items():
                file.write_bytes(content)

    outcome = fuzz(f"{kind.name}, {change.__name__}", lambda rng: change(whole[path], rng), read)
    assert sum(outcome.refused.values()) > 0.1 * len(list(indices()))


def test_all_kinds_are_tried() -> None:
    assert len(KINDS) == NUM_KINDS
    assert set(SIGNED) < set(KINDS)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_flipped_bit_is_noticed(kind: Kind, tmp_path: Path) -> None:
    changed_file(kind, tmp_path, flipped, signed=False)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_file_that_is_cut_or_mixed_up_is_noticed(kind: Kind, tmp_path: Path) -> None:
    changed_file(kind, tmp_path, mutated, signed=False)


@pytest.mark.parametrize("name", SIGNED)
@pytest.mark.parametrize("change", [flipped, mutated])
def test_a_forged_file_is_refused_in_one_line_or_read(
    name: str, change: Callable[[bytes, random.Random], bytes], tmp_path: Path
) -> None:
    changed_file(KINDS[name], tmp_path, change, signed=True)
