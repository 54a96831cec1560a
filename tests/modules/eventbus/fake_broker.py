"""An MQTT broker of which the test decides every packet, to see what a real one would not show."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.support.aio import until

CONNECT, PUBLISH, PUBACK, SUBSCRIBE, UNSUBSCRIBE, PINGREQ, DISCONNECT = 1, 3, 4, 8, 10, 12, 14


@dataclass
class Packet:
    kind: int
    flags: int
    body: bytes

    @property
    def mid(self) -> int:
        return int.from_bytes(self.body[:2], "big")


@dataclass
class Connection:
    """One client's connection; `packets` is what came, in order."""

    writer: asyncio.StreamWriter
    packets: list[Packet] = field(default_factory=list)
    level: int = 0
    ended: bool = False

    def of(self, kind: int) -> list[Packet]:
        return [packet for packet in self.packets if packet.kind == kind]

    @property
    def pubacks(self) -> list[int]:
        return [packet.mid for packet in self.of(PUBACK)]

    @property
    def publishes(self) -> list[tuple[int, bool, bytes]]:
        """Packet id, DUP and payload of what the client published, of one-letter topics."""
        found = []
        for packet in self.of(PUBLISH):
            at = 2 + int.from_bytes(packet.body[:2], "big")
            mid = int.from_bytes(packet.body[at : at + 2], "big")
            found.append((mid, bool(packet.flags & 8), packet.body[at + (3 if self.level == 5 else 2) :]))
        return found

    def send(self, *packets: bytes) -> None:
        self.writer.write(b"".join(packets))

    def cut(self) -> None:
        self.writer.transport.abort()


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = divmod(value, 128)
        out.append(low | (128 if value else 0))
        if not value:
            return bytes(out)


def packet(first: int, body: bytes = b"") -> bytes:
    return bytes([first]) + varint(len(body)) + body


class FakeBroker:
    """Answers CONNECT, SUBSCRIBE, UNSUBSCRIBE and PINGREQ in the obvious way; every answer can be replaced."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.session_present = False
        self.properties = b""
        "Of the CONNACK (MQTT 5)."
        self.after_connack = b""
        "Sent in one write with the CONNACK."
        self.on_connect: Callable[[Connection], bytes | None] | None = None
        self.answers_pings = True
        self.acknowledges = True
        "PUBLISHes of the client."
        self.refuses_filters: set[bytes] = set()
        self.port = 0

    @property
    def last(self) -> Connection:
        return self.connections[-1]

    async def connection(self, number: int) -> Connection:
        """The number-th connection, once it has subscribed."""
        await until(lambda: len(self.connections) >= number and self.connections[number - 1].of(CONNECT))
        return self.connections[number - 1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer)
        self.connections.append(connection)
        try:
            while True:
                first = (await reader.readexactly(1))[0]
                length = shift = 0
                while True:
                    byte = (await reader.readexactly(1))[0]
                    length |= (byte & 127) << shift
                    shift += 7
                    if byte < 128:
                        break
                came = Packet(first >> 4, first & 15, await reader.readexactly(length))
                connection.packets.append(came)
                self._answer(connection, came)
        except (asyncio.IncompleteReadError, ConnectionError):
            connection.ended = True
        finally:
            writer.close()

    def _answer(self, connection: Connection, came: Packet) -> None:
        is_mqtt5 = connection.level == 5
        if came.kind == CONNECT:
            connection.level = came.body[6]
            if self.on_connect is not None:
                answer = self.on_connect(connection)
                if answer is not None:
                    connection.send(answer)
                return
            properties = varint(len(self.properties)) + self.properties if connection.level == 5 else b""
            connection.send(packet(0x20, bytes([self.session_present, 0]) + properties), self.after_connack)
        elif came.kind == SUBSCRIBE:
            at = 3 if is_mqtt5 else 2
            topic_filter = came.body[at + 2 : at + 2 + int.from_bytes(came.body[at : at + 2], "big")]
            code = b"\x80" if topic_filter in self.refuses_filters else b"\x01"
            connection.send(packet(0x90, came.body[:2] + (b"\x00" if is_mqtt5 else b"") + code))
        elif came.kind == UNSUBSCRIBE:
            connection.send(packet(0xB0, came.body[:2] + (b"\x00\x00" if is_mqtt5 else b"")))
        elif came.kind == PINGREQ and self.answers_pings:
            connection.send(b"\xd0\x00")
        elif came.kind == PUBLISH and self.acknowledges:
            at = 2 + int.from_bytes(came.body[:2], "big")
            connection.send(packet(0x40, came.body[at : at + 2]))


def publish(topic: str, payload: bytes, mid: int, *, dup: bool = False, is_mqtt5: bool = True) -> bytes:
    """A PUBLISH from the broker at QoS 1, or at QoS 0 when `mid` is 0."""
    body = len(topic).to_bytes(2, "big") + topic.encode()
    if mid:
        body += mid.to_bytes(2, "big")
    if is_mqtt5:
        body += b"\x00"
    return packet(0x30 | (2 if mid else 0) | (8 if dup else 0), body + payload)


@asynccontextmanager
async def fake_broker() -> AsyncIterator[FakeBroker]:
    broker = FakeBroker()
    server = await asyncio.start_server(broker._serve, "127.0.0.1", 0)
    broker.port = server.sockets[0].getsockname()[1]
    try:
        yield broker
    finally:
        server.close()
        for connection in broker.connections:
            connection.cut()
        await server.wait_closed()
        await asyncio.sleep(0)
