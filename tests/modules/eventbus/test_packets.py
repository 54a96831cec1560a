"""PUBLISH out of a stream of bytes, cut anywhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modules.eventbus.packets import InPublish, MalformedPacket, PacketReader, puback

PINGRESP = b"\xd0\x00"


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = divmod(value, 128)
        out.append(low | (128 if value else 0))
        if not value:
            return bytes(out)


def publish(
    topic: str | bytes = "a/b",
    payload: bytes = b"x",
    *,
    mid: int = 0,
    dup: bool = False,
    properties: bytes | None = None,
) -> bytes:
    raw = topic if isinstance(topic, bytes) else topic.encode()
    body = len(raw).to_bytes(2, "big") + raw
    if mid:
        body += mid.to_bytes(2, "big")
    if properties is not None:
        body += varint(len(properties)) + properties
    body += payload
    first = 0x30 | (0x02 if mid else 0) | (0x08 if dup else 0)
    return bytes([first]) + varint(len(body)) + body


def read(data: bytes, *, is_mqtt5: bool = False, limit: int = 1 << 20, cuts: list[int] | None = None) -> list[object]:
    reader = PacketReader(is_mqtt5=is_mqtt5, limit_bytes=limit)
    found: list[object] = []
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or [])})
    for start, end in pairwise(edges):
        reader.feed(data[start:end])
        while (packet := reader.next()) is not None:
            found.append(packet)
    return found


def test_a_publish_at_qos_1() -> None:
    assert read(publish("t", b"payload", mid=7, dup=True)) == [InPublish(7, 1, True, "t", b"payload", 12)]


def test_a_publish_at_qos_0_without_payload() -> None:
    assert read(publish("t", b"")) == [InPublish(0, 0, False, "t", b"", 3)]


def test_properties_are_passed_over() -> None:
    expiry = b"\x02\x00\x00\x00\x3c"
    assert read(publish("t", b"p", mid=1, properties=expiry), is_mqtt5=True)[0] == InPublish(1, 1, False, "t", b"p", 12)


def test_other_packets_come_as_they_are() -> None:
    assert read(PINGRESP + publish() + b"\x40\x02\x00\x01") == [
        PINGRESP,
        InPublish(0, 0, False, "a/b", b"x", 6),
        b"\x40\x02\x00\x01",
    ]


def test_a_topic_that_is_not_utf8_is_none() -> None:
    (packet,) = read(publish(b"\xff\xfe", b"p", mid=3))
    assert isinstance(packet, InPublish)
    assert packet.topic is None
    assert packet.mid == 3


packets = st.builds(
    lambda topic, payload, mid, dup: (topic, payload, mid, dup and mid > 0),
    st.text(max_size=20).filter(lambda text: text.isprintable()),
    st.binary(max_size=300),
    st.integers(0, 65535),
    st.booleans(),
)


@given(st.lists(packets, max_size=6), st.lists(st.integers(0, 3000), max_size=12), st.booleans())
@example([("t", b"x" * 300, 1, False)], [1, 2, 3], True)
def test_packets_survive_every_cut(sent: list[tuple[str, bytes, int, bool]], cuts: list[int], is_mqtt5: bool) -> None:
    data = b"".join(
        publish(topic, payload, mid=mid, dup=dup, properties=b"" if is_mqtt5 else None)
        for topic, payload, mid, dup in sent
    )
    found = read(data, is_mqtt5=is_mqtt5, cuts=cuts)
    assert [(p.topic, p.payload, p.mid, p.dup) for p in found if isinstance(p, InPublish)] == sent


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_packets_or_one_error(data: bytes, is_mqtt5: bool) -> None:
    try:
        read(data, is_mqtt5=is_mqtt5, limit=64)
    except MalformedPacket:
        pass


@pytest.mark.parametrize(
    ("data", "is_mqtt5"),
    [
        (b"\x30\xff\xff\xff\xff\x01", False),  # length of five bytes
        (b"\x30\x01\x00", False),  # no room for a topic length
        (b"\x30\x03\x00\x05a", False),  # topic longer than the packet
        (b"\x32\x03\x00\x01a", False),  # no packet id
        (b"\x32\x05\x00\x01a\x00\x00", False),  # packet id 0
        (b"\x34\x06\x00\x01a\x00\x01x", False),  # QoS 2
        (b"\x36\x06\x00\x01a\x00\x01x", False),  # QoS 3
        (b"\x30\x03\x00\x01a", True),  # no property length
        (b"\x30\x04\x00\x01a\x09", True),  # properties longer than the packet
        (b"\x30\x08\x00\x01a\xff\xff\xff\xff\x01", True),
    ],
)
def test_a_malformed_packet_is_an_error(data: bytes, is_mqtt5: bool) -> None:
    with pytest.raises(MalformedPacket):
        read(data, is_mqtt5=is_mqtt5)


@pytest.mark.parametrize("step", [1000, 65536, 10**9])
def test_a_publish_beyond_the_limit_is_skipped_and_the_next_one_read(step: int) -> None:
    payload = b"z" * 3_000_000
    data = publish("big", payload, mid=9) + publish("small", b"ok", mid=10)
    found = read(data, limit=1_000_000, cuts=list(range(0, len(data), step)))
    assert found == [
        InPublish(9, 1, False, "big", None, 3_000_007),
        InPublish(10, 1, False, "small", b"ok", 11),
    ]


def test_what_is_skipped_is_not_held() -> None:
    reader = PacketReader(is_mqtt5=False, limit_bytes=1_000_000)
    data = publish("big", b"z" * 3_000_000)
    most = 0
    for start in range(0, len(data), 65536):
        reader.feed(data[start : start + 65536])
        reader.next()
        most = max(most, reader.unread_bytes)
    assert most < 300_000


def test_another_packet_beyond_the_limit_is_malformed() -> None:
    with pytest.raises(MalformedPacket):
        read(b"\xd0" + varint(2_000_000))


def test_puback_is_four_bytes_in_both_versions() -> None:
    assert puback(258) == b"\x40\x02\x01\x02"
