"""The two queues of a node's session: what waits for acknowledgements, and what does not.

No I/O, time is an argument. Rules: docs/cloudlink.md, Delivery to the node.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from cloudsim.rules import is_delete, object_key, version_number
from cloudsim.wire import JSON_CODEC, CloudMessage, Codec

RETRY_SECONDS: Final = 5.0
"Between two tries of the object in flight."
MAX_TRIES: Final = 5
"At 0, 5, 10, 15 and 20 s; at 25 s the object is given up for now."
REQUEUE_BASE_SECONDS: Final = 0.005
REQUEUE_MAX_SECONDS: Final = 1000.0
"A given-up object comes back after 5 ms, doubled with each failure (client-go's rate limiter)."


@dataclass(frozen=True, slots=True)
class Queued:
    """A downstream message as it will go out, every time with the same bytes."""

    key: str
    message: CloudMessage
    payload: bytes


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The object in flight was not acknowledged within 25 s and goes to the end of the queue."""

    item: Queued
    failures: int


@dataclass(slots=True)
class _InFlight:
    item: Queued
    tries: int
    due: float


class AckQueue:
    """Objects that need an acknowledgement: one in flight, the newest version of each.

    Bounded by `max_items` objects; `offer` says no to the one too many.
    """

    def __init__(self, max_items: int, codec: Codec = JSON_CODEC) -> None:
        self._max_items = max_items
        self._encode = codec.encode
        self._store: dict[str, Queued] = {}
        self._order: deque[str] = deque()
        self._waiting: dict[str, float] = {}  # given up: back in the order at that time
        self._failures: dict[str, int] = {}
        self._in_flight: _InFlight | None = None

    def __len__(self) -> int:
        return len(self._store)

    @property
    def in_flight(self) -> Queued | None:
        return self._in_flight.item if self._in_flight else None

    def offer(self, message: CloudMessage, acknowledged_version: int | None) -> str | None:
        """Take a message; returns why it was dropped, or None.

        `acknowledged_version` is what the hub remembers of the object (ObjectSync). Deletes and
        answers to the node's own queries always pass; else only a version newer than both the
        queued and the acknowledged one.
        """
        key = object_key(message)
        held = self._store.get(key)
        if message.route.operation != "response" and not is_delete(message):
            version = version_number(message.header.resourceversion)
            if held is not None:
                if is_delete(held.message) or version <= version_number(held.message.header.resourceversion):
                    return "the queue holds the same or a newer version, or a delete"
            elif acknowledged_version is not None and version <= acknowledged_version:
                return f"version {acknowledged_version} is acknowledged already"
        payload = self._encode(message)
        if held is None:
            if len(self._store) >= self._max_items:
                return f"the queue is full ({self._max_items} objects)"
            self._order.append(key)
        self._store[key] = Queued(key, message, payload)
        return None

    def acknowledge(self, message_id: str) -> Queued | None:
        """The object in flight that this id belongs to, now out of the way; None for any other id."""
        flight = self._in_flight
        if flight is None or flight.item.message.header.msg_id != message_id:
            return None
        key = flight.item.key
        self._in_flight = None
        self._failures.pop(key, None)
        if self._store[key] is flight.item:
            del self._store[key]
        else:
            self._order.append(key)  # a newer version came while it was in flight
        return flight.item

    def advance(self, now: float) -> tuple[list[bytes], list[GaveUp]]:
        """What to write now, and which objects were given up. Call it after each change and when due."""
        writes: list[bytes] = []
        given_up: list[GaveUp] = []
        flight = self._in_flight
        if flight is not None and flight.due <= now:
            if flight.tries < MAX_TRIES:
                flight.tries += 1
                flight.due += RETRY_SECONDS
                writes.append(flight.item.payload)
            else:
                key = flight.item.key
                failures = self._failures[key] = self._failures.get(key, 0) + 1
                self._waiting[key] = now + min(REQUEUE_BASE_SECONDS * 2 ** (failures - 1), REQUEUE_MAX_SECONDS)
                given_up.append(GaveUp(flight.item, failures))
                self._in_flight = None
        for key, back in sorted(self._waiting.items(), key=lambda entry: entry[1]):
            if back <= now:
                del self._waiting[key]
                self._order.append(key)
        if self._in_flight is None and self._order:
            item = self._store[self._order.popleft()]
            self._in_flight = _InFlight(item, 1, now + RETRY_SECONDS)
            writes.append(item.payload)
        return writes, given_up

    def next_deadline(self) -> float | None:
        """When `advance` has to be called again, or None: not before a change."""
        if self._in_flight is not None:
            return self._in_flight.due  # what waits cannot start before that anyway
        return min(self._waiting.values(), default=None)


class PlainQueue:
    """Messages without acknowledgement: written once, in order, as soon as the socket takes them.

    Bounded by `max_bytes` of payload; `offer` says no to the one too many.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._items: deque[bytes] = deque()
        self._held_bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    def offer(self, payload: bytes) -> str | None:
        if self._items and self._held_bytes + len(payload) > self._max_bytes:
            return f"the queue is full ({self._max_bytes} bytes); the node does not read"
        self._items.append(payload)
        self._held_bytes += len(payload)
        return None

    def take(self) -> list[bytes]:
        """All there is, to be written now."""
        items = list(self._items)
        self._items.clear()
        self._held_bytes = 0
        return items
