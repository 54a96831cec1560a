"""Delays between tries: exponential with full jitter."""

from __future__ import annotations

import random
from typing import Final

FIRST_SECONDS: Final = 1.0
"The first retry comes within this time: most cuts are short, and CloudHub drops 4 % of replacing links."
FLOOR_SECONDS: Final = 0.05
"Never at once: jitter may draw zero."


class Backoff:
    """`delay(n)` after n failures in a row before this one. Chance is handed in; who waits does the counting.

    Full jitter (evenly over the growing bound), so that a thousand nodes do not come back in step when what they
    all lost is there again.
    """

    def __init__(self, chance: random.Random, *, cap_seconds: float, first_seconds: float = FIRST_SECONDS) -> None:
        self._chance = chance
        self._cap_seconds = cap_seconds
        self._first_seconds = first_seconds

    def delay(self, failures: int) -> float:
        """Seconds to wait: evenly between 0.05 s and min(cap, first x 2^failures)."""
        # 2**32 s is beyond any cap; the exponent must not grow with the length of an outage.
        longest = min(self._cap_seconds, self._first_seconds * 2.0 ** min(failures, 32))
        return max(FLOOR_SECONDS, self._chance.uniform(0.0, longest))

    def about(self, seconds: float) -> float:
        """A pause of about so long, a quarter more or less: for what is done again and again, and not in step."""
        return seconds * self._chance.uniform(0.75, 1.25)
