"""A TCP relay that breaks the link it carries: `python -m chaos.relay LISTEN_PORT TARGET_PORT [RECORD]`.

Its standard input takes one JSON object a line, {"do": WHAT}: drop, half-open, refuse, stall, throttle, pass.
With RECORD it reads along in MQTT: which messages of ours its client has acknowledged to the broker, and which the
broker to its client.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator

from chaos.places import TOKEN

_CONNACK, _PUBLISH, _PUBACK, _SUBACK = 2, 3, 4, 9
_QOS = 0x06
_SLICE_SECONDS = 0.02
_SMALL_BUFFER = 16384


class Packets:
    """MQTT control packets out of a stream of bytes; long payloads are kept whole."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """First byte and rest of each complete packet."""
        held = self._data
        held += data
        at = 0
        while len(held) - at >= 2:
            length = shift = 0
            end = at + 1
            while end < len(held) and end < at + 5:
                length |= (held[end] & 0x7F) << shift
                shift += 7
                end += 1
                if not held[end - 1] & 0x80:
                    break
            else:
                break
            if len(held) < end + length:
                break
            yield held[at], bytes(held[end : end + length])
            at = end + length
        del held[:at]


class Sniffer:
    """What the client of one MQTT connection has acknowledged (`P`), what the broker has (`Q`), one line each.

    `B`: it was subscribed. `C seconds 0|1`: a new connection, and whether the broker still had the session.
    """

    def __init__(self, record: int) -> None:
        self._record = record
        self._from_broker = Packets()
        self._from_client = Packets()
        self._handed_over: dict[bytes, bytes] = {}  # packet id -> token, each direction its own
        self._published: dict[bytes, bytes] = {}

    def from_broker(self, data: bytes) -> None:
        lines = []
        for first, rest in self._from_broker.feed(data):
            if first >> 4 == _PUBLISH:
                _note_publish(self._handed_over, first, rest)
            elif first >> 4 == _PUBACK:
                lines += _acknowledged("Q", self._published, rest)
            elif first >> 4 == _CONNACK:
                lines.append(f"C {time.monotonic():.4f} {rest[0] & 1}\n".encode())
            elif first >> 4 == _SUBACK:
                lines.append(f"B {time.monotonic():.4f} 0\n".encode())
        self._write(lines)

    def from_client(self, data: bytes) -> None:
        lines = []
        for first, rest in self._from_client.feed(data):
            if first >> 4 == _PUBLISH:
                _note_publish(self._published, first, rest)
            elif first >> 4 == _PUBACK:
                lines += _acknowledged("P", self._handed_over, rest)
        self._write(lines)

    def _write(self, lines: list[bytes]) -> None:
        if lines:
            os.write(self._record, b"".join(lines))


def _note_publish(tokens: dict[bytes, bytes], first: int, rest: bytes) -> None:
    if first & _QOS:
        token = TOKEN.search(rest)
        at = 2 + int.from_bytes(rest[:2], "big")
        if token is not None:
            tokens[rest[at : at + 2]] = token[0]


def _acknowledged(kind: str, tokens: dict[bytes, bytes], rest: bytes) -> list[bytes]:
    token = tokens.pop(rest[:2], None)
    # MQTT 5: a reason of 128 or more is a refusal, not an acknowledgement.
    if token is None or (len(rest) > 2 and rest[2] >= 128):
        return []
    return [f"{kind} {time.monotonic():.4f} ".encode() + token + b"\n"]


class Relay:
    def __init__(self, target: int, record: int | None) -> None:
        self._target = target
        self._record = record
        self._open: set[Carried] = set()
        self.flows = asyncio.Event()
        self.flows.set()
        self.bytes_per_second = 0.0
        self._is_refusing = False

    def command(self, order: dict[str, object]) -> None:
        what = order["do"]
        if what == "pass":
            self.bytes_per_second = 0.0
            self._is_refusing = False
            self.flows.set()
        elif what == "stall":
            self.flows.clear()
        elif what == "throttle":
            self.bytes_per_second = float(str(order["bytes_per_second"]))
        else:
            self._is_refusing = what == "refuse"
            for carried in list(self._open):
                carried.go_deaf() if what == "half-open" else carried.cut()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_refusing:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target, limit=65536)
        except OSError:
            writer.transport.abort()
            return
        carried = Carried(self, writer, far_writer, Sniffer(self._record) if self._record is not None else None)
        self._open.add(carried)
        try:
            await carried.run(reader, far_reader)
        finally:
            self._open.discard(carried)


class Carried:
    """One connection through the relay."""

    def __init__(
        self, relay: Relay, near: asyncio.StreamWriter, far: asyncio.StreamWriter, sniffer: Sniffer | None
    ) -> None:
        self._relay = relay
        self._near = near
        self._far = far
        self._sniffer = sniffer
        self._is_deaf = False
        for writer in (near, far):
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def cut(self) -> None:
        self._near.transport.abort()
        self._far.transport.abort()

    def go_deaf(self) -> None:
        """Both sockets stay, and nothing passes any more: what a node sees when its router loses power."""
        self._is_deaf = True
        for writer in (self._near, self._far):
            transport = writer.transport
            with contextlib.suppress(RuntimeError):
                transport.pause_reading()  # type: ignore[attr-defined]

    async def run(self, near: asyncio.StreamReader, far: asyncio.StreamReader) -> None:
        sniffer = self._sniffer
        directions = [
            asyncio.create_task(self._copy(near, self._far, sniffer.from_client if sniffer else None)),
            asyncio.create_task(self._copy(far, self._near, sniffer.from_broker if sniffer else None)),
        ]
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        if not self._is_deaf:
            for direction in directions:
                direction.cancel()
            self.cut_softly()
        await asyncio.gather(*directions, return_exceptions=True)
        self.cut_softly()

    def cut_softly(self) -> None:
        self._near.close()
        self._far.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, look: object) -> None:
        relay = self._relay
        try:
            while True:
                rate = relay.bytes_per_second
                data = await reader.read(max(256, int(rate * _SLICE_SECONDS)) if rate else 65536)
                if not data:
                    return
                await relay.flows.wait()
                if self._is_deaf:
                    await asyncio.sleep(120)  # longer than any cell
                    return
                if rate:
                    await asyncio.sleep(len(data) / rate)
                if callable(look):
                    look(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # either side went away: the link is cut, as without us


async def _serve(port: int, target: int, record: str | None) -> None:
    fd = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600) if record else None
    relay = Relay(target, fd)
    server = await asyncio.start_server(relay.carry, "127.0.0.1", port, limit=_SMALL_BUFFER)
    orders = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)  # noqa: T201
    while line := await orders.readline():
        relay.command(json.loads(line))
        print("{}", flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None))
