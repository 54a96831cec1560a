"""A TCP relay in front of the cloud that counts what passes: `python -m bench.relay HOST:PORT OUTPUT`.

Says its own port in one JSON line. On SIGUSR1 it appends one line to OUTPUT: the bytes on the wire so far,
both directions, TCP and IP headers and bare acknowledgements included, for one IPv4 link with timestamps.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
import sys
from pathlib import Path

HEADER_BYTES = 20 + 32
"IPv4 without options, and TCP with timestamps (RFC 9293, RFC 7323)."

_BYTES_ACKED = 120
_SEGMENTS = 136
"Offsets of tcpi_bytes_acked, tcpi_bytes_received, tcpi_segs_out, tcpi_segs_in in struct tcp_info (linux/tcp.h)."


def wire_bytes(info: bytes) -> int:
    """Bytes on the wire of the connection that this struct tcp_info describes."""
    acknowledged, received = struct.unpack_from("=QQ", info, _BYTES_ACKED)
    segments_out, segments_in = struct.unpack_from("=II", info, _SEGMENTS)
    return int(acknowledged + received + HEADER_BYTES * (segments_out + segments_in))


class Relay:
    """Carries bytes between a node and the cloud."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._gone = 0
        self._open: set[socket.socket] = set()

    def total(self) -> int:
        """Bytes on the wire of all connections of nodes so far."""
        return self._gone + sum(self._of(connection) for connection in self._open)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        self._open.add(connection)
        try:
            cloud_reader, cloud_writer = await asyncio.open_connection(self._host, self._port)
            directions = [
                asyncio.create_task(self._copy(reader, cloud_writer)),
                asyncio.create_task(self._copy(cloud_reader, writer)),
            ]
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            for direction in directions:
                direction.cancel()
            cloud_writer.close()
        except OSError:
            pass  # either side went away: the link is cut, as without us
        finally:
            self._gone += self._of(connection)
            self._open.discard(connection)
            writer.close()

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    @staticmethod
    def _of(connection: socket.socket) -> int:
        try:
            return wire_bytes(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
        except OSError:
            return 0  # closed this moment; what it carried is lost to the count


async def _serve(target: str, output: Path) -> None:
    host, _, port = target.rpartition(":")
    relay = Relay(host, int(port))
    server = await asyncio.start_server(relay.carry, "127.0.0.1", 0)

    def write() -> None:
        with output.open("a") as file:
            file.write(f"{relay.total()}\n")

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, write)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    try:
        asyncio.run(_serve(sys.argv[1], Path(sys.argv[2])))
    except KeyboardInterrupt:
        pass
