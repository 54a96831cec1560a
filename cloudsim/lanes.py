"""The streams of one QUIC connection as viaduct uses them, seen from the hub. No I/O.

The first stream that the edge opens is the control stream. Every other one starts with its opener's use type
(docs/cloudlink.md, QUIC). What happens in which order, and what a bad stream leads to, follows viaduct:
streams are accepted one after another by number, and each waits for the use type of the one before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from runtime.viaduct import HEADER_BYTES, MESSAGES, USE_TYPE_BYTES, PackageReader, ViaductFault

CONTROL_STREAM: Final = 0
"The number of the first stream a client opens for both directions."
FREED: Final = 1
"Error code with which viaduct gives a stream up (comm.StatusCodeFreeStream)."
MAX_STREAMS: Final = 99
"Streams of one connection that a sender counts, its own and the peer's, before it waits for an idle one."


@dataclass(frozen=True, slots=True)
class Control:
    """A package on the control stream."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Package:
    """A package on a message stream."""

    stream: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class ControlEnded:
    """Nothing more is read from the control stream."""

    reason: str


@dataclass(frozen=True, slots=True)
class Freed:
    """A message stream is given up in both directions; the connection goes on."""

    stream: int
    reason: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The connection must end."""

    reason: str


LaneEvent = Control | Package | ControlEnded | Freed | Broken


@dataclass(slots=True)
class _Lane:
    """A stream that is read, or that waits to be."""

    reader: PackageReader | None = None
    "None: not accepted yet, or of a use that nobody reads."
    waiting: bytearray = field(default_factory=bytearray)
    "What came before it was accepted."
    is_ignored: bool = False
    ended: bool = False
    taken: int = 0
    "Bytes that have been read, for flow control: what is not read must not make room for more."
    held: int = 0
    "Bytes of a package that is not whole yet."


class Lanes:
    """Sorts the bytes of a connection's streams into packages, and picks the stream for what goes down.

    Incomplete packages of all streams together hold at most `max_held_bytes`; what would exceed it yields Broken.
    Bytes that nobody reads (a stream not accepted yet, a raw one) are bounded by the connection's flow control, for
    they never count as taken.
    """

    def __init__(self, chance: random.Random, max_held_bytes: int) -> None:
        self._chance = chance
        self._max_held_bytes = max_held_bytes
        self._lanes: dict[int, _Lane] = {CONTROL_STREAM: _Lane(PackageReader())}
        self._next = CONTROL_STREAM + 4
        self._streams: set[int] = set()  # accepted or opened, of any known use
        self._messages: set[int] = set()
        self._is_serving = False
        self._held = 0
        self.taken = 0

    def taken_from(self, stream: int) -> int:
        """Bytes read from a stream so far."""
        lane = self._lanes.get(stream)
        return lane.taken if lane else 0

    def serve(self) -> Iterator[LaneEvent]:
        """The headers have come: from now on streams are accepted."""
        self._is_serving = True
        yield from self._accept()

    def receive(self, stream: int, data: bytes, ended: bool) -> Iterator[LaneEvent]:
        """Bytes of a stream, in order. Nothing may be received after Broken."""
        if stream & 2:
            return  # one-directional: viaduct never accepts them
        lane = self._lanes.get(stream)
        if lane is None:
            if stream & 1 or stream < self._next:
                self.taken += len(data)  # given up earlier
                return
            lane = self._lanes[stream] = _Lane()
        lane.ended = lane.ended or ended
        if lane.reader is not None:
            yield from self._read(stream, lane, data)
        elif not lane.is_ignored:
            lane.waiting += data
            yield from self._accept()

    def _accept(self) -> Iterator[LaneEvent]:
        while self._is_serving:
            stream = self._next
            lane = self._lanes.get(stream)
            if lane is None:
                return
            if len(lane.waiting) < USE_TYPE_BYTES:
                if lane.ended:
                    yield Broken(f"stream {stream} ended before its use type")
                return
            self._next += 4
            use = bytes(lane.waiting[:USE_TYPE_BYTES])
            self._take(lane, USE_TYPE_BYTES)
            self._streams.add(stream)
            data, lane.waiting = bytes(lane.waiting[USE_TYPE_BYTES:]), bytearray()
            if use != MESSAGES:
                lane.is_ignored = True  # raw bytes have no consumer in CloudHub, any other use is unknown to it
                continue
            self._messages.add(stream)
            lane.reader = PackageReader()
            yield from self._read(stream, lane, data)

    def _read(self, stream: int, lane: _Lane, data: bytes) -> Iterator[LaneEvent]:
        assert lane.reader is not None
        fault = ""
        self._take(lane, len(data))
        try:
            found = lane.reader.receive(data)
        except ViaductFault as broken:
            found, fault = broken.packages, str(broken)
        used = sum(HEADER_BYTES + len(payload) for payload in found if isinstance(payload, bytes))
        lane.held += len(data) - used
        self._held += len(data) - used
        if self._held > self._max_held_bytes:
            yield Broken(f"incomplete packages of more than {self._max_held_bytes} bytes")
            return
        for payload in found:
            if stream not in self._lanes:
                return  # given up over what the last package held
            if isinstance(payload, bytes):
                yield Control(payload) if stream == CONTROL_STREAM else Package(stream, payload)
        if not fault and lane.ended and stream in self._lanes:
            fault = "the node ended the stream" if lane.reader.is_between_packages else "unexpected EOF"
        if fault:
            yield self.free(stream, fault)

    def _take(self, lane: _Lane, count: int) -> None:
        lane.taken += count
        self.taken += count

    # --- what goes down ----------------------------------------------------------------------------

    def pick(self) -> int | None:
        """A stream for the next message: any message stream, whoever opened it. None: open one.

        The hub writes one message at a time, so each of them is idle.
        """
        if not self._messages:
            return None
        return self._chance.choice(self.messages)

    @property
    def messages(self) -> list[int]:
        """The message streams, whoever opened them."""
        return sorted(self._messages)

    @property
    def may_open(self) -> bool:
        return len(self._streams) < MAX_STREAMS

    def opened(self, stream: int) -> None:
        """The hub has opened a message stream."""
        self._lanes[stream] = _Lane(PackageReader())
        self._streams.add(stream)
        self._messages.add(stream)

    def free(self, stream: int, reason: str) -> LaneEvent:
        """Give a stream up: it is neither read nor written any more."""
        lane = self._lanes.pop(stream, None)
        if lane is not None:
            self._held -= lane.held
        if stream == CONTROL_STREAM:
            return ControlEnded(reason)
        self._streams.discard(stream)
        self._messages.discard(stream)
        return Freed(stream, reason)
