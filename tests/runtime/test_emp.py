"""Frames: round trips, limits, and decoders that stay total whatever comes."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import emp
from runtime.access import Credentials
from runtime.errors import MalformedFrame
from tests.support.bus_pair import BrokerRoom, RawBroker, make_body

ID = b"i" * emp.INCARNATION_BYTES
EPOCH = b"e" * emp.EPOCH_BYTES

SAMPLES: list[tuple[bytes, Any, bytes | None]] = [
    (emp.HELLO, emp.Hello("edgehub", ["hub"], ID, 0, 15000, "sdk/1"), None),
    (emp.HELLO, emp.Hello("a", [], ID, 2**62, 100, "", 1, 1, 77), None),
    (emp.WELCOME, emp.Welcome(EPOCH, 1 << 24, 9, 5000, True), None),
    (emp.REFUSED, emp.Refused(emp.NAME_TAKEN, "held by pid 1"), None),
    (emp.SEND, emp.Send("@hub", 3, 1, 1, 1), b"\x90"),
    (emp.SEND, emp.Send("edgehub", 0, 7, 3, 5, emp.REPLY, 0, ID), b"\x90"),
    (emp.SEND, emp.Send("@hub", 2, 7, 1, 7, emp.RETAIN, None, None, "node/connection", 4), b"\x90"),
    (
        emp.DELIVER,
        emp.Deliver(1, 2, "s", ID, 3, "@hub", 3, 5, 4, 6, 2, [(3, "denied")], 16, 900, ID, "k", (3, 4)),
        b"",
    ),
    (emp.ACK, emp.Ack(5, [(1, 4, [(2, "failed"), (3, "my-own-reason")]), (2, 9, [])]), None),
    (emp.SETTLED, emp.Settled("@hub", 3, 9, [(4, "gone", "edgehub"), (5, "denied", None)], [(1, 2, ["m"])]), None),
    (emp.PING, emp.Ping(4, {"uploads": 3}, [("@hub", 3, 8)]), None),
    (emp.PONG, emp.Pong(4), None),
    (emp.WHO, emp.Who(EPOCH), None),
    (emp.FENCED, emp.Fenced(12), None),
    (emp.DRAIN, emp.Drain(8000), None),
    (emp.BYE, emp.Bye(False), None),
    (emp.ADMIN, emp.Admin(1, "status"), None),
    (emp.ADMIN, emp.Admin(1, "tap", True), b"\x80"),
]

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=40)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=70),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text("ab", max_size=3), inner, max_size=3),
    max_leaves=20,
)
verbs = st.sampled_from(sorted(emp.VERBS))


@pytest.mark.parametrize(("verb", "header", "body"), SAMPLES, ids=lambda value: str(value)[:24])
def test_what_is_encoded_decodes_to_the_same(verb: bytes, header: Any, body: bytes | None) -> None:
    assert emp.decode(emp.encode(verb, header, body)) == (verb, header, body)


def test_every_verb_has_a_sample() -> None:
    assert {verb for verb, _, _ in SAMPLES} == emp.VERBS


@pytest.mark.parametrize(("verb", "header", "body"), SAMPLES, ids=lambda value: str(value)[:24])
def test_trailing_fields_of_a_later_version_are_taken(verb: bytes, header: Any, body: bytes | None) -> None:
    frames = emp.encode(verb, header, body)
    fields = msgpack.unpackb(frames[1], strict_map_key=False, use_list=True)
    frames[1] = msgpack.packb([*fields, "of a later version", {"x": 1}])
    decoded = emp.decode(frames)[1]
    assert msgpack.packb(fields) == msgpack.packb(
        msgpack.unpackb(emp.encode(verb, decoded, body)[1], strict_map_key=False)
    )


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([], emp.BAD_HEADER),
        ([emp.PING], emp.BAD_HEADER),
        ([emp.PING, b"\x91\x01", b"", b""], emp.BAD_HEADER),
        ([emp.PING, b"\x91\x01", b"a body"], emp.BAD_HEADER),
        ([emp.SEND, b"\x90"], emp.BAD_HEADER),
        ([b"", b""], emp.UNKNOWN_VERB),
        ([b"SHOUT/1", b"\x90"], emp.UNKNOWN_VERB),
        ([b"\xff" * 1000, b"\x90"], emp.UNKNOWN_VERB),
        ([b"HELLO/2", b"\x90"], emp.BAD_VERSION),
        ([b"HELLO", b"\x90"], emp.BAD_VERSION),
        ([emp.PING, b""], emp.BAD_HEADER),
        ([emp.PING, b"\x90"], emp.BAD_HEADER),
        ([emp.PING, b"\x80"], emp.BAD_HEADER),
        ([emp.PING, b"\x91\xc0"], emp.BAD_HEADER),
        ([emp.PING, b"\x91\x01 and more"], emp.BAD_HEADER),
        ([emp.PONG, b"\xdd\xff\xff\xff\xff\x01"], emp.BAD_HEADER),
        ([emp.WHO, b"\x91\xc6\xff\xff\xff\xff"], emp.BAD_HEADER),
        ([emp.PING, b"\x91" * 100_000], emp.BAD_HEADER),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_frames_that_are_no_emp_are_refused_with_a_code(frames: list[bytes], code: str) -> None:
    with pytest.raises(MalformedFrame) as refused:
        emp.decode(frames)
    assert refused.value.code == code
    assert refused.value.text
    assert len(refused.value.text) < 2000


@pytest.mark.parametrize(
    ("verb", "fields"),
    [
        (emp.HELLO, ["-a", [], ID, 0, 15000, ""]),
        (emp.HELLO, ["a\n", [], ID, 0, 15000, ""]),
        (emp.HELLO, ["a" * 65, [], ID, 0, 15000, ""]),
        (emp.HELLO, ["a", ["@g"], ID, 0, 15000, ""]),
        (emp.HELLO, ["a", ["g"] * 65, ID, 0, 15000, ""]),
        (emp.HELLO, ["a", [], ID[:-1], 0, 15000, ""]),
        (emp.HELLO, ["a", [], ID, -1, 15000, ""]),
        (emp.HELLO, ["a", [], ID, 0, 99, ""]),
        (emp.HELLO, ["a", [], ID, 0, 15000, "s" * 65]),
        (emp.HELLO, ["a", [], ID, 0, 15000, "", 0]),
        (emp.SEND, ["", 3, 1, 1, 1]),
        (emp.SEND, ["@", 3, 1, 1, 1]),
        (emp.SEND, ["@@g", 3, 1, 1, 1]),
        (emp.SEND, ["x\n", 3, 1, 1, 1]),
        (emp.SEND, ["x", 4, 1, 1, 1]),
        (emp.SEND, ["x", -1, 1, 1, 1]),
        (emp.SEND, ["x", 3, 0, 1, 1]),
        (emp.SEND, ["x", 3, 1, 0, 1]),
        (emp.SEND, ["x", 3, 1, emp.MAX_BATCH_MESSAGES + 1, 1]),
        (emp.SEND, ["x", 3, 1, 1, 0]),
        (emp.SEND, ["x", 3, 2**63, 1, 1]),
        (emp.SEND, ["x", 3, 2**62 + 1, 1, 1]),
        (emp.SEND, ["x", 3, 1, 1, 2**62 + 1]),
        (emp.SEND, ["x", 3, 1.0, 1, 1]),
        (emp.SEND, ["x", True, 1, 1, 1]),
        (emp.SEND, ["x", 3, 1, 1, 1, 0, -1]),
        (emp.SEND, ["x", 3, 1, 1, 1, 0, None, b"short"]),
        (emp.SEND, ["x", 3, 1, 1, 1, 8, None, None, "k" * 257]),
        (emp.ACK, [1, [[1, 2]]]),
        (emp.ACK, [1, [[1, 2, [[0, "failed"]]]]]),
        (emp.ACK, [1, [[1, 2, [[2, ""]]]]]),
        (emp.ACK, [1, [[1, 2, [[2, "r" * 65]]]]]),
        (emp.PING, [1, {"a": "text"}]),
        (emp.PING, [1, {str(n): n for n in range(257)}]),
        (emp.ADMIN, [1, "o" * 33]),
    ],
    ids=lambda value: str(value)[:50],
)
def test_fields_out_of_range_are_refused(verb: bytes, fields: list[Any]) -> None:
    body = [b"\x90"] if verb == emp.SEND else []
    with pytest.raises(MalformedFrame) as refused:
        emp.decode([verb, msgpack.packb(fields), *body])
    assert refused.value.code == emp.BAD_HEADER


def test_a_header_larger_than_the_limit_is_refused_undecoded() -> None:
    packed = msgpack.packb([1, {}, [["@g", 3, 1]] * 60_000])
    assert len(packed) > emp.MAX_HEADER_BYTES
    with pytest.raises(MalformedFrame, match="the limit is"):
        emp.decode([emp.PING, packed])


@given(st.lists(st.binary(max_size=200), max_size=5))
@settings(max_examples=150, deadline=None)
def test_random_frames_decode_or_are_refused(frames: list[bytes]) -> None:
    _decode_or_refuse(frames)


@given(verbs, st.binary(max_size=300), st.none() | st.binary(max_size=20))
@settings(max_examples=200, deadline=None)
def test_random_headers_decode_or_are_refused(verb: bytes, header: bytes, body: bytes | None) -> None:
    _decode_or_refuse([verb, header] if body is None else [verb, header, body])


@given(verbs, st.lists(anything, max_size=18), st.none() | st.binary(max_size=20))
@settings(max_examples=250, deadline=None)
def test_well_formed_headers_of_any_types_decode_or_are_refused(
    verb: bytes, fields: list[Any], body: bytes | None
) -> None:
    packed = msgpack.packb(fields)
    _decode_or_refuse([verb, packed] if body is None else [verb, packed, body])


@given(st.sampled_from(SAMPLES), st.data())
@settings(max_examples=200, deadline=None)
def test_mutated_frames_decode_or_are_refused(sample: tuple[bytes, Any, bytes | None], data: st.DataObject) -> None:
    frames = emp.encode(*sample)
    header = bytearray(frames[1])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(header) - 1))
        header[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(header)))
    _decode_or_refuse([frames[0], bytes(header), *frames[2:]])
    _decode_or_refuse([frames[0], bytes(header[:cut]), *frames[2:]])


def _decode_or_refuse(frames: list[bytes]) -> None:
    try:
        verb, header, body = emp.decode(frames)
    except MalformedFrame:
        return  # the documented refusal; anything else climbs
    assert emp.decode(emp.encode(verb, header, body)) == (verb, header, body)


HOSTILE = [
    b"\xdd\xff\xff\xff\xff",
    b"\x91\xdd\xff\xff\xff\xff",
    b"\x92\x01\xdf\xff\xff\xff\xff",
    b"\x92\x01\xdd\x7f\xff\xff\xff\x93\x01\x02\xdd\x7f\xff\xff\xff",
    b"\x91\xdb\xff\xff\xff\xff",
    b"\x91\xc6\xff\xff\xff\xff",
    b"\x91\xc9\xff\xff\xff\xff\x01",
    b"\x91" * 200_000,
    b"\xdc\xff\xff" * 1000,
    b"\x81" * 200_000,
]


@pytest.mark.parametrize("header", HOSTILE, ids=lambda value: value[:12].hex())
@pytest.mark.parametrize("verb", sorted(emp.VERBS))
def test_claimed_lengths_allocate_nothing(verb: bytes, header: bytes) -> None:
    body = [b""] if verb in (emp.SEND, emp.DELIVER) else []
    tracemalloc.start()
    try:
        with pytest.raises(MalformedFrame):
            emp.decode([verb, header, *body])
        assert tracemalloc.get_traced_memory()[1] < 4 * len(header) + 1_000_000
    finally:
        tracemalloc.stop()


@given(st.sampled_from(SAMPLES), st.lists(anything, max_size=18))
@settings(max_examples=150, deadline=None)
def test_the_brokers_core_survives_every_frame(sample: tuple[bytes, Any, bytes | None], fields: list[Any]) -> None:
    """Attached peers and strangers send what they like: the broker answers and serves the others on."""
    room = BrokerRoom()
    witness, receiver = room.peer("witness"), room.peer("receiver", groups=["g"])
    hostile = room.peer("hostile", groups=["g"])
    verb = sample[0]
    body = [make_body(1)] if verb in (emp.SEND, emp.DELIVER, emp.ADMIN) else []
    for address in (hostile.address, (0, b"stranger")):
        for frames in (emp.encode(*sample), [verb, msgpack.packb(fields), *body], [b"?", b""]):
            room.core.receive(address, frames, room.now, Credentials())
            room.core.flush(room.now)
            room.core.expire(room.now + 1.0)
    witness.send("receiver", 1)
    assert [header.sender for header in receiver.ack_all() if header.sender == "witness"] == ["witness"]
    assert witness.settled() == (1, [])


numbers = st.sampled_from([1, 2, 3, 5, 2**31, 2**62 - 1, 2**62])


@given(st.lists(st.tuples(numbers, st.integers(1, 1024), numbers, st.integers(0, 63)), max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_sender_of_mad_numbers_hurts_only_itself(sends: list[tuple[int, int, int, int]]) -> None:
    room = BrokerRoom()
    witness, receiver = room.peer("witness"), room.peer("receiver", groups=["g"], prefetch=2000)
    mad = room.peer("mad")
    for first, count, floor, flags in sends:
        mad.send("@g", first, count, floor=floor, flags=flags & ~emp.RETAIN, body=b"\x90")
        mad.send("receiver", first, count, floor=floor, flags=flags & ~emp.RETAIN, body=b"\x90")
        mad.hello()
    while receiver.ack_all():
        pass
    witness.send("receiver", 1)
    assert [header.sender for header in receiver.ack_all()] == ["witness"]
    assert not receiver.take(emp.REFUSED)
    assert room.core.statistics(room.now)["broker"]["messages_held"] == 0


@given(st.sampled_from(SAMPLES), st.lists(anything, max_size=18), st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_the_sdks_core_survives_every_frame(
    sample: tuple[bytes, Any, bytes | None], fields: list[Any], body: bytes
) -> None:
    broker = RawBroker()
    broker.welcome()
    verb = sample[0]
    with_body = [body] if verb in (emp.SEND, emp.DELIVER, emp.ADMIN) else []
    for frames in ([verb, msgpack.packb(fields), *with_body], [*emp.encode(*sample)[:2], *with_body], [b"?", b""]):
        broker.core.receive(frames, broker.now)
        broker.core.flush(broker.now)
        broker.core.expire(broker.now)
