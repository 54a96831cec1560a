"""What came up, in order, for tests, benchmarks and the event stream. Bounded; the oldest goes first."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import msgspec

from cloudsim.wire import CloudMessage, Header, Route, decode, encode, seen_in_cloud


class Received(msgspec.Struct, frozen=True, gc=False):
    """A message that the hub handed to a cloud module."""

    seq: int
    at: float
    "Unix time in seconds."
    node: str
    module: str
    header: Header
    route: Route
    "The resource is prefixed with node/<id>/ as the module sees it."
    payload: bytes
    "As it came from the node."

    @property
    def id(self) -> str:
        return self.header.msg_id

    @property
    def resource(self) -> str:
        """As the node sent it, without the prefix."""
        return self.route.resource.removeprefix(f"node/{self.node}/")

    @property
    def content(self) -> Any:
        """Decoded anew at each call, with the numbers a cloud module would see."""
        return seen_in_cloud(decode(self.payload).content)

    def line(self) -> bytes:
        message = msgspec.to_builtins(CloudMessage(self.header, self.route))
        message["content"] = self.content
        return _line(
            {
                "seq": self.seq,
                "at": self.at,
                "event": "message",
                "node": self.node,
                "to": self.module,
                "message": message,
            }
        )


class Happened(msgspec.Struct, frozen=True, gc=False):
    """Something else: connected, disconnected, rejected, acknowledged, gave-up, dropped, …"""

    seq: int
    at: float
    node: str
    what: str
    facts: dict[str, Any]

    def line(self) -> bytes:
        return _line({"seq": self.seq, "at": self.at, "event": self.what, "node": self.node, **self.facts})


Event = Received | Happened


def _line(value: dict[str, Any]) -> bytes:
    return msgspec.json.encode(value) + b"\n"


class Recorder:
    """Events with sequence numbers from 1, message ids, and counts.

    Holds at most `max_events` events and `max_bytes` of payload; the oldest are let go and counted in
    `dropped`. Ids are remembered for the last `max_ids` distinct messages.
    """

    def __init__(self, max_events: int, max_bytes: int, max_ids: int) -> None:
        self._events: deque[Event] = deque()
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._max_ids = max_ids
        self._held_bytes = 0
        self._ids: dict[str, int] = {}
        self.last_seq = 0
        self.dropped = 0
        self.messages = 0
        self.distinct = 0
        self.repeated = 0
        self.forgotten_ids = 0
        self.by_module: Counter[str] = Counter()
        self.by_node: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()

    def message(self, node: str, module: str, message: CloudMessage, payload: bytes | None, at: float) -> None:
        """A message was handed to `module`. `payload` None: the hub made it itself."""
        if payload is None:
            payload = encode(message)
        self.last_seq += 1
        self._events.append(Received(self.last_seq, at, node, module, message.header, message.route, payload))
        self._held_bytes += len(payload)
        self.messages += 1
        self.by_module[module] += 1
        self.by_node[node] += 1
        ids = self._ids
        message_id = message.header.msg_id
        if message_id in ids:
            ids[message_id] += 1
            self.repeated += 1
        else:
            ids[message_id] = 1
            self.distinct += 1
            if len(ids) > self._max_ids:
                del ids[next(iter(ids))]
                self.forgotten_ids += 1
        if len(self._events) > self._max_events or self._held_bytes > self._max_bytes:
            self._let_go()

    def happen(self, node: str, what: str, facts: dict[str, Any], at: float) -> None:
        self.last_seq += 1
        self._events.append(Happened(self.last_seq, at, node, what, facts))
        self.happened[what] += 1
        if len(self._events) > self._max_events:
            self._let_go()

    def _let_go(self) -> None:
        while len(self._events) > self._max_events or (self._held_bytes > self._max_bytes and self._events):
            oldest = self._events.popleft()
            self.dropped += 1
            if isinstance(oldest, Received):
                self._held_bytes -= len(oldest.payload)

    def since(self, seq: int) -> tuple[int, list[Event]]:
        """The events after `seq` that are still held, and how many of them are gone."""
        first = self.last_seq - len(self._events) + 1
        skip = max(seq + 1 - first, 0)
        return max(first - seq - 1, 0), list(islice(self._events, skip, None))

    def received(self, *, module: str | None = None, node: str | None = None) -> Iterator[Received]:
        """The held messages, oldest first."""
        for event in list(self._events):
            if (
                isinstance(event, Received)
                and (module is None or event.module == module)
                and (node is None or event.node == node)
            ):
                yield event

    def ids(self) -> dict[str, int]:
        """How often each remembered id came."""
        return dict(self._ids)

    def clear(self) -> None:
        """Forget events, ids and counts; sequence numbers go on."""
        self._events.clear()
        self._ids.clear()
        self._held_bytes = 0
        self.dropped = self.messages = self.distinct = self.repeated = self.forgotten_ids = 0
        for counter in (self.by_module, self.by_node, self.happened):
            counter.clear()

    def counts(self) -> dict[str, Any]:
        return {
            "messages": self.messages,
            "distinct": self.distinct,
            "repeated": self.repeated,
            "forgotten_ids": self.forgotten_ids,
            "by_module": dict(self.by_module),
            "by_node": dict(self.by_node),
            "happened": dict(self.happened),
            "last_seq": self.last_seq,
            "dropped_events": self.dropped,
        }
