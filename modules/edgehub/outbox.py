"""What is on its way to the cloud: two class queues, and what was written and is not confirmed.

CloudHub does not acknowledge uploads, but answers a websocket ping only when it has taken over every
frame before it. So a *barrier* behind a batch, once passed, settles everything up to it. After a loss of
the link what was not settled goes again, first, in order, with its ids unchanged: duplicates are
possible only inside this last unconfirmed window.

The queue is bounded in messages and bytes per class; what does not fit is not taken (`has_room`), and
its sender waits. Here everything is in memory. A store on disk takes this class's place behind the same
methods: `put` may then settle at once what it has stored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Class(IntEnum):
    """Served lowest first."""

    SIGNAL = 0
    DATA = 1


SUSPECT_LOSSES: Final = 3
"A message that was the first unconfirmed one in so many cuts by the cloud in a row is then sent alone."
POISON_LOSSES: Final = 6
"Three more cuts while it was alone under way: it is given up, or it would cut the link for ever."


@dataclass(frozen=True, slots=True)
class OutboxLimits:
    """Of each class, waiting and unconfirmed together. An empty class takes one message of any size."""

    max_messages: int
    max_bytes: int


class Entry(NamedTuple, Generic[T]):
    """One message on its way up."""

    payload: bytes
    "Its JSON text as it is written."
    token: T
    "Given back when it is settled."
    kind: Class


class Outbox(Generic[T]):
    """Keeps entries until the cloud has them. Order holds within a class, over link losses too.

    `put` -> `take` (written) -> `barrier` (a ping goes behind it) -> `passed` (the pong) gives the tokens
    back, each exactly once. `lost` takes back what was written.
    """

    def __init__(self, limits: OutboxLimits) -> None:
        self._limits = limits
        self._waiting: tuple[deque[Entry[T]], deque[Entry[T]]] = (deque(), deque())
        self._unconfirmed: deque[Entry[T]] = deque()  # in the order they were written
        self._unconfirmed_bytes = 0
        self._held_messages = [0, 0]
        self._held_bytes = [0, 0]
        self._barrier = 0  # number of the last one given out
        self._covered: deque[tuple[int, int]] = deque()  # barrier, how many entries it settles
        self._uncovered = 0  # unconfirmed entries behind the last barrier
        self._suspect: Entry[T] | None = None
        self._suspect_losses = 0

    # --- in ------------------------------------------------------------------------------------

    def has_room(self, kind: Class, size_bytes: int) -> bool:
        """Whether one more of `size_bytes` fits the bounds."""
        if self._held_messages[kind] == 0:
            return True
        return (
            self._held_messages[kind] < self._limits.max_messages
            and self._held_bytes[kind] + size_bytes <= self._limits.max_bytes
        )

    def put(self, payload: bytes, token: T, kind: Class) -> None:
        """Queue it. Ask `has_room` first, but for edgehub's own ACKs: they are bounded by what they answer."""
        self._waiting[kind].append(Entry(payload, token, kind))
        self._held_messages[kind] += 1
        self._held_bytes[kind] += len(payload)

    # --- out -----------------------------------------------------------------------------------

    def take(self, room_bytes: int, *, max_messages: int, max_data: int | None) -> list[Entry[T]]:
        """The next entries to write, signals first: at most `room_bytes` and `max_messages`.

        At most `max_data` of them are data (None: no bound of its own). With nothing unconfirmed the first one
        goes whatever its size. They count as unconfirmed from now on: write them or call `lost`.
        """
        taken: list[Entry[T]] = []
        is_empty = not self._unconfirmed
        if self._suspect_losses >= SUSPECT_LOSSES and self._suspect is not None:
            if not is_empty:
                return taken
            return self._take_suspect()
        left = room_bytes
        for kind in (Class.SIGNAL, Class.DATA):
            waiting = self._waiting[kind]
            most = max_messages - len(taken)
            if kind is Class.DATA and max_data is not None:
                most = min(most, max_data)
            while waiting and most > 0:
                size = len(waiting[0].payload)
                if size > left and not (is_empty and not taken):
                    # Data must not pass a signal that waits for room.
                    return self._written(taken)
                taken.append(waiting.popleft())
                left -= size
                most -= 1
        return self._written(taken)

    def _take_suspect(self) -> list[Entry[T]]:
        for waiting in self._waiting:
            if waiting and waiting[0] is self._suspect:
                return self._written([waiting.popleft()])
        # It was settled or discarded after all.
        self._suspect = None
        self._suspect_losses = 0
        return []

    def _written(self, taken: list[Entry[T]]) -> list[Entry[T]]:
        if taken:
            self._unconfirmed.extend(taken)
            self._unconfirmed_bytes += sum([len(entry.payload) for entry in taken])
            self._uncovered += len(taken)
        return taken

    def barrier(self, *, is_probe: bool = False) -> int | None:
        """Number of a barrier to send behind what was taken so far; None when nothing new needs one.

        `is_probe`: one is wanted in any case, to see whether the link lives and how long a round trip takes.
        """
        if not self._uncovered and not is_probe:
            return None
        self._barrier += 1
        self._covered.append((self._barrier, self._uncovered))
        self._uncovered = 0
        return self._barrier

    def passed(self, barrier: int) -> list[T]:
        """The cloud has everything before `barrier`: the tokens to settle, in order.

        Unknown numbers (of an earlier link) settle nothing.
        """
        settled: list[T] = []
        if not self._covered or barrier > self._barrier:
            return settled
        while self._covered and self._covered[0][0] <= barrier:
            _, count = self._covered.popleft()
            for _ in range(count):
                entry = self._unconfirmed.popleft()
                self._unconfirmed_bytes -= len(entry.payload)
                self._release(entry)
                settled.append(entry.token)
        if settled:
            self._suspect = None
            self._suspect_losses = 0
        return settled

    def lost(self, *, is_cut_by_cloud: bool = False) -> T | None:
        """The link is gone: what is unconfirmed goes again, before all else of its class, in order.

        `is_cut_by_cloud`: the far end closed the link, rather than the path being dead. Returns the token of
        a message that is given up because link after link was cut while it was the first unconfirmed one,
        in the end while it was alone; else None.
        """
        poisoned: T | None = None
        if self._unconfirmed and is_cut_by_cloud:
            first = self._unconfirmed[0]
            if self._suspect is first:
                self._suspect_losses += 1
            else:
                self._suspect = first
                self._suspect_losses = 1
            if self._suspect_losses >= POISON_LOSSES and len(self._unconfirmed) == 1:
                self._unconfirmed.popleft()
                self._release(first)
                poisoned = first.token
                self._suspect = None
                self._suspect_losses = 0
        while self._unconfirmed:
            entry = self._unconfirmed.pop()
            self._waiting[entry.kind].appendleft(entry)
        self._unconfirmed_bytes = 0
        self._uncovered = 0
        self._covered.clear()
        return poisoned

    def _release(self, entry: Entry[T]) -> None:
        self._held_messages[entry.kind] -= 1
        self._held_bytes[entry.kind] -= len(entry.payload)

    # --- state ---------------------------------------------------------------------------------

    @property
    def unconfirmed(self) -> int:
        return len(self._unconfirmed)

    @property
    def unconfirmed_bytes(self) -> int:
        return self._unconfirmed_bytes

    @property
    def has_signals(self) -> bool:
        return bool(self._waiting[Class.SIGNAL])

    @property
    def has_data(self) -> bool:
        return bool(self._waiting[Class.DATA])

    def waiting(self, kind: Class) -> int:
        return len(self._waiting[kind])

    @property
    def held_messages(self) -> int:
        return sum(self._held_messages)

    @property
    def held_bytes(self) -> int:
        return sum(self._held_bytes)

    def entries(self) -> Iterator[Entry[T]]:
        """Everything held: the unconfirmed as written, then what waits."""
        yield from self._unconfirmed
        for waiting in self._waiting:
            yield from waiting
