"""Public identifiers: a prefix and a time-ordered UUID (version 7) in Crockford's base 32."""

from __future__ import annotations

import re
import secrets
import time

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
PATTERN = re.compile(r"[a-z]{2,5}_[0-9a-hjkmnp-tv-z]{26}")


def new(prefix: str) -> str:
    """Return e.g. `job_01j9…`; ids made later sort later (to the millisecond)."""
    milliseconds = time.time_ns() // 1_000_000
    value = milliseconds << 80 | 7 << 76 | secrets.randbits(76) & ~(3 << 62) | 2 << 62
    letters = []
    for _ in range(26):
        letters.append(ALPHABET[value & 31])
        value >>= 5
    return f"{prefix}_{''.join(reversed(letters))}"
