"""What the broker shows: status, the tap, presence. A core: questions in, answers out.

Streams are leased: a client asks again within LEASE_SECONDS or is forgotten, and a tap gets no more
than the credit it gave. What does not fit is dropped and counted, so that a stopped reader costs the
broker nothing (docs/emp.md, ADMIN).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgpack

from runtime import emp
from runtime.routing_state import Peer

LEASE_SECONDS: Final = 10.0
MAX_STREAMS: Final = 32
MAX_CREDIT: Final = 10_000
MAX_QUESTION_BYTES: Final = 65536
PRESENCE_CREDIT: Final = 1000


class _Stream:
    __slots__ = ("content_bytes", "credit", "destination", "dropped", "op", "sender", "until")

    def __init__(self, op: str) -> None:
        self.op = op
        self.until = 0.0
        self.credit = 0
        self.dropped = 0
        self.sender = ""
        self.destination = ""
        self.content_bytes = 0


class Inspection:
    """Answers ADMIN frames. `statistics` gives the status document for a time."""

    def __init__(self, statistics: Callable[[float], dict[str, Any]]) -> None:
        self._statistics = statistics
        self._streams: dict[tuple[Peer, int], _Stream] = {}
        self.taps: list[tuple[Peer, int, _Stream]] = []
        "Empty whenever nobody taps: the hot path looks only at that."

    def ask(self, peer: Peer, header: emp.Admin, body: bytes | None, now: float) -> list[list[bytes]]:
        """The frames to answer `peer` with."""
        question = self._question(body)
        if question is None:
            return [_answer(header, {"error": "expected a MessagePack map of at most 64 KiB as body"})]
        if header.op == "status":
            return [_answer(header, self._statistics(now))]
        if header.op not in ("tap", "presence"):
            return [_answer(header, {"error": f"unknown op {header.op!r}: expected status, tap or presence"})]
        key = (peer, header.request)
        stream = self._streams.get(key)
        first = stream is None
        if stream is None:
            if len(self._streams) >= MAX_STREAMS:
                return [_answer(header, {"error": f"{MAX_STREAMS} streams are open, the most allowed"})]
            stream = self._streams[key] = _Stream(header.op)
        stream.until = now + LEASE_SECONDS
        if header.op == "presence":
            stream.credit = PRESENCE_CREDIT
            if not first:
                return []
            modules = [
                {name: module[name] for name in ("name", "state", "pid", "incarnation", "declared")}
                for module in self._statistics(now)["modules"]
            ]
            return [_answer(header, {"modules": modules}, more=True)]
        filter_ = question.get("filter")
        filter_ = filter_ if isinstance(filter_, dict) else {}
        stream.sender = str(filter_.get("sender") or "")
        stream.destination = str(filter_.get("destination") or "")
        stream.credit = min(MAX_CREDIT, _natural(question.get("credit"), 1000))
        stream.content_bytes = _natural(question.get("content_bytes"), 65536)
        if first:
            self._rebuild()
            return [_answer(header, {"tapping": True}, more=True)]
        return []

    def tap(self, sender: str, header: emp.Send, body: bytes, now: float) -> list[Any]:
        """What to show of a batch that was taken, as (peer, frames)."""
        out: list[Any] = []
        for peer, request, stream in self.taps:
            if (stream.sender and stream.sender != sender) or (
                stream.destination and stream.destination != header.destination
            ):
                continue
            if stream.credit <= 0:
                stream.dropped += header.count
                continue
            stream.credit -= 1
            shown = {
                "dropped": stream.dropped,
                "at_ms": int(now * 1000),
                "sender": sender,
                "destination": header.destination,
                "priority": header.priority,
                "first": header.first,
                "count": header.count,
                "flags": header.flags,
                "body": bytes(body) if len(body) <= stream.content_bytes else b"",
                "body_bytes": len(body),
            }
            out.append((peer, _answer(emp.Admin(request, "tap"), shown, more=True)))
        return out

    def presence(self, name: str, event: str, pid: int, now: float) -> list[Any]:
        """Tell those who listen that `name` is attached, back, silent, gone or fenced, as (peer, frames)."""
        out: list[Any] = []
        for (peer, request), stream in self._streams.items():
            if stream.op != "presence":
                continue
            if stream.credit <= 0:
                stream.dropped += 1
                continue
            stream.credit -= 1
            shown = {"name": name, "event": event, "pid": pid, "dropped": stream.dropped}
            out.append((peer, _answer(emp.Admin(request, "presence"), shown, more=True)))
        return out

    def expire(self, now: float) -> None:
        """Forget streams whose lease has run out."""
        ended = [key for key, stream in self._streams.items() if stream.until < now]
        for key in ended:
            del self._streams[key]
        if ended:
            self._rebuild()

    def forget(self, peer: Peer) -> None:
        """`peer` is gone."""
        ended = [key for key in self._streams if key[0] == peer]
        for key in ended:
            del self._streams[key]
        if ended:
            self._rebuild()

    def forget_all(self) -> None:
        """Who may ask has changed: whoever still may asks again within the lease."""
        self._streams.clear()
        self._rebuild()

    def _rebuild(self) -> None:
        self.taps = [(key[0], key[1], stream) for key, stream in self._streams.items() if stream.op == "tap"]

    @staticmethod
    def _question(body: bytes | None) -> dict[str, Any] | None:
        if not body:
            return {}
        if len(body) > MAX_QUESTION_BYTES:
            return None
        try:
            question = msgpack.unpackb(body, strict_map_key=False)
        except (ValueError, msgpack.exceptions.UnpackException, RecursionError):
            return None
        return question if isinstance(question, dict) else None


def _natural(value: object, default: int) -> int:
    return value if isinstance(value, int) and value >= 0 else default


def _answer(header: emp.Admin, document: dict[str, Any], *, more: bool = False) -> list[bytes]:
    packed: bytes = msgpack.packb(document)
    return emp.encode(emp.ADMIN, emp.Admin(header.request, header.op, more), packed)
