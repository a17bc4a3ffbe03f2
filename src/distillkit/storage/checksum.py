"""Checksums of stored bytes. They find accidents, such as flipped bits and exchanged files, but no forgery.

XXH3 with 64 bits, read at 15 GB/s on the machine where zlib's CRC-32 reads 1.0 GB/s and SHA-256 0.5 GB/s: two different
contents agree once in 10¹⁹.
"""

import re

import xxhash

CHECKSUM = re.compile(r"[0-9a-f]{16}")
"""The form of a checksum."""


def checksum(*parts: bytes | memoryview) -> str:
    """The XXH3 hash of the concatenated parts, as 16 hex digits."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.hexdigest()
