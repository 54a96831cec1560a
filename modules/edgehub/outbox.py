"""What is on its way to the cloud: per class what waits, what was written and is not confirmed, what is on disk.

CloudHub does not acknowledge uploads, but answers a websocket ping only when it has taken over every
frame before it. So a *barrier* behind a batch, once passed, settles everything up to it. After a loss of
the link what was not settled goes again, first, in order, with its ids unchanged: duplicates are
possible only inside this last unconfirmed window.

While the cloud confirms, messages wait here in memory for their barrier and never touch the disk. What is not
confirmed in time, or meets no link, is *spilled*: stored, and settled to its sender then. A core: it says what
to store, to read and to delete (`spill`, `wanted`, `deletions`) and is told what came of it (`stored`, `loaded`,
`dropped`); `modules.edgehub.store` does it.

Order within a class, oldest first: unconfirmed, then stored (a few of them loaded), then fresh. What is stored is
always a prefix of it, so rows are numbered in the order in which messages were accepted, without gaps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Generic, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")


class Class(IntEnum):
    """Served lowest first."""

    SIGNAL = 0
    DATA = 1


SUSPECT_LOSSES: Final = 3
"A message that was the first unconfirmed one in so many cuts by the cloud in a row is then sent alone."
POISON_LOSSES: Final = 6
"Three more cuts while it was alone under way: it is given up, or it would cut the link for ever."
LOADED_BYTES: Final = 512 * 1024
"Of each class so much of what is stored is held in memory, ready to be written."
COALESCED_KEYS: Final = 4096
"Of each class so many keys are known; a message with a further one stands for itself."
SPILL_MESSAGES: Final = 4096
"Messages in one order to store; further ones follow."


@dataclass(frozen=True, slots=True)
class OutboxLimits:
    """Of each class, in memory: waiting and unconfirmed together. An empty class takes one message of any size."""

    max_messages: int
    max_bytes: int
    stored_messages: int = 10_000_000
    "On disk, of each class."
    stored_bytes: int = 1 << 62


class Entry(msgspec.Struct, Generic[T], eq=False):  # a Struct is made in a third of the time
    """One message on its way up."""

    payload: bytes
    "Its text as it is written."
    token: T | None
    "Given back when it is settled; None once it was."
    kind: Class
    sender: str
    since: float
    "When it was put, then when it was written."
    is_volatile: bool
    "Never stored: nobody would wait for it after a restart."
    row: int
    "Its number on disk; 0 = none."
    storing: bool = False
    "Ordered to be stored, not committed yet."
    confirmed: bool = False
    key: str = ""
    "What a later message may take its place by."


class StoredRow(NamedTuple):
    """A row as it is stored and loaded."""

    row: int
    sender: str
    payload: bytes


class Poisoned(NamedTuple, Generic[T]):
    """A message that is given up, for the cloud cuts every link on which it comes."""

    token: T | None
    "None: it was accepted before; its loss belongs into the ledger."
    kind: Class
    sender: str
    payload: bytes


class _Queue(Generic[T]):
    """One class."""

    def __init__(self) -> None:
        self.volatile: deque[Entry[T]] = deque()
        self.loaded: deque[Entry[T]] = deque()  # stored, in memory, to be written
        self.loaded_bytes = 0
        self.fresh: deque[Entry[T]] = deque()  # not stored yet; behind everything that is
        self.storing: deque[Entry[T]] = deque()  # ordered, in the order of their rows
        self.last_row = 0  # given out
        self.committed_row = 0
        self.cursor = 0  # rows up to this one are in memory, or done with
        self.stored_messages = 0  # committed and not confirmed
        self.stored_bytes = 0
        self.memory_messages = 0  # not stored: fresh, volatile and unconfirmed
        self.memory_bytes = 0
        self.is_reading = False
        self.delete_upto = 0
        self.latest: dict[str, Entry[T] | tuple[int, int]] = {}  # by key: what waits; or its row and size, on disk
        self.replaced: dict[int, bytes] = {}  # rows whose new payload is ordered and not committed
        self.done_row = 0  # the cloud has all rows up to this one

    @property
    def unloaded(self) -> int:
        return max(0, self.committed_row - self.cursor)

    @property
    def has_work(self) -> bool:
        return bool(self.volatile or self.loaded or (self.fresh and not self.unloaded))


class _Flight(Generic[T]):
    """What was written and is not confirmed, and the barriers behind it."""

    def __init__(self) -> None:
        self.unconfirmed: deque[Entry[T]] = deque()  # in the order they were written
        self.bytes = 0
        self.covered: deque[tuple[int, int]] = deque()  # barrier, how many entries it settles
        self.uncovered = 0  # unconfirmed entries behind the last barrier

    def oldest_unstored(self) -> float | None:
        return next((entry.since for entry in self.unconfirmed if not entry.row and not entry.is_volatile), None)


class Outbox(Generic[T]):
    """Keeps entries until the cloud has them. Order holds within a class, over link losses and restarts too.

    `put` -> `take` (written) -> `barrier` (a ping goes behind it) -> `passed` (the pong) gives the tokens back, each
    exactly once: then or when it is `stored`, whichever comes first. `lost` takes back what was written.
    """

    def __init__(self, limits: OutboxLimits) -> None:
        self._limits = limits
        self._queues: tuple[_Queue[T], _Queue[T]] = (_Queue(), _Queue())
        self._flights: tuple[_Flight[T], ...] = (_Flight(),)  # one for both classes, or one each
        self._barrier = 0  # number of the last one given out
        self._suspect: Entry[T] | None = None
        self._suspect_losses = 0
        self.confirmed = 0
        "Messages that the cloud has, over the life of this process."
        self.accepted = 0
        "Messages put, over the life of this process: with the restored ones, confirmed + held + dropped + given up."
        self.restored = 0
        self.given_up = 0
        self.dropped_messages = 0
        "Dropped after acceptance; they are in the ledger."
        self.coalesced = 0
        "Those of them whose place a later one took."
        self.dropped_in_vain = 0
        "Those of them that were under way all the same, or with the cloud already."

    def restore(self, kind: Class, first: int, last: int, messages: int, size_bytes: int) -> None:
        """What the file holds of a class at the start: rows `first` to `last`."""
        queue = self._queues[kind]
        queue.last_row = queue.committed_row = last
        queue.cursor = first - 1
        queue.stored_messages = messages
        queue.stored_bytes = size_bytes
        self.restored += messages

    # --- in ------------------------------------------------------------------------------------

    def has_room(self, kind: Class, size_bytes: int) -> bool:
        """Whether one more of `size_bytes` fits the bounds."""
        queue = self._queues[kind]
        limits = self._limits
        if queue.memory_messages:
            if queue.memory_messages >= limits.max_messages or queue.memory_bytes + size_bytes > limits.max_bytes:
                return False
        elif not queue.stored_messages:
            return True
        return (
            queue.stored_messages + queue.memory_messages < limits.stored_messages
            and queue.stored_bytes + queue.memory_bytes + size_bytes <= limits.stored_bytes
        )

    def put(
        self,
        payload: bytes,
        token: T,
        kind: Class,
        *,
        sender: str = "",
        now: float = 0.0,
        is_volatile: bool = False,
        key: str = "",
    ) -> None:
        """Queue it. Ask `has_room` first, but for edgehub's own ACKs: they are bounded by what they answer.

        `is_volatile`: it is never stored (requests, ACKs) and passes what is. `key`: see `coalesce`.
        """
        queue = self._queues[kind]
        entry: Entry[T] = Entry(payload, token, kind, sender, now, is_volatile, 0)
        (queue.volatile if is_volatile else queue.fresh).append(entry)
        self.accepted += 1
        queue.memory_messages += 1
        queue.memory_bytes += len(payload)
        if key and len(queue.latest) < COALESCED_KEYS:
            entry.key = key
            queue.latest[key] = entry

    def has_place(self, key: str, kind: Class) -> bool:
        """Whether a message with this `key` waits."""
        return key in self._queues[kind].latest

    def coalesce(
        self, key: str, payload: bytes, token: T, kind: Class, *, sender: str, merge: Callable[[T, T], T]
    ) -> int:
        """Let a message take the place of the one with the same `key` that waits (`has_place`); only without a link.

        0: done, in memory; both tokens, merged, are settled together. Else the number
        of a row: have its payload replaced on disk, then call `replaced`, and settle the token yourself.
        """
        queue = self._queues[kind]
        place = queue.latest[key]
        self.accepted += 1
        self.dropped_messages += 1
        self.coalesced += 1
        if isinstance(place, tuple):
            row, size = place
            queue.latest[key] = (row, len(payload))
            queue.stored_bytes += len(payload) - size
            queue.replaced[row] = payload
            return row
        growth = len(payload) - len(place.payload)
        place.payload, place.sender = payload, sender
        if place.row == 0 or place.storing:
            queue.memory_bytes += growth
        else:
            queue.stored_bytes += growth
            queue.loaded_bytes += growth
        if place.row == 0 and place.token is not None:
            place.token = merge(place.token, token)
            return 0
        queue.replaced[place.row] = payload
        return place.row

    def replaced(self, kind: Class, row: int, payload: bytes) -> None:
        """The row's new payload is committed (or there is no such row any more)."""
        queue = self._queues[kind]
        if queue.replaced.get(row) is payload:
            del queue.replaced[row]

    def settle_places(self) -> None:
        """A link is there: from now on every message stands for itself."""
        for queue in self._queues:
            queue.latest.clear()

    # --- out -----------------------------------------------------------------------------------

    def keep_apart(self, is_apart: bool) -> None:
        """Whether the two classes go up independently of each other over the link to come; nothing is under way."""
        assert not self.unconfirmed, "a link is there"
        self._flights = (_Flight(), _Flight()) if is_apart else (_Flight(),)

    def _flight(self, kind: Class) -> _Flight[T]:
        return self._flights[kind if len(self._flights) > 1 else 0]

    def _unconfirmed(self) -> Iterator[Entry[T]]:
        """What is under way, of each class in the order in which it was written."""
        for flight in self._flights:
            yield from flight.unconfirmed

    def take(
        self,
        room_bytes: int,
        *,
        max_messages: int,
        max_data: int | None,
        max_signals: int | None = None,
        signal_bytes: int = 0,
        now: float | None = None,
        only: Class | None = None,
    ) -> list[Entry[T]]:
        """The next entries to write, signals first: at most `room_bytes` and `max_messages`. `now`: they are written.

        At most `max_data` of them are data, `max_signals` signals (None: no bound of its own); signals may exceed the
        room by `signal_bytes`. With nothing unconfirmed the first one goes whatever its size. They count as
        unconfirmed from now on: write them or call `lost`. `only` this class, where the two are apart.
        """
        taken: list[Entry[T]] = []
        if self._suspect_losses >= SUSPECT_LOSSES and self._suspect is not None:
            if self.unconfirmed:
                return taken
            return self._take_suspect(now)
        is_empty = not self._flight(Class.DATA if only is None else only).unconfirmed
        left = room_bytes + signal_bytes
        for kind, limit in ((Class.SIGNAL, max_signals), (Class.DATA, max_data)):
            if only is not None and kind is not only:
                continue
            most = max_messages - len(taken)
            if limit is not None:
                most = min(most, limit)
            if kind is Class.DATA:
                left -= signal_bytes
            queue = self._queues[kind]
            while most > 0:
                source = self._source(queue)
                if source is None:
                    break
                # What is taken from a source makes no other one come before it.
                while source and most > 0:
                    entry = source[0]
                    size = len(entry.payload)
                    if size > left and not (is_empty and not taken):
                        # Data must not pass a signal that waits for room.
                        return self._written(taken, now)
                    if entry.row:
                        self._pop(queue, source)
                    else:
                        source.popleft()
                    taken.append(entry)
                    left -= size
                    most -= 1
        return self._written(taken, now)

    @staticmethod
    def _source(queue: _Queue[T]) -> deque[Entry[T]] | None:
        """Where the next entry of a class is, or None: there is none, or it has to be loaded first."""
        if queue.volatile:
            return queue.volatile
        if queue.loaded:
            return queue.loaded
        if queue.fresh and not queue.unloaded:
            return queue.fresh
        return None

    @staticmethod
    def _pop(queue: _Queue[T], source: deque[Entry[T]]) -> Entry[T]:
        entry = source.popleft()
        if source is queue.loaded:
            queue.loaded_bytes -= len(entry.payload)
        elif entry.row:
            queue.cursor = entry.row  # it is in memory although it is (being) stored
        return entry

    def _take_suspect(self, now: float | None) -> list[Entry[T]]:
        for queue in self._queues:
            for source in (queue.volatile, queue.loaded, queue.fresh):
                if source and source[0] is self._suspect:
                    return self._written([self._pop(queue, source)], now)
        # It was settled or discarded after all.
        self._suspect = None
        self._suspect_losses = 0
        return []

    def _written(self, taken: list[Entry[T]], now: float | None) -> list[Entry[T]]:
        if taken:
            if now is not None:
                for entry in taken:
                    entry.since = now
            flight = self._flight(taken[0].kind)
            flight.unconfirmed.extend(taken)
            flight.bytes += sum([len(entry.payload) for entry in taken])
            flight.uncovered += len(taken)
        return taken

    def barrier(self, kind: Class = Class.DATA, *, is_probe: bool = False) -> int | None:
        """Number of a barrier to send behind what was taken so far; None when nothing new needs one.

        Of `kind`, where the two are apart. `is_probe`: one is wanted in any case, to see whether the link lives and
        how long a round trip takes.
        """
        flight = self._flight(kind)
        if not flight.uncovered and not is_probe:
            return None
        self._barrier += 1
        flight.covered.append((self._barrier, flight.uncovered))
        flight.uncovered = 0
        return self._barrier

    def passed(self, barrier: int) -> list[T]:
        """The cloud has everything before `barrier`: the tokens to settle, in order.

        Unknown numbers (of an earlier link) settle nothing. What was settled already, when it was stored, is
        confirmed without a token: see `confirmed`.
        """
        settled: list[T] = []
        flight = next((each for each in self._flights if any(number == barrier for number, _ in each.covered)), None)
        if flight is None:
            return settled
        count = 0
        while flight.covered and flight.covered[0][0] <= barrier:
            count += flight.covered.popleft()[1]
        next_entry = flight.unconfirmed.popleft
        for _ in range(count):
            entry = next_entry()
            flight.bytes -= len(entry.payload)
            if entry.row:
                self._done(entry)
            else:
                entry.confirmed = True
                queue = self._queues[entry.kind]
                queue.memory_messages -= 1
                queue.memory_bytes -= len(entry.payload)
            if entry.token is not None:
                settled.append(entry.token)
                entry.token = None
        self.confirmed += count
        if count:
            self._suspect = None
            self._suspect_losses = 0
        return settled

    def _done(self, entry: Entry[T]) -> None:
        """The entry needs no place any more."""
        queue = self._queues[entry.kind]
        entry.confirmed = True
        if entry.row:
            queue.delete_upto = max(queue.delete_upto, entry.row)
            queue.done_row = max(queue.done_row, entry.row)
        if entry.row and not entry.storing:
            queue.stored_messages -= 1
            queue.stored_bytes -= len(entry.payload)
        else:
            queue.memory_messages -= 1
            queue.memory_bytes -= len(entry.payload)

    def lost(self, *, is_cut_by_cloud: bool = False) -> Poisoned[T] | None:
        """The link is gone: what is unconfirmed goes again, before all else of its class, in order.

        `is_cut_by_cloud`: the far end closed the link, rather than the path being dead. Returns a message that is
        given up because link after link was cut while it was the first unconfirmed one, in the end while it
        was alone; else None.
        """
        poisoned: Poisoned[T] | None = None
        flying = next((flight for flight in self._flights if flight.unconfirmed), None)
        if flying is not None and is_cut_by_cloud:
            first = flying.unconfirmed[0]
            if self._suspect is first:
                self._suspect_losses += 1
            else:
                self._suspect = first
                self._suspect_losses = 1
            if self._suspect_losses >= POISON_LOSSES and self.unconfirmed == 1:
                flying.unconfirmed.popleft()
                self._done(first)
                if first.token is not None:
                    self.given_up += 1
                else:
                    self.dropped_messages += 1
                poisoned = Poisoned(first.token, first.kind, first.sender, first.payload)
                self._suspect = None
                self._suspect_losses = 0
        for entry in reversed(list(self._unconfirmed())):
            queue = self._queues[entry.kind]
            if entry.is_volatile:
                queue.volatile.appendleft(entry)
            elif entry.row:
                queue.loaded.appendleft(entry)
                queue.loaded_bytes += len(entry.payload)
            else:
                queue.fresh.appendleft(entry)
        self._flights = (_Flight(),)
        return poisoned

    # --- the disk ------------------------------------------------------------------------------------

    def spill(self, kind: Class, written_before: float, put_before: float | None = None) -> list[StoredRow]:
        """What is to be stored now, oldest first: what was written before `written_before` and is not confirmed, and
        what was put before `put_before` (None: the same) and could not be written yet.

        At most SPILL_MESSAGES; call it again while it gives any. Tell `stored` when it is committed.
        """
        queue = self._queues[kind]
        rows: list[StoredRow] = []
        if put_before is None:
            put_before = written_before
        waiting = next((entry for entry in queue.fresh if not entry.row), None)
        if waiting is not None and waiting.since < put_before:
            written_before = float("inf")  # what waits may only be stored behind what was written before it
        for entry in self._unconfirmed():
            if entry.kind is kind and not entry.row and not entry.is_volatile:
                if entry.since >= written_before or len(rows) >= SPILL_MESSAGES:
                    return rows
                rows.append(self._number(queue, entry))
                queue.cursor = entry.row
        for entry in queue.fresh:
            if entry.row:
                continue
            if entry.since >= put_before or len(rows) >= SPILL_MESSAGES:
                return rows
            rows.append(self._number(queue, entry))
        return rows

    @staticmethod
    def _number(queue: _Queue[T], entry: Entry[T]) -> StoredRow:
        queue.last_row += 1
        entry.row = queue.last_row
        entry.storing = True
        queue.storing.append(entry)
        return StoredRow(entry.row, entry.sender, entry.payload)

    def oldest_unstored(self) -> tuple[float | None, float | None]:
        """When the oldest message was written, and the oldest put, that are not stored; None: there is none."""
        written = min((at for flight in self._flights if (at := flight.oldest_unstored()) is not None), default=None)
        put: float | None = None
        for queue in self._queues:
            if queue.fresh:
                # Those that are being stored come first, and are the older ones.
                entry = queue.fresh[-1] if queue.fresh[0].row else queue.fresh[0]
                if not entry.row and (put is None or entry.since < put):
                    put = entry.since
        return written, put

    def stored(self, kind: Class, upto: int) -> list[T]:
        """All rows up to number `upto` are committed: the tokens to settle, in order."""
        queue = self._queues[kind]
        settled: list[T] = []
        while queue.storing and queue.storing[0].row <= upto:
            entry = queue.storing.popleft()
            entry.storing = False
            queue.committed_row = max(queue.committed_row, entry.row)
            if entry.confirmed:
                continue
            size = len(entry.payload)
            queue.memory_messages -= 1
            queue.memory_bytes -= size
            queue.stored_messages += 1
            queue.stored_bytes += size
            if entry.token is not None:
                settled.append(entry.token)
                entry.token = None
        # What waited in memory only because it was not stored yet is on disk now; a little stays, to be written next.
        while queue.fresh and queue.fresh[0].row and not queue.fresh[0].storing:
            entry = queue.fresh.popleft()
            if queue.cursor == entry.row - 1 and queue.loaded_bytes < LOADED_BYTES:
                queue.loaded.append(entry)
                queue.loaded_bytes += len(entry.payload)
                queue.cursor = entry.row
            elif entry.key and queue.latest.get(entry.key) is entry:
                queue.latest[entry.key] = (entry.row, len(entry.payload))
        return settled

    def wanted(self) -> list[tuple[Class, int]]:
        """Which rows should be read: (class, the number they come behind). Answer each with `loaded`."""
        wanted: list[tuple[Class, int]] = []
        for kind in Class:
            queue = self._queues[kind]
            if queue.unloaded and not queue.is_reading and queue.loaded_bytes < LOADED_BYTES // 2:
                queue.is_reading = True
                wanted.append((kind, queue.cursor))
        return wanted

    def loaded(self, kind: Class, after: int, rows: Sequence[StoredRow], *, now: float) -> None:
        """What was read behind row `after`; nothing when the file holds nothing there."""
        queue = self._queues[kind]
        queue.is_reading = False
        if not rows:
            if queue.cursor == after:
                queue.cursor = queue.committed_row  # a file begun anew: what was there is gone
            return
        places = {place[0]: key for key, place in queue.latest.items() if isinstance(place, tuple)}
        for row in rows:
            if row.row != queue.cursor + 1 or row.row > queue.committed_row:
                continue  # it came into memory another way, or was dropped meanwhile
            payload = queue.replaced.get(row.row, row.payload)
            entry: Entry[T] = Entry(payload, None, kind, row.sender, now, False, row.row)
            queue.loaded.append(entry)
            queue.loaded_bytes += len(payload)
            if row.row in places:
                entry.key = places[row.row]
                queue.latest[entry.key] = entry
            queue.cursor = row.row

    def deletions(self) -> list[tuple[Class, int]]:
        """What the cloud has since the last call: (class, all rows up to this number)."""
        found = []
        for kind in Class:
            queue = self._queues[kind]
            if queue.delete_upto:
                found.append((kind, queue.delete_upto))
                queue.delete_upto = 0
        return found

    def dropped(self, kind: Class, upto: int, messages: int, size_bytes: int) -> None:
        """Rows up to `upto` were dropped from the file, into the ledger (age, size)."""
        queue = self._queues[kind]
        # Rows have no gaps: these are `upto - messages + 1` to `upto`. The first may have been confirmed meanwhile.
        late = max(0, min(upto, queue.done_row) - (upto - messages))
        self.dropped_messages += messages
        self.dropped_in_vain += late
        queue.stored_messages = max(0, queue.stored_messages - (messages - late))
        queue.stored_bytes = max(0, queue.stored_bytes - size_bytes * (messages - late) // max(1, messages))
        for key, place in list(queue.latest.items()):
            if 0 < (place[0] if isinstance(place, tuple) else place.row) <= upto:
                del queue.latest[key]
        while queue.loaded and queue.loaded[0].row <= upto:
            queue.loaded_bytes -= len(queue.loaded.popleft().payload)
        for entry in self._unconfirmed():
            if entry.kind is kind and 0 < entry.row <= upto and not entry.storing:
                # It is under way all the same; it only has no row any more.
                entry.row = 0
                entry.is_volatile = True
                self.dropped_in_vain += 1
                queue.memory_messages += 1
                queue.memory_bytes += len(entry.payload)
        queue.cursor = max(queue.cursor, upto)

    def damaged(self) -> int:
        """The file was begun anew: what is still in memory is to be stored again. Returns how many rows are gone."""
        gone = 0
        for queue in self._queues:
            gone += queue.unloaded
            queue.latest.clear()
            queue.replaced.clear()
            queue.storing.clear()
            for entry in queue.loaded:
                self._unstore(queue, entry)
            for entry in queue.fresh:
                entry.row = 0
                entry.storing = False
            queue.fresh.extendleft(reversed(queue.loaded))
            queue.loaded.clear()
            queue.loaded_bytes = 0
            queue.cursor = queue.committed_row = queue.last_row
            queue.stored_messages = 0
            queue.stored_bytes = 0
            queue.delete_upto = 0
            queue.is_reading = False
        for entry in self._unconfirmed():
            if entry.row:
                self._unstore(self._queues[entry.kind], entry)
        self.dropped_messages += gone
        return gone

    @staticmethod
    def _unstore(queue: _Queue[T], entry: Entry[T]) -> None:
        if not entry.storing:
            queue.memory_messages += 1
            queue.memory_bytes += len(entry.payload)
        entry.row = 0
        entry.storing = False

    @property
    def mismatch(self) -> int:
        """How many messages the account lacks: what was accepted or found in the file is confirmed, held, dropped into
        the ledger, or was refused. Not 0: a message was lost without a word, or counted twice. A fault of ours."""
        has = self.accepted + self.restored + self.dropped_in_vain
        return has - self.confirmed - self.held_messages - self.dropped_messages - self.given_up

    # --- state ---------------------------------------------------------------------------------

    @property
    def unconfirmed(self) -> int:
        return sum([len(flight.unconfirmed) for flight in self._flights])

    @property
    def unconfirmed_bytes(self) -> int:
        return sum([flight.bytes for flight in self._flights])

    def unconfirmed_of(self, kind: Class) -> tuple[int, int]:
        """Messages and bytes under way that a barrier of `kind` settles: of both classes, unless they are apart."""
        flight = self._flight(kind)
        return len(flight.unconfirmed), flight.bytes

    @property
    def has_signals(self) -> bool:
        """Whether a signal could be written now."""
        return self._queues[Class.SIGNAL].has_work

    @property
    def has_data(self) -> bool:
        return self._queues[Class.DATA].has_work

    def waiting(self, kind: Class) -> int:
        """Not written: in memory and on disk."""
        queue = self._queues[kind]
        return len(queue.volatile) + len(queue.loaded) + len(queue.fresh) + queue.unloaded

    @property
    def stored_messages(self) -> int:
        return sum(queue.stored_messages for queue in self._queues)

    @property
    def stored_bytes(self) -> int:
        return sum(queue.stored_bytes for queue in self._queues)

    def stored_of(self, kind: Class) -> tuple[int, int]:
        """Messages and bytes of one class on disk."""
        return self._queues[kind].stored_messages, self._queues[kind].stored_bytes

    @property
    def memory_messages(self) -> int:
        """Held and not stored: a stop would lose them, but that they are not settled to their senders."""
        return sum(queue.memory_messages for queue in self._queues)

    @property
    def is_storing(self) -> bool:
        return any(queue.storing for queue in self._queues)

    @property
    def held_messages(self) -> int:
        return self.memory_messages + self.stored_messages

    @property
    def held_bytes(self) -> int:
        return sum(queue.memory_bytes + queue.stored_bytes for queue in self._queues)

    def entries(self) -> Iterator[Entry[T]]:
        """Everything in memory: the unconfirmed as written, then what waits."""
        yield from self._unconfirmed()
        for queue in self._queues:
            yield from queue.volatile
            yield from queue.loaded
            yield from queue.fresh
