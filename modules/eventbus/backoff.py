"""Delays between tries: exponential with full jitter."""

from __future__ import annotations

from random import Random


class Backoff:
    """How long to wait before the next try. The first wait after `reset` is below `first_seconds`.

    Full jitter (a uniform share of the growing bound) spreads many nodes that lost one broker together.
    """

    def __init__(self, random: Random, *, first_seconds: float = 1.0, cap_seconds: float = 30.0) -> None:
        self._random = random
        self._first = first_seconds
        self._cap = cap_seconds
        self._bound = first_seconds

    def reset(self) -> None:
        self._bound = self._first

    def next_delay(self) -> float:
        """Seconds to wait now; the bound of the following one is twice as high, up to the cap."""
        delay = self._random.uniform(0.0, min(self._bound, self._cap))
        self._bound = min(self._bound * 2, self._cap)
        return delay
