"""How much may be under way to the cloud: bytes without a pong, and messages per second.

`ByteWindow` bounds the bytes that are written and not yet confirmed. On a slow link everything that
is written ahead delays the next signal and the next keepalive by the time it takes to drain (kernel
buffers alone held 28 s at 100 kB/s), and CloudHub cuts the link after 30 s without a keepalive. So
the window follows what the link carries in about 250 ms.
"""

from __future__ import annotations

from typing import Final

START_BYTES: Final = 16 * 1024
"Before anything is measured: 160 ms on a link of 100 kB/s."
FLOOR_BYTES: Final = 2 * 1024
"Never smaller; a single message always passes an empty window."
TARGET_SECONDS: Final = 0.25
"What is queued on the way should drain in this time."
_RATE_SAMPLE_BYTES: Final = 8 * 1024
"A barrier over less says nothing of the rate: the round trip's noise is larger."
_PROBE_BYTES: Final = (16 * 1024, 64 * 1024, 256 * 1024)
_SURE_SECONDS: Final = 0.5
"What takes so long is slow by the link and not by chance."
_SHORTEST_SECONDS: Final = 0.0005
"For a rate: below this a measured time is noise."


class ByteWindow:
    """Bytes that may be written and unconfirmed, from the time the barriers take.

    A barrier that took hardly longer than an empty link's round trip doubles the window if the window
    was what held the sender up; one that queued for more than TARGET_SECONDS shrinks it in proportion.
    """

    def __init__(self, max_bytes: int, *, start_bytes: int = START_BYTES) -> None:
        self._max_bytes = max_bytes
        self._size = min(start_bytes, max_bytes)
        self._base_rtt: float | None = None
        self._last_rtt: float | None = None
        self._rate: float | None = None
        self._first_write: float | None = None  # of the bytes since the last barrier
        self._bytes = 0  # written since the last barrier
        self._under_way: tuple[float, float, int] | None = None  # barrier sent at, first write, bytes
        self._was_full = False
        self._passed_at = float("-inf")
        self._last_sample: tuple[int, float] | None = None

    @property
    def size_bytes(self) -> int:
        return self._size

    @property
    def rtt_seconds(self) -> float | None:
        """How long the last barrier took."""
        return self._last_rtt

    @property
    def rate_bytes_per_second(self) -> float | None:
        """What the link carries up, smoothed; None before 8 KiB were measured in one go."""
        return self._rate

    @property
    def last_sample(self) -> tuple[int, float] | None:
        """Bytes before the last barrier that passed, and the seconds they took beyond an empty link's round trip."""
        return self._last_sample

    def room(self, unconfirmed_bytes: int) -> int:
        """Bytes that may be written now. Not positive: wait for a pong."""
        room = self._size - unconfirmed_bytes
        if room <= 0:
            self._was_full = True
        return room

    def filled(self) -> None:
        """A message did not fit into the room that was left: the window holds the sender up."""
        self._was_full = True

    def wrote(self, size_bytes: int, *, now: float) -> None:
        if self._first_write is None:
            self._first_write = now
        self._bytes += size_bytes

    @property
    def is_barrier_under_way(self) -> bool:
        return self._under_way is not None

    def barrier_sent(self, *, now: float) -> None:
        """A barrier was written behind everything so far. At most one is under way."""
        assert self._under_way is None, "one barrier at a time"
        # What was written behind the last barrier began to move when that one had passed.
        first = now if self._first_write is None else max(self._first_write, self._passed_at)
        self._under_way = (now, first, self._bytes)
        self._first_write = None
        self._bytes = 0

    def barrier_passed(self, *, now: float) -> None:
        """The pong came."""
        if self._under_way is None:
            return
        sent, first, size = self._under_way
        self._under_way = None
        self._passed_at = now
        rtt = max(now - sent, 0.0)
        self._last_rtt = rtt
        is_nearly_idle = size + self._bytes <= 2 * FLOOR_BYTES
        if self._base_rtt is None or rtt < self._base_rtt:
            self._base_rtt = rtt
        elif is_nearly_idle:
            # Hardly anything was queued: this is what the path takes today (a mobile node may have moved). Under
            # load a longer path looks like a queue first, until the window is small enough to tell them apart.
            self._base_rtt += (rtt - self._base_rtt) / 4
        queued_seconds = rtt - self._base_rtt
        if queued_seconds > TARGET_SECONDS:
            shrunk = int(self._size * TARGET_SECONDS / queued_seconds)
            self._size = min(self._max_bytes, max(FLOOR_BYTES, shrunk, self._size // 4))
        elif (
            self._was_full
            # A barrier over little is quick on the slowest link: what counts is what a whole window would take.
            and size * 4 >= self._size
            and queued_seconds * max(1.0, self._size / size) < TARGET_SECONDS / 2
        ):
            self._size = min(self._max_bytes, self._size * 2)
        self._was_full = False
        taken = max(now - first - self._base_rtt, _SHORTEST_SECONDS)
        self._last_sample = (size, taken)
        if size >= _RATE_SAMPLE_BYTES:
            sample = size / taken
            self._rate = sample if self._rate is None else self._rate + (sample - self._rate) * 0.3

    def is_too_slow_for(self, size_bytes: int, limit_seconds: float) -> bool:
        """Whether a message would block the link for longer than `limit_seconds`, as far as is known."""
        return self._rate is not None and size_bytes > self._rate * limit_seconds and size_bytes > self._size


class RateProbe:
    """Finds out whether a link carries so many bytes a second by sending few: `size_bytes` of padding, then `measured`.

    A little that passes quickly shows that the link is fast; that it passes slowly may be a hiccup, so a verdict of
    `slow` takes half a second of sending, or the largest probe.
    """

    def __init__(self, needed_bytes_per_second: float) -> None:
        self._needed = needed_bytes_per_second
        self._turn = 0
        self.is_fast: bool | None = None
        "None: send a probe."

    @property
    def size_bytes(self) -> int:
        """Of the next probe."""
        return _PROBE_BYTES[self._turn]

    def measured(self, size_bytes: int, seconds: float) -> None:
        """So much passed in that time."""
        if size_bytes / seconds >= self._needed:
            self.is_fast = True
        elif seconds >= _SURE_SECONDS or self._turn == len(_PROBE_BYTES) - 1:
            self.is_fast = False
        else:
            self._turn += 1


class TokenBucket:
    """KubeEdge's messageQPS and messageBurst, for the data class only.

    Unlike KubeEdge's, a burst of 0 means the rate (there it drops every message), a rate of 0 means
    no limit (there the bucket never refills).
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = float(burst if burst > 0 else max(1.0, rate))
        self._tokens = self._burst
        self._at: float | None = None

    @property
    def is_limited(self) -> bool:
        return self._rate > 0

    def available(self, *, now: float) -> int | None:
        """Messages that may go now; None: without limit."""
        if not self.is_limited:
            return None
        if self._at is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        # A token that lacks a rounding error counts, or a sleep until it is due could come too early for ever.
        return int(self._tokens + 1e-6)

    def take(self, count: int) -> None:
        if self.is_limited:
            self._tokens -= count

    def next_at(self) -> float | None:
        """When the next token is there; None: without limit or before the first look."""
        if not self.is_limited or self._at is None:
            return None
        return self._at + max(0.0, (1.0 - self._tokens) / self._rate)
