"""When a silent link counts as dead.

Progress of any kind counts: a pong, bytes from the cloud, bytes that the cloud's TCP acknowledged; these
only up to what was written before the awaited pong, for the kernel of a CloudHub that hangs goes on
acknowledging whatever trickles in behind it. The time allowed grows with what is queued, so that a
slow link is not taken for a dead one, while a half-open one is found within seconds: a keepalive
message has no answer, so nothing else tells.
"""

from __future__ import annotations

from typing import Final

ROUND_TRIPS: Final = 8
"A link may be silent for so many of its usual round trips."
_OVERHEAD: Final = 1.25
"Bytes on TCP for a byte of a message: TLS records and frame headers of small ones."
_SLACK_BYTES: Final = 2048
"Keepalive, ping and their records."


class Liveness:
    """Told of progress, says how long silence may still last."""

    def __init__(self, *, silence_seconds: float, limit_seconds: float, now: float) -> None:
        """`silence_seconds` on an empty link; never more than `limit_seconds`, whatever is queued."""
        self._silence_seconds = silence_seconds
        self._limit_seconds = limit_seconds
        self._progress_at = now
        self._awaited_since: float | None = None
        self._acknowledged_bytes = 0
        self._credit_bytes = 0.0

    def progress(self, *, now: float) -> None:
        self._progress_at = now

    def barrier_sent(self, *, acknowledged_bytes: int, unconfirmed_bytes: int) -> None:
        """A pong is awaited from now on; so much is on its way before it."""
        self._credit_bytes = acknowledged_bytes + unconfirmed_bytes * _OVERHEAD + _SLACK_BYTES

    def acknowledged(self, total_bytes: int, *, now: float) -> None:
        """TCP says that so many bytes of this link have arrived in all."""
        if total_bytes > self._acknowledged_bytes:
            if self._acknowledged_bytes < self._credit_bytes:
                self._progress_at = now
            self._acknowledged_bytes = total_bytes

    def dead_at(
        self, *, is_awaited: bool, queued_bytes: int, rate: float | None, rtt_seconds: float | None, now: float
    ) -> float | None:
        """When the link is dead unless it moves; None while nothing is awaited of the cloud.

        `rate` in bytes per second and `rtt_seconds` as measured, None when nothing was measured.
        """
        if not is_awaited:
            self._awaited_since = None
            return None
        if self._awaited_since is None:
            self._awaited_since = now
        allowed = self._silence_seconds
        if rtt_seconds is not None:
            allowed = max(allowed, ROUND_TRIPS * rtt_seconds)
        if rate:
            allowed += queued_bytes / rate
        return max(self._progress_at, self._awaited_since) + min(allowed, self._limit_seconds)
