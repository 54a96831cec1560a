"""What came up, in order, for tests, benchmarks and the event stream. Bounded; the oldest goes first."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import msgspec

from cloudsim.rules import UNPREFIXED_MODULE
from cloudsim.wire import (
    JSON_CODEC,
    CloudMessage,
    Codec,
    Header,
    Route,
    content_data,
    encode,
    seen_in_cloud,
    to_json_object,
)


class Received(msgspec.Struct, frozen=True, gc=False):
    """A message that the hub handed to a cloud module. What is not a field is decoded at each use."""

    seq: int
    at: float
    "Unix time in seconds."
    node: str
    module: str
    id: str
    payload: bytes
    "As it came from the node."
    from_hub: bool = False
    "Made by the hub itself: a node's coming or going."
    codec: Codec = JSON_CODEC
    "Reads the payload."

    @property
    def message(self) -> CloudMessage:
        """As the cloud module sees it: resource with node/<id>/, numbers as float64 has them."""
        message = self.codec.decode(self.payload)
        message.content = seen_in_cloud(message.content)
        if self.module != UNPREFIXED_MODULE and not self.from_hub:
            message.route.resource = f"node/{self.node}/{message.route.resource}"
        return message

    @property
    def header(self) -> Header:
        return self.codec.decode(self.payload).header

    @property
    def route(self) -> Route:
        """As the cloud module sees it."""
        return self.message.route

    @property
    def resource(self) -> str:
        """As the node sent it, without the prefix."""
        return self.codec.decode(self.payload).route.resource

    @property
    def content(self) -> Any:
        """The JSON value, or over QUIC bytes whatever was sent."""
        return self.message.content

    @property
    def data(self) -> bytes:
        """Content as an application behind the cloud module gets it, the same for each transport."""
        return content_data(self.codec.decode(self.payload).content)

    def line(self) -> bytes:
        message = self.message
        facts = {"seq": self.seq, "at": self.at, "event": "message", "node": self.node, "to": self.module}
        if self.codec is not JSON_CODEC:
            # Bytes are base64 in the message; a reader of events wants to see what they say.
            facts["transport"] = self.codec.transport
            facts["text"] = content_data(message.content).decode("utf-8", "replace")
        return _line(facts | {"message": to_json_object(message)})


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
        self.distinct = 0
        self.repeated = 0
        self.forgotten_ids = 0
        self.by_module: Counter[str] = Counter()
        self.by_node: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()

    def message(
        self,
        node: str,
        module: str,
        message: CloudMessage,
        payload: bytes,
        at: float,
        codec: Codec = JSON_CODEC,
    ) -> None:
        """A message of a node was handed to `module`. Called for each: the upload path."""
        message_id = message.header.msg_id
        ids = self._ids
        times = ids.get(message_id, 0)
        ids[message_id] = times + 1
        if times:
            self.repeated += 1
        else:
            self.distinct += 1
            if len(ids) > self._max_ids:
                del ids[next(iter(ids))]
                self.forgotten_ids += 1
        self._append(Received(self.last_seq + 1, at, node, module, message_id, payload, False, codec), len(payload))
        self.by_module[module] += 1
        self.by_node[node] += 1

    def from_hub(self, node: str, module: str, message: CloudMessage, at: float) -> None:
        """A message that the hub made itself was handed to `module`."""
        payload = encode(message)
        event = Received(self.last_seq + 1, at, node, module, message.header.msg_id, payload, True)
        self._append(event, len(payload))
        self.by_module[module] += 1

    def happen(self, node: str, what: str, facts: dict[str, Any], at: float) -> None:
        self._append(Happened(self.last_seq + 1, at, node, what, facts), 0)
        self.happened[what] += 1

    def _append(self, event: Event, size: int) -> None:
        self.last_seq += 1
        events = self._events
        events.append(event)
        self._held_bytes += size
        if len(events) > self._max_events or self._held_bytes > self._max_bytes:
            while len(events) > self._max_events or (self._held_bytes > self._max_bytes and len(events) > 1):
                oldest = events.popleft()
                self.dropped += 1
                if type(oldest) is Received:
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
        self.dropped = self.distinct = self.repeated = self.forgotten_ids = 0
        for counter in (self.by_module, self.by_node, self.happened):
            counter.clear()

    def counts(self) -> dict[str, Any]:
        return {
            "messages": self.distinct + self.repeated,
            "distinct": self.distinct,
            "repeated": self.repeated,
            "forgotten_ids": self.forgotten_ids,
            "by_module": dict(self.by_module),
            "by_node": dict(self.by_node),
            "happened": dict(self.happened),
            "last_seq": self.last_seq,
            "dropped_events": self.dropped,
        }
