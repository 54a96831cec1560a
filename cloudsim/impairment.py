"""A slow, distant or lossy line: when what is sent in one direction arrives. No I/O, time is an argument."""

from __future__ import annotations

import random
from collections import deque
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_SLICES_PER_SECOND: Final = 50
"A throttled line delivers in steps of 20 ms rather than in gulps."
_MIN_SLICE_BYTES: Final = 64


_LINE_SECONDS: Final = 0.25
"A slow line for datagrams holds so much before it drops, as a router's queue does."
_MIN_LINE_BYTES: Final = 16 * 1024


class Pipe:
    """Delays bytes by `latency_seconds` and lets through `bytes_per_second` (None: any number)."""

    def __init__(self) -> None:
        self.latency_seconds = 0.0
        self.bytes_per_second: float | None = None
        self._items: deque[tuple[float, bytes]] = deque()
        self._free_at = 0.0  # when the line has taken over all that was pushed
        self.held_bytes = 0

    @property
    def is_clear(self) -> bool:
        """Nothing is delayed now, and nothing would be."""
        return not self._items and not self.latency_seconds and self.bytes_per_second is None

    def push(self, data: bytes, now: float) -> None:
        """Bytes enter the line. Order is kept, also across a change of the settings."""
        self.held_bytes += len(data)
        rate = self.bytes_per_second
        step = len(data) if rate is None else max(_MIN_SLICE_BYTES, int(rate / _SLICES_PER_SECOND))
        for start in range(0, len(data), step or 1):
            piece = data[start : start + step]
            self._free_at = max(self._free_at, now) + (len(piece) / rate if rate else 0.0)
            ready = self._free_at + self.latency_seconds
            if self._items:
                ready = max(ready, self._items[-1][0])
            self._items.append((ready, piece))

    def pop(self, now: float) -> bytes:
        """The bytes that have arrived."""
        pieces = []
        while self._items and self._items[0][0] <= now:
            pieces.append(self._items.popleft()[1])
        data = b"".join(pieces)
        self.held_bytes -= len(data)
        return data

    def next_deadline(self) -> float | None:
        """When `pop` gives something, or None: the line is empty."""
        return self._items[0][0] if self._items else None

    def clear_rules(self, now: float) -> None:
        """An unimpaired line from now on; what it holds arrives at once."""
        self.latency_seconds, self.bytes_per_second, self._free_at = 0.0, None, now
        self._items = deque((now, piece) for _, piece in self._items)


class DatagramPipe(Generic[T]):
    """The same for datagrams, which it keeps whole and may lose: `loss` of them, and what overflows a slow line."""

    def __init__(self, chance: random.Random) -> None:
        self.latency_seconds = 0.0
        self.bytes_per_second: float | None = None
        self.loss = 0.0
        self._chance = chance
        self._items: deque[tuple[float, int, T]] = deque()
        self._free_at = 0.0  # when the line has taken over all that was pushed
        self._held_bytes = 0

    @property
    def is_clear(self) -> bool:
        """Nothing is delayed or lost now, and nothing would be."""
        return not (self._items or self.latency_seconds or self.loss) and self.bytes_per_second is None

    def push(self, datagram: T, size_bytes: int, now: float) -> None:
        """A datagram enters the line, or is lost. Order is kept, also across a change of the settings."""
        if self.loss and self._chance.random() < self.loss:
            return
        rate = self.bytes_per_second
        if rate is not None:
            if self._held_bytes + size_bytes > max(rate * _LINE_SECONDS, _MIN_LINE_BYTES):
                return
            self._free_at = max(self._free_at, now) + size_bytes / rate
        ready = max(self._free_at, now) + self.latency_seconds
        if self._items:
            ready = max(ready, self._items[-1][0])
        self._items.append((ready, size_bytes, datagram))
        self._held_bytes += size_bytes

    def pop(self, now: float) -> list[T]:
        """The datagrams that have arrived."""
        arrived = []
        while self._items and self._items[0][0] <= now:
            _, size_bytes, datagram = self._items.popleft()
            self._held_bytes -= size_bytes
            arrived.append(datagram)
        return arrived

    def next_deadline(self) -> float | None:
        """When `pop` gives something, or None: the line is empty."""
        return self._items[0][0] if self._items else None

    def clear_rules(self, now: float) -> None:
        """An unimpaired line from now on; what it holds arrives at once."""
        self.latency_seconds, self.bytes_per_second, self.loss, self._free_at = 0.0, None, 0.0, now
        self._items = deque((now, size_bytes, datagram) for _, size_bytes, datagram in self._items)
