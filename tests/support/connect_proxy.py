"""An HTTP proxy on loopback that opens tunnels, or answers whatever a test wants it to."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class ConnectProxy:
    """`answer` b"": open a tunnel; else send it and hang up, after `wait_seconds`."""

    authorization: str = ""
    "The value of Proxy-Authorization that is wanted; empty: none."
    answer: bytes = b""
    wait_seconds: float = 0.0
    port: int = 0
    asked: list[str] = field(default_factory=list)
    "The targets of all requests."
    carried_bytes: int = 0
    seen: bytes = b""
    "The first bytes from the node behind the request: what a proxy could read."

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        self.asked.append(head[0].split(" ")[1])
        await asyncio.sleep(self.wait_seconds)
        if self.answer:
            writer.write(self.answer)
            await writer.drain()
            writer.close()
            return
        if self.authorization and f"Proxy-Authorization: {self.authorization}" not in head:
            writer.write(b'HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm="x"\r\n\r\n')
            await writer.drain()
            writer.close()
            return
        host, _, port = self.asked[-1].rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except OSError:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            await writer.drain()
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n")
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._carry(reader, far_writer))
                tasks.create_task(self._carry(far_reader, writer))
        except* OSError:
            pass
        finally:
            far_writer.transport.abort()

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            self.seen = self.seen or data
            self.carried_bytes += len(data)
            target.write(data)
            await target.drain()
        target.close()


@asynccontextmanager
async def proxying(proxy: ConnectProxy, context: ssl.SSLContext | None = None) -> AsyncIterator[ConnectProxy]:
    """Serve `proxy` on a free port, with `context` over TLS."""
    listener = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, ssl=context)
    proxy.port = listener.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        listener.close()
