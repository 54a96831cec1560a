"""What the relay reads along in MQTT."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chaos.relay import Packets, Sniffer
from chaos.tail import Tail


def packet(first: int, rest: bytes) -> bytes:
    assert len(rest) < 128
    return bytes([first, len(rest)]) + rest


def publish(mid: int, token: bytes, *, qos: int = 1) -> bytes:
    return packet(0x30 | qos << 1, b"\0\1t" + mid.to_bytes(2, "big") + b'{"t": "' + token + b'"}')


def puback(mid: int, reason: int | None = None) -> bytes:
    return packet(0x40, mid.to_bytes(2, "big") + (b"" if reason is None else bytes([reason])))


@pytest.fixture
def sniffed(tmp_path: Path) -> tuple[Sniffer, Tail]:
    path = tmp_path / "record"
    return Sniffer(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)), Tail(path)


def told(tail: Tail) -> list[tuple[str, str]]:
    words = [line.decode().split(" ") for line in tail.lines()]
    return [(each[0], each[2]) for each in words]


def test_packets_are_put_together_from_pieces() -> None:
    packets = Packets()
    data = publish(1, b"u.1.0.1.") + puback(1)
    found = [each for at in range(len(data)) for each in packets.feed(data[at : at + 1])]
    assert [first >> 4 for first, _ in found] == [3, 4]


def test_each_side_tells_what_the_other_has_acknowledged(sniffed: tuple[Sniffer, Tail]) -> None:
    sniffer, tail = sniffed
    sniffer.from_broker(publish(7, b"u.1.0.1."))
    sniffer.from_client(publish(7, b"c.1.5.2."))  # the same packet id, of the other direction
    assert told(tail) == []
    sniffer.from_client(puback(7))
    assert told(tail) == [("P", "u.1.0.1.")]
    sniffer.from_broker(puback(7, reason=0))
    assert told(tail) == [("Q", "c.1.5.2.")]


def test_a_refusal_is_no_acknowledgement_and_qos_0_has_none(sniffed: tuple[Sniffer, Tail]) -> None:
    sniffer, tail = sniffed
    sniffer.from_broker(publish(7, b"u.1.0.1.") + publish(8, b"u.1.0.2.", qos=0))
    sniffer.from_client(puback(7, reason=0x97) + puback(8))
    assert told(tail) == []


def test_a_new_connection_tells_whether_the_session_was_kept(sniffed: tuple[Sniffer, Tail]) -> None:
    sniffer, tail = sniffed
    sniffer.from_broker(packet(0x20, b"\0\0") + packet(0x90, b"\0\1\0") + packet(0x20, b"\1\0"))
    assert told(tail) == [("C", "0"), ("B", "0"), ("C", "1")]
