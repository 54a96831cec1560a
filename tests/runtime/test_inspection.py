"""ADMIN: status, tap and presence, each bounded, whatever the reader does."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from runtime import emp
from runtime.inspection import LEASE_SECONDS, MAX_CREDIT, MAX_QUESTION_BYTES, MAX_STREAMS, PRESENCE_CREDIT, Inspection

PEER = (0, b"reader")
OTHER = (0, b"other")
MODULES = [{"name": "m", "state": "attached", "pid": 4, "incarnation": "ab", "declared": True, "queued": 0}]


def inspect() -> Inspection:
    return Inspection(lambda now: {"now": now, "modules": MODULES})


def ask(
    inspection: Inspection, op: str, body: Any = None, *, request: int = 1, now: float = 1.0, peer: Any = PEER
) -> list[tuple[emp.Admin, dict[str, Any]]]:
    packed = body if isinstance(body, bytes) or body is None else msgpack.packb(body)
    return [unpack(frames) for frames in inspection.ask(peer, emp.Admin(request, op), packed, now)]


def unpack(frames: list[bytes]) -> tuple[emp.Admin, dict[str, Any]]:
    verb, header, body = emp.decode(frames)
    assert verb == emp.ADMIN
    assert body is not None
    return header, msgpack.unpackb(body)


def batch(count: int = 1, destination: str = "x") -> emp.Send:
    return emp.Send(destination, 3, 1, count, 1)


def test_status_is_answered_once() -> None:
    ((header, document),) = ask(inspect(), "status", now=7.0)
    assert (header.request, header.op, header.more) == (1, "status", False)
    assert document == {"now": 7.0, "modules": MODULES}


@pytest.mark.parametrize(
    "body",
    [b"\xc1", b"\x93", msgpack.packb([1]), b"\x91" * 5000, b"\xdf\xff\xff\xff\xff", b"x" * (MAX_QUESTION_BYTES + 1)],
    ids=lambda body: body[:8].hex(),
)
def test_a_question_that_is_no_map_is_answered_with_an_error(body: bytes) -> None:
    ((_, document),) = ask(inspect(), "status", body)
    assert "expected a MessagePack map" in document["error"]


def test_an_unknown_op_is_answered_with_an_error() -> None:
    ((_, document),) = ask(inspect(), "shutdown")
    assert "unknown op 'shutdown'" in document["error"]


def test_a_tap_shows_what_its_filter_lets_through() -> None:
    inspection = inspect()
    ask(inspection, "tap", {"filter": {"sender": "s", "destination": "x"}})
    assert inspection.tap("other", batch(), b"body", 2.0) == []
    assert inspection.tap("s", batch(destination="y"), b"body", 2.0) == []
    ((peer, frames),) = inspection.tap("s", batch(2), b"body", 2.0)
    header, shown = unpack(frames)
    assert peer == PEER
    assert header.more
    assert (shown["sender"], shown["count"], shown["body"], shown["at_ms"]) == ("s", 2, b"body", 2000)


def test_a_tap_leaves_out_bodies_larger_than_it_wants() -> None:
    inspection = inspect()
    ask(inspection, "tap", {"content_bytes": 3})
    ((_, frames),) = inspection.tap("s", batch(), b"four", 2.0)
    shown = unpack(frames)[1]
    assert (shown["body"], shown["body_bytes"]) == (b"", 4)


def test_what_a_tap_has_no_credit_for_is_counted() -> None:
    inspection = inspect()
    ask(inspection, "tap", {"credit": 1})
    assert inspection.tap("s", batch(3), b"", 1.0)
    assert inspection.tap("s", batch(3), b"", 1.0) == []
    ask(inspection, "tap", {"credit": 5})
    ((_, frames),) = inspection.tap("s", batch(), b"", 1.0)
    assert unpack(frames)[1]["dropped"] == 3


@pytest.mark.parametrize("credit", [10**9, 2**70, -1, "much", None, 1.5])
def test_no_credit_is_larger_than_the_limit(credit: object) -> None:
    inspection = inspect()
    question = {"credit": credit} if not (isinstance(credit, int) and credit > 2**64) else {"credit": 2**64 - 1}
    ask(inspection, "tap", question)
    ((_, _, stream),) = inspection.taps
    assert 0 <= stream.credit <= MAX_CREDIT


def test_streams_are_bounded() -> None:
    inspection = inspect()
    for number in range(MAX_STREAMS):
        ask(inspection, "tap", request=number)
    ((_, document),) = ask(inspection, "tap", request=999)
    assert "the most allowed" in document["error"]
    assert len(inspection.taps) == MAX_STREAMS


def test_a_stream_that_is_not_renewed_ends_and_one_that_is_goes_on() -> None:
    inspection = inspect()
    ask(inspection, "tap", request=1, now=0.0)
    ask(inspection, "tap", request=2, now=0.0)
    assert ask(inspection, "tap", request=2, now=LEASE_SECONDS / 2) == []
    inspection.expire(LEASE_SECONDS + 1)
    assert [request for _, request, _ in inspection.taps] == [2]
    inspection.expire(LEASE_SECONDS * 2 + 1)
    assert inspection.taps == []


def test_streams_of_a_peer_that_is_gone_end() -> None:
    inspection = inspect()
    ask(inspection, "tap")
    ask(inspection, "tap", peer=OTHER)
    inspection.forget(PEER)
    assert [peer for peer, _, _ in inspection.taps] == [OTHER]


def test_presence_begins_with_who_is_there_and_tells_who_comes_and_goes() -> None:
    inspection = inspect()
    ((header, document),) = ask(inspection, "presence")
    assert header.more
    assert document["modules"] == [{key: value for key, value in MODULES[0].items() if key != "queued"}]
    ((peer, frames),) = inspection.presence("m", "gone", 4, 1.0)
    assert peer == PEER
    assert unpack(frames)[1] == {"name": "m", "event": "gone", "pid": 4, "dropped": 0}
    assert inspection.tap("s", batch(), b"", 1.0) == []


def test_presence_for_a_reader_that_stopped_is_bounded_and_counted() -> None:
    inspection = inspect()
    ask(inspection, "presence")
    shown = sum(len(inspection.presence("m", "back", 4, 1.0)) for _ in range(PRESENCE_CREDIT + 10))
    assert shown == PRESENCE_CREDIT
    assert ask(inspection, "presence") == []  # renewed
    ((_, frames),) = inspection.presence("m", "back", 4, 1.0)
    assert unpack(frames)[1]["dropped"] == 10
